"""Suite ``train``: throughput of training by prefix length and number of prefixes at once, against PEFT's usual loop.

Every prefix takes its steps on one batch of its own rows, which differ in length. The counted tokens are those of the
rows, not padding. Both sides start from the same keys and values and use AdamW, a linear schedule and the same
clipping. All losses of the first prefix are compared before a rate is reported, and those of PEFT's LoRA with the
losses of prefixfast's.

A second table is for users, each of whom has a prefix or LoRA of their own: how many are trained in an hour, the memory
that training takes beside the base, and the users whose state fits in the rest of the machine's memory.
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
from prefixfast.bench.peak import total_memory
from prefixfast.bench.random_base import make_or_load, random_prefixes
from prefixfast.bench.report import Report, markdown, plot_rates, print_report, settings_table, write_report
from prefixfast.bench.train_contenders import OF_PREFIXES, Run, Workload, our_lora, ours, peft, peft_lora, settings_of
from prefixfast.config import TrainConfig
from prefixfast.errors import ConfigError
from prefixfast.io.environment import cpu_name, version
from prefixfast.model.load import load
from prefixfast.training.defaults import num_steps

OURS, PEFT, LORA = "prefixfast", "PEFT, one prefix after another", "PEFT LoRA, one user after another"
OUR_LORA = "prefixfast's LoRA"
USER_STEPS = num_steps(TrainConfig(), 1)  # steps of a user whose rows make one batch, by default
STATE = 3 * 4  # bytes of a trained number and its two moments, in fp32
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
        batch_size: Rows of each prefix in a step.
        lora_rank: Rank of the LoRA layers.
        rounds: Number of repetitions.
        command: Command that repeats the measurement.
    """

    model: str | None
    shape: str
    dtype: str
    lengths: Sequence[int]
    counts: Sequence[int]
    batch_size: int = 10
    lora_rank: int = 8
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
        steps: Steps of one round.
        timing: Seconds of each round.
        numbers: Number of trained numbers of a user, in fp32.
        peak: Bytes of the largest peak of memory over the base, None where the system does not tell.
        room: Bytes of the machine's memory without the base, likewise.
    """

    contender: str
    prefixes: int
    prefix_length: int
    tokens: int
    steps: int
    timing: Timing
    numbers: int
    peak: int | None
    room: int | None

    @property
    def rate(self) -> float:
        """Tokens of rows a second in the fastest round."""
        return self.tokens / self.timing.best

    @property
    def label(self) -> str:
        """Name in tables and plots."""
        return f"{OURS}, {self.prefixes} at once" if self.contender == OURS else self.contender

    @property
    def users_per_hour(self) -> float:
        """Users of `USER_STEPS` steps that are trained in an hour."""
        return 3600 * self.prefixes * self.steps / (self.timing.best * USER_STEPS)

    @property
    def state(self) -> int:
        """Bytes of the state of a user in training: parameters and two moments."""
        return STATE * self.numbers

    @property
    def users_that_fit(self) -> int | None:
        """Users whose state fits in the machine's memory beside the base and the peak of training."""
        if self.room is None or self.peak is None:
            return None
        return max(0, self.room - self.peak) // self.state

    def row(self) -> dict[str, Any]:
        """Record of the results file."""
        return {
            "contender": self.contender,
            "prefixes": self.prefixes,
            "prefix_length": self.prefix_length,
            "tokens": self.tokens,
            "seconds": [round(s, 4) for s in self.timing.seconds],
            "tokens_per_second": round(self.rate, 2),
            "users_per_hour": round(self.users_per_hour, 1),
            "peak_bytes": self.peak,
            "state_bytes": self.state,
            "users_that_fit": self.users_that_fit,
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
    has_peft, rank, first = plain is not None and bool(version("peft")), settings.lora_rank, rows["000"]
    total, base_bytes = total_memory(model.device), sum(p.numel() * p.element_size() for p in model.hf.parameters())
    room = None if total is None else total - base_bytes
    reference = our_lora(model, first, work.steps, rank) if has_peft else None
    for length in progress(settings.lengths, "bench, training", "lengths", shown=shown):
        start = dict(zip(rows, random_prefixes(model, length, len(rows)), strict=True))
        calls: dict[tuple[str, int], Callable[[], Run]] = {
            (OURS, n): partial(ours, model, _first(rows, n), _first(start, n), work.steps) for n in counts
        }
        if plain is not None and has_peft:
            calls[PEFT, 1] = partial(peft, plain, first, start["000"], work.steps)
            calls[LORA, 1] = partial(peft_lora, plain, first, work.steps, rank)
        rounds: dict[tuple[str, int], list[Run]] = {key: [] for key in calls}
        for _ in range(settings.rounds):
            runs = {key: call() for key, call in calls.items()}
            lora = {key: run for key, run in runs.items() if key[0] == LORA}
            check_same_losses({k: run for k, run in runs.items() if k not in lora}, length, LIMIT[settings.dtype])
            if reference is not None:
                check_same_losses({(OUR_LORA, 1): reference, **lora}, length, LIMIT[settings.dtype])
            for key, run in runs.items():
                rounds[key].append(run)
        for (name, n), own in rounds.items():
            seconds, peaks = Timing(tuple(r.seconds for r in own)), [r.peak for r in own if r.peak is not None]
            of_run = (work.steps * sum(tokens[:n]), work.steps, seconds, own[0].numbers, max(peaks, default=None), room)
            points.append(Point(name, n, length, *of_run))
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


def users_table(points: Sequence[Point]) -> str:
    """Markdown table of what training takes of users, with a row for each contender and prefix length."""
    names = ("users an hour", "peak over the base", "state of a user", "users that fit")
    lines = [f"| contender | P | {' | '.join(names)} |", "| --- |" + " ---: |" * (1 + len(names))]
    for p in points:
        peak, fit = "unknown" if p.peak is None else f"{p.peak / 1e6:.0f} MB", p.users_that_fit
        length = "" if p.contender == LORA else p.prefix_length
        cells = (f"{p.users_per_hour:.0f}", peak, f"{p.state / 1e6:.3g} MB", "unknown" if fit is None else f"{fit:,}")
        lines.append(f"| {p.label} | {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
    work, positions = Workload(examples=settings.batch_size), hf.config.get_text_config().max_position_embeddings
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
        own = {OURS: settings_of(base, work, OF_PREFIXES), PEFT: settings_of(plain, work, OF_PREFIXES)}
        own[LORA] = settings_of(plain, work, {"r": settings.lora_rank, "lora_alpha": 2 * settings.lora_rank})
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
    tables.append((f"users of {USER_STEPS} steps", users_table(points)))
    tables.append(("settings of the contenders", settings_table(head["settings"].items())))
    report = Report(f"Training versus prefix length: {title}", tables, output / "throughput.png", head["command"])
    write_report(output / "report.html", report)
    print_report(output, report)
