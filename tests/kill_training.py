"""Kill training processes at random moments and check that resumed runs end like an uninterrupted one.

Run ``kill_training.py FOLDER KILLS SEED``. It prints one JSON object. The parent process loads everything and never
runs a backward pass itself, so that a forked child starts in milliseconds. A child is killed some time after it has
saved a random number of steps, so that the kills hit all parts of a run on fast and on slow machines.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import prefixfast
import tiny
from prefixfast.store.runs import RUNS
from prefixfast.training.trainer import train
from token_rows import rows

STEPS = 30  # steps of a whole run
MOST_SAVED = 6  # a child is killed before it has saved this many steps
DEADLINE = 300  # seconds without a saved step after which the script fails
KINDS = ("store", "several", "lone")  # several prefixes without an output folder, several, and one
DATA = {"a": rows(0, 5), "b": rows(1, 7), "c": rows(2, 4), "d": rows(3, 6)}
OPTIONS = {
    "batch_size": 2,
    "prefix_length": 3,
    "learning_rate": 5e-3,
    "init": "random",
    "max_steps": STEPS,
    "prefix_dropout": 0.2,
    "reparameterization": "mlp",
    "encoder_hidden_size": 16,
    "eval_steps": 3,
    "early_stopping_patience": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "progress": False,
}


def run(model: prefixfast.Model, folder: Path, kind: str) -> None:
    """Train from the start or from the checkpoint in ``folder``."""
    how = {**OPTIONS, "store": folder / "store", "eval_data": rows(9, 3), "resume": True}
    if kind != "store":
        how["output_dir"] = folder / "out"
    if kind != "lone":
        how["overrides"] = {"a": {"max_steps": 7}, "b": {"max_steps": 18}}
    train(model, DATA["b"] if kind == "lone" else DATA, **how)


def child(model: prefixfast.Model, folder: Path, kind: str) -> int:
    """Start `run` in a child process and return its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            run(model, folder, kind)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return pid


def saved(folder: Path) -> int:
    """Step of the checkpoint of a run, 0 without a checkpoint."""
    step = 0
    for state in (*folder.glob("out/checkpoint/0/state.json"), *folder.glob(f"store/{RUNS}/*/checkpoint/0/state.json")):
        with contextlib.suppress(FileNotFoundError):
            step = max(step, json.loads(state.read_text())["state"]["step"])
    return step


def kill(pid: int, out: Path, steps: int, seconds: float) -> bool:
    """Kill a child ``seconds`` after it has saved ``steps`` more steps; False if the child ended before."""
    wanted, until = saved(out) + steps, time.perf_counter() + DEADLINE
    while saved(out) < wanted:
        assert time.perf_counter() < until, f"no step in {DEADLINE} s"
        if done := os.waitpid(pid, os.WNOHANG)[0]:
            return not done
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def digests(folder: Path, kind: str) -> dict[str, list[str]]:
    """Digests of each prefix in the output folder and in the store."""
    store = prefixfast.PrefixStore(folder / "store")
    if kind == "lone":
        return {"": [prefixfast.Prefix.from_pretrained(folder / "out").digest, store["prefix"].digest]}
    saved_twice = [] if kind == "store" else [{n: prefixfast.Prefix.from_pretrained(folder / "out" / n) for n in DATA}]
    return {n: [held[n].digest for held in (store, *saved_twice)] for n in DATA}


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill ``kills`` children in runs of each kind in turn, and print the result."""
    torch.set_num_threads(1)
    model = prefixfast.load(tiny.make("gpt2"))
    start, span, expected = time.perf_counter(), {}, {}
    # The first runs on a machine can take many times as long as later ones, so the second ones are timed.
    for kind, name in itertools.product(KINDS, ("cold", "warm")):
        begin, whole = time.perf_counter(), folder / f"whole-{kind}-{name}"
        assert os.waitpid(child(model, whole, kind), 0)[1] == 0
        span[kind], expected[kind] = time.perf_counter() - begin, digests(whole, kind)
    chance = random.Random(seed)
    steps, equal, left = [], True, []
    for number, kind in enumerate(itertools.cycle(KINDS)):
        if len(steps) == kills:
            break
        out = folder / f"run-{number}"
        for _ in range(min(2, kills - len(steps))):
            more, seconds = chance.randrange(MOST_SAVED), chance.uniform(0, span[kind] * MOST_SAVED / STEPS)
            if kill(child(model, out, kind), out, more, seconds):  # a child that ended before its kill does not count
                steps.append(saved(out))
        status = os.waitpid(child(model, out, kind), 0)[1]
        equal &= status == 0 and digests(out, kind) == expected[kind]
        left += [str(p) for p in (*(out / "out").rglob(".*"), *out.glob(".*"))]
        left += [str(p) for p in out.glob(f"store/{RUNS}/*/*") if p.name not in ("run.json", "log.jsonl")]
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"kills": len(steps), "equal": equal, "left": left, "steps": steps, "seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
