"""Train in children that are killed (SIGKILL) at random moments and go on from what they left: ``kill_training.py FOLDER KILLS SEED``.

The parent has everything loaded and never runs a backward pass itself, so that a forked child starts in milliseconds. A moment is a number of steps that the
child has saved, and some time more, so that kills hit all of a run however fast the machine is at the hour.
"""

from __future__ import annotations

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
from prefixfast.training.trainer import train
from token_rows import rows

STEPS, MOST, DEADLINE = 30, 6, 300
DATA = {"a": rows(0, 5), "b": rows(1, 7), "c": rows(2, 4), "d": rows(3, 6)}
HOW = {"batch_size": 2, "prefix_length": 3, "learning_rate": 5e-3, "init": "random", "max_steps": STEPS, "prefix_dropout": 0.2, "reparameterization": "mlp",
       "encoder_hidden_size": 16, "eval_steps": 3, "early_stopping_patience": 4, "save_steps": 2, "logging_steps": 1, "progress": False}  # fmt: skip


def run(model: prefixfast.Model, folder: Path, lone: bool) -> None:
    """The whole training, or what is left of it: of one prefix, whose folder is the run's, or of several."""
    if lone:
        train(
            model,
            DATA["b"],
            eval_data=rows(9, 3),
            output_dir=folder / "out",
            store=folder / "store",
            resume=True,
            **HOW,
        )
        return
    how = {**HOW, "overrides": {"a": {"max_steps": 7}, "b": {"max_steps": 18}}, "eval_data": rows(9, 3)}
    train(model, DATA, output_dir=folder / "out", store=folder / "store", resume=True, **how)


def child(model: prefixfast.Model, folder: Path, lone: bool) -> int:
    """Start it in a child."""
    pid = os.fork()
    if pid == 0:
        try:
            run(model, folder, lone)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    return pid


def saved(out: Path) -> int:
    """The step of the checkpoint that lies there, 0 for none."""
    state = out / "out" / "checkpoint" / "0" / "state.json"
    try:
        return json.loads(state.read_text())["state"]["step"]
    except FileNotFoundError:
        return 0


def kill(pid: int, out: Path, steps: int, seconds: float) -> bool:
    """Kill a child some seconds after it has saved ``steps`` more steps; whether it was killed before its end."""
    wanted, until = saved(out) + steps, time.perf_counter() + DEADLINE
    while saved(out) < wanted:
        assert time.perf_counter() < until, f"no step in {DEADLINE} s"
        if done := os.waitpid(pid, os.WNOHANG)[0]:
            return not done
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def digests(folder: Path, lone: bool) -> dict[str, list[str]]:
    """Of what lies on disk, folder and store."""
    store = prefixfast.PrefixStore(folder / "store")
    if lone:
        return {"": [prefixfast.Prefix.from_pretrained(folder / "out").digest, store["prefix"].digest]}
    return {n: [prefixfast.Prefix.from_pretrained(folder / "out" / n).digest, store[n].digest] for n in DATA}


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill ``kills`` children over as many whole runs as it takes, of several prefixes and of one in turn, each ending as the uncut run did."""
    torch.set_num_threads(1)
    model = prefixfast.load(tiny.make("gpt2"))
    start, span, expected = time.perf_counter(), {}, {}
    for lone, name in (
        (False, "cold"),
        (True, "cold"),
        (False, "warm"),
        (True, "warm"),
    ):  # the first runs of a machine can take many times as long
        begin, whole = time.perf_counter(), folder / f"whole-{lone}-{name}"
        assert os.waitpid(child(model, whole, lone), 0)[1] == 0
        span[lone], expected[lone] = time.perf_counter() - begin, digests(whole, lone)
    chance, lone = random.Random(seed), False
    steps, equal, left = [], True, []
    for number in itertools.count():
        if len(steps) == kills:
            break
        out = folder / f"run-{number}"  # one in which nobody was killed in time counts as none
        steps += [
            saved(out)
            for _ in range(min(4, kills - len(steps)))
            if kill(child(model, out, lone), out, chance.randrange(MOST), chance.uniform(0, span[lone] * MOST / STEPS))
        ]
        status = os.waitpid(child(model, out, lone), 0)[1]
        equal &= status == 0 and digests(out, lone) == expected[lone]
        left += [str(p) for p in (*(out / "out").rglob(".*"), *out.glob(".*"))]
        lone = not lone
    print(
        json.dumps(
            {
                "kills": len(steps),
                "equal": equal,
                "left": left,
                "steps": steps,
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
