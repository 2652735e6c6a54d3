"""Decoder-only models in two versions of prefixfast: decode steps, training, generation, loads and imports.

Run ``python benches/system/two_versions.py BEFORE AFTER -o OUT.jsonl``, where ``BEFORE`` and ``AFTER`` are source
trees whose extension is built. Each version runs in a process of its own, and only one of the two works at a time. A
round measures before, after, after, before, so that a machine that becomes slower adds the same to both. The ratio of
a round is the time after over the time before. Two processes of one version differ by up to 4 %, which no number of
rounds averages out, so that each case is measured in several pairs of processes. CPU seconds depend less on other
work of the machine than wall seconds do. The same tree given twice shows the spread that the machine alone causes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

ROWS, PROMPT, NEW = 32, 40, 200
STEPS, TRAIN_STEPS, LOADS = 8, 2, 200  # decode steps, training steps and loads of a prefix of one measurement
Unit = Callable[[], tuple[float, float]]  # CPU and wall seconds of one measurement


def clocks() -> tuple[float, float]:
    """CPU and wall seconds."""
    return time.process_time(), time.perf_counter()


def timed(work: Callable[[], object]) -> Unit:
    """Measurement of a function."""

    def unit() -> tuple[float, float]:
        cpu, wall = clocks()
        work()
        end = clocks()
        return end[0] - cpu, end[1] - wall

    return unit


# ---- what one version measures, in a process of its own ----


@contextlib.contextmanager
def base_of(shape: str, dtype: str) -> Iterator[object]:
    """Loaded base: a random one of `random_base.SHAPES`, or the model in a folder."""
    from prefixfast.bench.random_base import SHAPES, make
    from prefixfast.model.load import load

    with load(make(shape, dtype) if shape in SHAPES else shape, dtype=dtype) as model:
        yield model


@contextlib.contextmanager
def engine_of(shape: str, dtype: str, length: int, count: int) -> Iterator[tuple[object, list[object]]]:
    """Engine of `ROWS` decode rows, and random prefixes."""
    from prefixfast.bench.random_base import random_prefixes
    from prefixfast.engine.engine import Engine

    with base_of(shape, dtype) as model:
        row_bytes = sum(s.row_numbers for s in model.layers) * model.dtype.itemsize
        rows = 256 + count * (length + 16) + ROWS * (PROMPT + NEW + 16)
        options = {"max_num_seqs": ROWS, "max_model_len": PROMPT + NEW, "kv_cache_memory": row_bytes * rows}
        with Engine(model, **options) as engine:
            yield engine, random_prefixes(model, length, count)


def prompts_of(vocab_size: int, count: int) -> list[list[int]]:
    """Token ids of random prompts."""
    import torch

    g = torch.Generator().manual_seed(0)
    return torch.randint(3, vocab_size, (count, PROMPT), generator=g).tolist()


@contextlib.contextmanager
def decode(shape: str, dtype: str, length: int, beams: int) -> Iterator[Unit]:
    """Decode steps of `ROWS` rows, in requests of ``beams`` beams with a prefix of their own."""
    import torch

    from prefixfast.bench.decoding import Decoding
    from prefixfast.bench.engine_loop import add_requests
    from prefixfast.config import GenerationParams

    count = ROWS // beams
    with engine_of(shape, dtype, length, count) as (engine, prefixes), torch.inference_mode():
        decoding = dataclasses.replace(Decoding.exactly(NEW, engine.model), num_beams=beams)
        params = GenerationParams(**decoding.params())
        add_requests(engine, prompts_of(engine.model.vocab_size, count), prefixes, params)
        while engine.loop.counts["decoded_rows"] < 3 * ROWS:
            engine.loop.step()
        yield timed(lambda: [engine.loop.step() for _ in range(STEPS)])


@contextlib.contextmanager
def generate(shape: str, dtype: str, length: int, beams: int) -> Iterator[Unit]:
    """Generation of 32 tokens for `ROWS` rows, in requests of ``beams`` beams with a prefix of their own."""
    from prefixfast.bench.decoding import Decoding

    count = ROWS // beams
    with engine_of(shape, dtype, length, count) as (engine, prefixes):
        decoding = dataclasses.replace(Decoding.exactly(32, engine.model), num_beams=beams)
        prompts = prompts_of(engine.model.vocab_size, count)
        yield timed(lambda: engine.generate(prompts, prefixes, progress=False, **decoding.params()))


@contextlib.contextmanager
def train(shape: str, dtype: str, length: int, count: int) -> Iterator[Unit]:
    """Training steps of ``count`` prefixes, each on two rows of 20 to 80 tokens."""
    import torch

    from prefixfast.bench.random_base import random_prefixes
    from prefixfast.bench.train_contenders import HOW, Workload
    from prefixfast.training.callbacks import Callback
    from prefixfast.training.trainer import train

    class Clock(Callback):
        def on_step(self, step: int, losses: torch.Tensor, grad_norms: torch.Tensor, active: torch.Tensor) -> None:
            times.append(clocks())

    times: list[tuple[float, float]] = []
    with base_of(shape, dtype) as model:
        start = dict(zip(map(str, range(count)), random_prefixes(model, length, count), strict=True))
        rows = {name: Workload(examples=2).rows(int(name), model.vocab_size) for name in start}
        options = {"batch_size": 2, "max_steps": TRAIN_STEPS + 1, "progress": False, "on_error": "raise"}

        def unit() -> tuple[float, float]:
            times.clear()
            train(model, rows, init=start, callbacks=[Clock()], **options, **HOW)
            return times[-1][0] - times[0][0], times[-1][1] - times[0][1]

        yield unit


@contextlib.contextmanager
def load_prefix(shape: str, dtype: str, length: int) -> Iterator[Unit]:
    """Copies of a prefix into the arena by the loader."""
    with engine_of(shape, dtype, length, 1) as (engine, prefixes):
        engine.generate(prompts_of(engine.model.vocab_size, 1), prefixes, max_new_tokens=1, progress=False)
        cache = engine.loop.prefix_cache
        (number,) = cache.prefixes

        def work() -> None:
            for _ in range(LOADS):
                cache.start_loads([(number, 0)])
                (load,) = cache.loader.finished(wait=True)
                assert load.error is None

        yield timed(work)


@contextlib.contextmanager
def load_base(shape: str, dtype: str) -> Iterator[Unit]:
    """Load of a base and its proof."""

    def work() -> None:
        with base_of(shape, dtype):
            pass

    yield timed(work)


@contextlib.contextmanager
def imports(module: str) -> Iterator[Unit]:
    """Import of a module in a new process."""

    def unit() -> tuple[float, float]:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-c", f"import {module}"])
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime, time.perf_counter() - start

    yield unit


KINDS = {f.__name__: f for f in (decode, generate, train, load_prefix, load_base, imports)}


def serve() -> None:
    """Measure what the lines of standard input name, until it ends: a kind and its arguments."""
    with contextlib.ExitStack() as stack:
        name, unit = "", timed(lambda: None)
        for line in sys.stdin:
            if line != name:
                stack.close()
                kind, *arguments = json.loads(line)
                name, unit = line, stack.enter_context(KINDS[kind](*arguments))
                unit()  # warms up
            print(json.dumps(unit()), file=sys.stderr, flush=True)


# ---- comparison ----


def commit_of(tree: Path) -> str:
    """Commit of a source tree."""
    return subprocess.check_output(["git", "-C", tree, "rev-parse", "--short", "HEAD"], text=True).strip()


class Version:
    """Process that measures the version of a source tree."""

    def __init__(self, tree: Path) -> None:
        """Start the process.

        Args:
            tree: Folder of the source tree.
        """
        env = {**os.environ, "PYTHONPATH": str(tree.resolve() / "python")}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve"], env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        """The version itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def measure(self, case: str) -> tuple[float, float]:
        """CPU and wall seconds of one measurement."""
        print(case, file=self.process.stdin, flush=True)
        for line in self.process.stderr:
            with contextlib.suppress(json.JSONDecodeError, TypeError):
                cpu, wall = json.loads(line)
                return cpu, wall
        raise RuntimeError(f"{case}: the process ended")


def cases(model: str) -> Iterator[list[object]]:
    """All kinds with their arguments."""
    yield from (["load_prefix", shape, "float32", length] for shape in ("gpt2", model) for length in (10, 200))
    yield from (["imports", module] for module in ("prefixfast", "prefixfast.engine.engine"))
    yield ["load_base", model, "float32"]
    for dtype in ("float32", "bfloat16"):
        yield from ([kind, model, dtype, 10, beams] for kind in ("decode", "generate") for beams in (1, 4))
        yield ["train", model, dtype, 10, 16]
    for dtype in ("float32", "bfloat16"):
        yield from (["decode", "gpt2", dtype, length, beams] for length in (10, 200) for beams in (1, 4))


def compare(trees: list[Path], case: list[object], restarts: int, rounds: int) -> dict[str, object]:
    """Record of one case: ratios of CPU and wall seconds, after over before, and the milliseconds of both."""
    line, seconds, medians = json.dumps(case), list[list[tuple[float, float]]](), []
    for _ in range(restarts):
        with contextlib.ExitStack() as stack:
            versions = [stack.enter_context(Version(tree)) for tree in trees]
            for version in versions:
                version.measure(line)
            own = [[versions[i].measure(line) for i in (0, 1, 1, 0)] for _ in range(rounds)]
        seconds += own
        medians.append(round(statistics.median(ratios(own, 0)), 4))
    record: dict[str, object] = {"kind": case[0], "arguments": [Path(str(x)).name for x in case[1:]]}
    for clock, name in enumerate(("cpu", "wall")):
        found = sorted(ratios(seconds, clock))
        low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
        spread = {"min": found[0], "q1": low, "median": middle, "q3": high, "max": found[-1]}
        record[f"{name}_ratio"] = {key: round(value, 4) for key, value in spread.items()}
        record[f"{name}_ms"] = [
            round(1e3 * statistics.median(r[i][clock] for r in seconds for i in own), 3) for own in ((0, 3), (1, 2))
        ]
    return record | {"cpu_ratio_by_process": medians}


def ratios(rounds: list[list[tuple[float, float]]], clock: int) -> list[float]:
    """Seconds of a clock after over those before, by round."""
    return [(r[1][clock] + r[2][clock]) / (r[0][clock] + r[3][clock]) for r in rounds]


def main() -> None:
    """Parse the arguments, measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--model", default="nlg-10m", help="folder of a small base")
    parser.add_argument("--restarts", type=int, default=2, help="pairs of processes")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each pair")
    parser.add_argument("--only", default="", help="kind, or its first arguments, as in 'decode gpt2 float32'")
    given = parser.parse_args()
    from prefixfast.bench.harness import write_rows

    trees = [given.before, given.after]
    options = f"--restarts {given.restarts} --rounds {given.rounds} --model {Path(given.model).name}"
    head = {
        "suite": "two_versions",
        "command": f"python benches/system/two_versions.py BEFORE AFTER -o OUT.jsonl {options}",
        "before": commit_of(given.before),
        "after": commit_of(given.after),
    }
    rows = [head]
    for case in cases(given.model):
        if " ".join(map(str, case)).startswith(given.only):
            rows.append(compare(trees, case, given.restarts, given.rounds))
            print(json.dumps(rows[-1]), flush=True)
            write_rows(given.output, rows)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
