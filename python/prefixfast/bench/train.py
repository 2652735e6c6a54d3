"""Throughput of training versus prefix length and number of prefixes at once, against PEFT's usual loop.

Every prefix takes its steps on one batch of rows of its own, of different lengths; the tokens that count are those of the rows, not padding. Both sides start
from the same keys and values and use AdamW, a linear schedule and the same clipping; before a rate is told all losses of the first prefix are compared.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefixfast.bench.contenders import peft_model
from prefixfast.bench.generate import SHAPES, make, random_prefixes
from prefixfast.bench.harness import Timing, cpu_name, environment, version, write_rows
from prefixfast.bench.report import markdown, picture, write_report
from prefixfast.errors import ConfigError
from prefixfast.model.base import DTYPES, Model
from prefixfast.model.load import load
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.trainer import train

OURS, PEFT = "prefixfast", "PEFT, one prefix after another"
RATE = 1e-2
LIMIT = {"float32": 1e-4, "bfloat16": 3e-2}  # relative difference of a step's loss above which no rate is told
Rows = list[dict[str, list[int]]]
V = TypeVar("V")


@dataclass(frozen=True)
class Workload:
    """What one prefix is trained on: ``examples`` rows of ``shortest`` to ``longest`` tokens, the first half of each without loss."""

    examples: int = 10
    shortest: int = 20
    longest: int = 80
    steps: int = 3

    def rows(self, seed: int, vocab_size: int) -> Rows:
        """The rows of prefix number ``seed``."""
        g = torch.Generator().manual_seed(seed)
        sizes = torch.randint(self.shortest, self.longest + 1, (self.examples,), generator=g).tolist()
        ids = [torch.randint(3, vocab_size, (n,), generator=g).tolist() for n in sizes]
        return [{"input_ids": x, "labels": [-100] * (len(x) // 2) + x[len(x) // 2 :]} for x in ids]


class Run(NamedTuple):
    """One timed run: seconds of ``steps`` steps (after a first one that warms up), and every step's loss of the first prefix."""

    seconds: float
    losses: list[float]


@dataclass(frozen=True)
class Point:
    """One measured contender at one prefix length with so many prefixes at once."""

    contender: str
    prefixes: int
    prefix_length: int
    tokens: int
    timing: Timing

    @property
    def rate(self) -> float:
        """Tokens of rows a second, best round."""
        return self.tokens / self.timing.best

    @property
    def label(self) -> str:
        """Its line in tables and pictures."""
        return PEFT if self.contender == PEFT else f"{OURS}, {self.prefixes} at once"

    def row(self) -> dict[str, Any]:
        """For the results file."""
        fields = {
            "contender": self.contender,
            "prefixes": self.prefixes,
            "prefix_length": self.prefix_length,
            "tokens": self.tokens,
        }
        return {
            **fields,
            "seconds": [round(s, 4) for s in self.timing.seconds],
            "tokens_per_second": round(self.rate, 2),
        }


class _Clock:
    """Notes when each step ended, and its losses."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_step(self, step: int, losses: Tensor, grad_norms: Tensor, active: Tensor) -> None:
        """See `prefixfast.training.callbacks.Callback`."""
        self.losses.append(float(losses[0]))
        self.times.append(time.perf_counter())

    def run(self) -> Run:
        """From the end of the first step to the end of the last."""
        return Run(self.times[-1] - self.times[0], self.losses)


def ours(model: Model, rows: Mapping[str, Rows], start: Mapping[str, Prefix], steps: int) -> Run:
    """All prefixes at once by `prefixfast.train`."""
    clock, size = _Clock(), len(next(iter(rows.values())))
    train(
        model,
        dict(rows),
        init=dict(start),
        on_error="raise",
        batch_size=size,
        max_steps=steps + 1,
        learning_rate=RATE,
        progress=False,
        callbacks=[clock],
    )
    return clock.run()


def theirs(plain: PreTrainedModel, rows: Rows, start: Prefix, steps: int) -> Run:
    """One prefix by PEFT's prefix-tuning and the usual loop: right-padded batch (made once), AdamW, clipping, linear schedule; no dropout, as in prefixfast."""
    from transformers import get_linear_schedule_with_warmup

    own, weight = peft_model(plain, start)
    own.eval()
    own.base_model.config.use_cache = False
    width = max(len(r["input_ids"]) for r in rows)
    pad = [width - len(r["input_ids"]) for r in rows]
    batch = {
        "input_ids": torch.tensor([r["input_ids"] + [0] * n for r, n in zip(rows, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - n) + [0] * n for n in pad]),
        "labels": torch.tensor([r["labels"] + [-100] * n for r, n in zip(rows, pad, strict=True)]),
    }
    optimizer = torch.optim.AdamW([weight], lr=RATE, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps + 1)
    clock = _Clock()
    for step in range(steps + 1):
        loss = own(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.on_step(step + 1, loss.detach()[None], norm[None], torch.ones(1, dtype=torch.bool))
    return clock.run()


def check(runs: Mapping[tuple[str, int], Run], length: int, limit: float) -> None:
    """No speed on other losses: the first prefix's losses are the same for everyone.

    Raises:
        RuntimeError: If they differ by more than ``limit`` of a loss.
    """
    (first, expected), *others = ((name, run.losses) for (name, _), run in runs.items())
    for name, losses in others:
        for step, (a, b) in enumerate(zip(expected, losses, strict=True), 1):
            if not abs(a - b) <= limit * abs(a):
                msg = f"P={length}: {name} has loss {b:.6f} at step {step}, {first} {a:.6f}; no speed is reported on different training"
                raise RuntimeError(msg)


def measure(
    model: Model,
    lengths: Sequence[int],
    counts: Sequence[int],
    work: Workload,
    *,
    rounds: int,
    limit: float,
    plain: PreTrainedModel | None,
    progress: bool = True,
) -> list[Point]:
    """All points; contenders of one prefix length alternate. ``plain``: the same base, not attached, for PEFT; None leaves it out.

    Raises:
        RuntimeError: If the losses of the contenders differ.
    """
    points: list[Point] = []
    rows = {f"{i:03}": work.rows(i, model.vocab_size) for i in range(max(counts))}
    tokens = [sum(len(r["input_ids"]) for r in own) for own in rows.values()]
    for length in tqdm(lengths, desc="bench, training", unit="length", disable=not progress):
        start = dict(zip(rows, random_prefixes(model, length, len(rows)), strict=True))
        calls: dict[tuple[str, int], Callable[[], Run]] = {
            (OURS, n): partial(ours, model, _first(rows, n), _first(start, n), work.steps) for n in counts
        }
        if plain is not None and version("peft"):
            calls[PEFT, 1] = partial(theirs, plain, rows["000"], start["000"], work.steps)
        seconds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
        for _ in range(rounds):
            runs = {key: call() for key, call in calls.items()}
            check(runs, length, limit)
            for key, run in runs.items():
                seconds[key].append(run.seconds)
        points += [
            Point(name, n, length, work.steps * sum(tokens[:n]), Timing(tuple(s))) for (name, n), s in seconds.items()
        ]
    return points


def _first(named: Mapping[str, V], count: int) -> dict[str, V]:
    return dict(itertools.islice(named.items(), count))


def table(
    points: Sequence[Point], show: Callable[[Point], str] = lambda p: f"{p.rate:.0f}", corner: str = "tokens/s"
) -> str:
    """A Markdown table: one row a contender, one column a prefix length."""
    lines: dict[str, dict[int, str]] = {}
    for p in points:
        lines.setdefault(p.label, {})[p.prefix_length] = show(p)
    return markdown(lines, sorted({p.prefix_length for p in points}), corner)


def run(
    out: Path,
    *,
    model: str | None,
    shape: str,
    dtype: str,
    lengths: Sequence[int],
    counts: Sequence[int],
    rounds: int,
    command: str,
) -> list[Point]:
    """Measure, print the tables, write ``results.jsonl``, ``throughput.png`` and ``report.html``.

    Raises:
        ConfigError: For a prefix length that the base has no positions for, or no prefixes at all.
    """
    if min(counts) < 1:
        msg = f"prefixes: expected numbers of at least 1, got {list(counts)}"
        raise ConfigError(msg)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype]) if model else make(shape, dtype)
    work, most = Workload(), hf.config.get_text_config().max_position_embeddings
    if min(lengths) < 1 or max(lengths) + work.longest > most:
        msg = f"lengths: expected prefixes of 1 to {most - work.longest} rows (this base has {most} positions, rows take {work.longest}), got {list(lengths)}"
        raise ConfigError(msg)
    plain = copy.deepcopy(hf)
    with load(hf) as base:
        points = measure(base, lengths, counts, work, rounds=rounds, limit=LIMIT[dtype], plain=plain)
    name = model or f"{SHAPES[shape][3]}, random weights"
    head = {
        "suite": "train",
        "model": name,
        "dtype": dtype,
        "examples": work.examples,
        "row_tokens": [work.shortest, work.longest],
        "command": command,
    }
    write_rows(out / "results.jsonl", [head, *(p.row() for p in points)])
    title = f"{work.examples} rows of {work.shortest} to {work.longest} tokens a step and prefix, {name}, {dtype}, {cpu_name()}"
    lines = {
        label: {p.prefix_length: p.rate for p in points if p.label == label}
        for label in dict.fromkeys(p.label for p in points)
    }
    picture(lines, out / "throughput.png", title, "trained tokens per second")
    tables = [(f"trained tokens a second, best of {rounds} rounds", table(points))]
    tables.append(
        ("median over best round", table(points, lambda p: f"{p.timing.median / p.timing.best:.2f}", "spread"))
    )
    for caption, text in tables:
        print(f"\n{caption}\n\n{text}")
    write_report(
        out / "report.html",
        f"Training versus prefix length: {title}",
        tables,
        out / "throughput.png",
        environment(),
        command,
    )
    print(
        f"\n{out / 'results.jsonl'}, {out / 'throughput.png'}, {out / 'report.html'}"
        + ("" if version("peft") else " (pip install peft to compare with it)")
    )
    return points
