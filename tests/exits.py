"""End processes while threads run models, and report how they ended.

Run ``exits.py FOLDER ROUNDS SEED NAMES``. Each round forks one child for each named scenario, by default for all. The
child starts its work, waits until the work is under way and, with a seed above 0, for a further random time. It then
ends as a script does, with all of Python's finalization. The output is one JSON object with the statuses by scenario. A
child that hangs is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import prefixfast
import tiny
from prefixfast import Engine, HFCache, Prefix, PrefixStore
from prefixfast.training.callbacks import Callback
from token_rows import rows

LONG = {"max_new_tokens": 150, "min_new_tokens": 150}
HOW = {"max_num_seqs": 4, "max_model_len": 160}
SECONDS = 60  # after which a child counts as hanging
started = threading.Event()
kept: list[object] = []  # alive until the interpreter clears its modules


class Started:
    """Logits processor that tells that its request runs."""

    def __call__(self, input_ids, scores):
        started.set()
        return scores


class Steps(Callback):
    """Callback that tells that the training runs."""

    def on_step(self, step, losses, grad_norms, active):
        started.set()


def engine(**how) -> Engine:
    made = Engine(tiny.make("gpt2"), **HOW, **how)
    kept.append(made)
    return made


def requests(running: Engine) -> None:
    """Submit more requests than can end in time."""
    kept.extend(running.submit([5, 6], logits_processor=[Started()], **LONG) for _ in range(40))


def submitted(_: Path) -> None:
    requests(engine())


def dropped(folder: Path) -> None:
    requests(engine())
    kept.clear()


def uncaught(_: Path) -> None:
    requests(engine())
    started.wait()
    raise ZeroDivisionError


def sys_exit(_: Path) -> None:
    requests(engine())
    started.wait()
    sys.exit(1)


def streams(_: Path) -> None:
    running = engine()
    running.model.tokenizer = None
    requests(running)

    async def main() -> None:
        kept.extend(asyncio.ensure_future(running.agenerate([5, 6], **LONG)) for _ in range(4))
        await asyncio.sleep(0)

    asyncio.run(main())


def in_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function, daemon=True)
    thread.start()


def batch_in_a_thread(_: Path) -> None:
    running = engine()
    in_thread(lambda: running.generate([[5, 6]] * 40, logits_processor=[Started()], progress=False, **LONG))


def score_in_a_thread(_: Path) -> None:
    running = engine(max_num_batched_tokens=64)

    def forever() -> None:
        while True:
            started.set()
            running.score([[5, 6, 7] * 10] * 200, targets=[[8]] * 200)

    in_thread(forever)


def training_in_a_thread(_: Path) -> None:
    how = {"max_steps": 10**6, "batch_size": 2, "progress": False, "init": "random", "prefix_length": 3}
    in_thread(lambda: prefixfast.train(tiny.make("gpt2"), rows(0, 8), callbacks=[Steps()], **how))


def loads(folder: Path) -> None:
    running = engine(store=folder / "store")
    for i in range(20):
        running.pin(f"p{i}")
    started.set()


def cache(folder: Path) -> None:
    model = prefixfast.load(tiny.make("gpt2"))
    made = HFCache(model, Prefix.from_pretrained(PrefixStore(folder / "store").info("p1").folder))
    model.hf.generate(input_ids=torch.tensor([[5, 6]]), past_key_values=made, max_new_tokens=3)
    kept.append(made)
    started.set()


def data_loader(_: Path) -> None:
    numbers = torch.utils.data.DataLoader(list(range(1000)), num_workers=2, persistent_workers=True)
    iterator = iter(numbers)
    kept.extend([next(iterator), iterator])
    requests(engine())


def blocking_callback(_: Path) -> None:
    """A thread that never comes back delays the end, but does not prevent it."""
    from prefixfast.model import process

    process.EXIT_SECONDS = 0.1
    never = threading.Event()

    def wait(_, scores):
        started.set()
        never.wait()
        return scores

    kept.append(engine().submit([5, 6], logits_processor=[wait], **LONG))


SCENARIOS = {
    f.__name__: f
    for f in (
        *(submitted, dropped, uncaught, sys_exit, streams, batch_in_a_thread, score_in_a_thread),
        *(training_in_a_thread, loads, cache, data_loader, blocking_callback),
    )
}


def main(folder: Path, rounds: int, seed: int, names: list[str]) -> None:
    """Run scenarios."""
    torch.set_num_threads(1)
    store = PrefixStore(folder / "store")
    for i in range(20):
        kv = {f"self.{layer}.{x}": torch.randn(50, 4, 8) for layer in range(3) for x in "kv"}
        store.put(f"p{i}", Prefix(kv, 50))
    found: dict[str, list[int]] = {name: [] for name in names or SCENARIOS}
    for number in range(rounds):
        for name in found:
            pid = os.fork()
            if pid == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                signal.alarm(SECONDS)
                SCENARIOS[name](folder)
                started.wait()
                if seed:
                    time.sleep(random.Random(f"{seed} {number} {name}").uniform(0, 0.1))
                return
            found[name].append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
