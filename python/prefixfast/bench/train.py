"""Suite ``train``: throughput of training by prefix length and number of prefixes at once, against PEFT's usual loop.

Every prefix takes its steps on one batch of its own rows, which differ in length. The counted tokens are those of the
rows, not padding. Both sides start from the same keys and values and use AdamW, a linear schedule and the same
clipping. All losses of the first prefix are compared before a rate is reported.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from prefixfast.bench.contenders import Bases
from prefixfast.bench.harness import Timing, WrongResultError, announce, best_of, progress, write_rows
from prefixfast.bench.random_base import make_or_load, random_prefixes
from prefixfast.bench.report import Report, markdown, plot_rates, print_report, settings_table, write_report
from prefixfast.bench.train_contenders import Run, Workload, ours, peft, settings_of
from prefixfast.errors import ConfigError
from prefixfast.io.environment import cpu_name, version
from prefixfast.model.load import load

OURS, PEFT = "prefixfast", "PEFT, one prefix after another"
LIMIT = {"float32": 1e-4, "bfloat16": 3e-2}  # largest relative difference of a step's loss that is still timed
V = TypeVar("V")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the suite.

    Attributes:
        model: Hub id or folder of the base, or None for random weights of ``shape``.
        shape: Name of a random base, a key of `random_base.SHAPES`.
        dtype: Compute dtype, a key of `LIMIT`.
        lengths: Prefix lengths.
        counts: Numbers of prefixes that are trained at once.
        rounds: Number of repetitions.
        command: Command that repeats the measurement.
    """

    model: str | None
    shape: str
    dtype: str
    lengths: Sequence[int]
    counts: Sequence[int]
    rounds: int
    command: str


@dataclass(frozen=True)
class Point:
    """Time of one contender at one prefix length.

    Attributes:
        contender: Name of the contender.
        prefixes: Number of prefixes trained at once.
        prefix_length: Rows of each prefix.
        tokens: Trained tokens of one round.
        timing: Seconds of each round.
    """

    contender: str
    prefixes: int
    prefix_length: int
    tokens: int
    timing: Timing

    @property
    def rate(self) -> float:
        """Tokens of rows a second in the fastest round."""
        return self.tokens / self.timing.best

    @property
    def label(self) -> str:
        """Name in tables and plots."""
        return PEFT if self.contender == PEFT else f"{OURS}, {self.prefixes} at once"

    def row(self) -> dict[str, Any]:
        """Record of the results file."""
        return {
            "contender": self.contender,
            "prefixes": self.prefixes,
            "prefix_length": self.prefix_length,
            "tokens": self.tokens,
            "seconds": [round(s, 4) for s in self.timing.seconds],
            "tokens_per_second": round(self.rate, 2),
        }


def check_same_losses(runs: Mapping[tuple[str, int], Run], length: int, limit: float) -> None:
    """Check that the first prefix has the same losses in all runs.

    Args:
        runs: Runs by contender and number of prefixes. The first one is the reference.
        length: Prefix length, for the message.
        limit: Largest relative difference of a loss.

    Raises:
        WrongResultError: If a loss differs by more.
    """
    (first, expected), *others = ((name, run.losses) for (name, _), run in runs.items())
    for name, losses in others:
        for step, (a, b) in enumerate(zip(expected, losses, strict=True), 1):
            if not abs(a - b) <= limit * abs(a):
                msg = (
                    f"P={length}: {name} has loss {b:.6f} at step {step}, {first} {a:.6f}; "
                    "no speed is reported on different training"
                )
                raise WrongResultError(msg)


def measure(bases: Bases, settings: Settings, work: Workload, *, shown: bool = True) -> list[Point]:
    """Times of all contenders, which alternate at each prefix length.

    Raises:
        WrongResultError: If the losses of two contenders differ.
    """
    points: list[Point] = []
    model, plain, counts = bases.model, bases.plain, settings.counts
    rows = {f"{i:03}": work.rows(i, model.vocab_size) for i in range(max(counts))}
    tokens = [sum(len(r["input_ids"]) for r in own) for own in rows.values()]
    for length in progress(settings.lengths, "bench, training", "lengths", shown=shown):
        start = dict(zip(rows, random_prefixes(model, length, len(rows)), strict=True))
        calls: dict[tuple[str, int], Callable[[], Run]] = {
            (OURS, n): partial(ours, model, _first(rows, n), _first(start, n), work.steps) for n in counts
        }
        if plain is not None and version("peft"):
            calls[PEFT, 1] = partial(peft, plain, rows["000"], start["000"], work.steps)
        seconds: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
        for _ in range(settings.rounds):
            runs = {key: call() for key, call in calls.items()}
            check_same_losses(runs, length, LIMIT[settings.dtype])
            for key, run in runs.items():
                seconds[key].append(run.seconds)
        for (name, n), s in seconds.items():
            points.append(Point(name, n, length, work.steps * sum(tokens[:n]), Timing(tuple(s))))
    return points


def _first(named: Mapping[str, V], count: int) -> dict[str, V]:
    return dict(itertools.islice(named.items(), count))


def table(
    points: Sequence[Point], cell: Callable[[Point], str] = lambda p: f"{p.rate:.0f}", corner: str = "tokens/s"
) -> str:
    """Markdown table with a row for each contender and a column for each prefix length."""
    lines: dict[str, dict[int, str]] = {}
    for p in points:
        lines.setdefault(p.label, {})[p.prefix_length] = cell(p)
    return markdown(lines, sorted({p.prefix_length for p in points}), corner)


def run(output: Path, settings: Settings) -> list[Point]:
    """Measure, print the tables, write ``results.jsonl``, ``throughput.png`` and ``report.html``.

    Raises:
        ConfigError: For a prefix length beyond the positions of the base, or fewer than one prefix.
        WrongResultError: If the losses of two contenders differ.
    """
    if min(settings.counts) < 1:
        msg = f"prefixes: expected numbers of at least 1, got {list(settings.counts)}"
        raise ConfigError(msg)
    hf, name = make_or_load(settings.model, settings.shape, settings.dtype)
    work, positions = Workload(), hf.config.get_text_config().max_position_embeddings
    most = positions - work.longest
    if min(settings.lengths) < 1 or max(settings.lengths) > most:
        msg = (
            f"lengths: expected prefixes of 1 to {most} rows (this base has {positions} positions, rows take "
            f"{work.longest}), got {list(settings.lengths)}"
        )
        raise ConfigError(msg)
    plain = copy.deepcopy(hf)
    announce(hf.dtype, hf.device)
    with load(hf) as base:
        points = measure(Bases(base, plain), settings, work)
        own = {OURS: settings_of(base, work), PEFT: settings_of(plain, work)}
    head = {
        "suite": "train",
        "model": name,
        "dtype": settings.dtype,
        "examples": work.examples,
        "row_tokens": [work.shortest, work.longest],
        "command": settings.command,
        "settings": {name: own[name] for name in dict.fromkeys(p.contender for p in points)},
    }
    write_rows(output / "results.jsonl", [head, *(p.row() for p in points)])
    _show(output, points, head, settings.rounds)
    return points


def _show(output: Path, points: Sequence[Point], head: Mapping[str, Any], rounds: int) -> None:
    """Print the tables and write ``throughput.png`` and ``report.html``."""
    rows = f"{head['examples']} rows of {head['row_tokens'][0]} to {head['row_tokens'][1]} tokens a step and prefix"
    title = f"{rows}, {head['model']}, {head['dtype']}, {cpu_name()}"
    labels = dict.fromkeys(p.label for p in points)
    lines = {label: {p.prefix_length: p.rate for p in points if p.label == label} for label in labels}
    plot_rates(lines, output / "throughput.png", title, "trained tokens per second")
    tables = [(f"trained tokens a second, {best_of(rounds)}", table(points))]
    if rounds > 1:
        spread = table(points, lambda p: f"{p.timing.median / p.timing.best:.2f}", "spread")
        tables.append(("median over best round", spread))
    tables.append(("settings of the contenders", settings_table(head["settings"].items())))
    report = Report(f"Training versus prefix length: {title}", tables, output / "throughput.png", head["command"])
    write_report(output / "report.html", report)
    print_report(output, report)
