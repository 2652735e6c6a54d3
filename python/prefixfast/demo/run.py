"""Training, generation and measurement of the demo: prefixes on one frozen base, used in one mixed batch.

Held-out rows have values that occur in no training row, so a text that names them copied them from its table.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import prefixfast
from prefixfast.bench.contenders import Bases
from prefixfast.bench.generate import Workload, measure
from prefixfast.bench.generate_points import Point
from prefixfast.bench.random_base import load_plain
from prefixfast.data import table_task
from prefixfast.demo.jobs import JOBS, Job, Row, coverage

INIT_TEXT = "These two notes belong together. First come the facts, then the sentence."
TASK = table_task(prompt=" {src} {eos}", target=" {ref} ", init_text=INIT_TEXT)
SEQ2SEQ_TASK = table_task(prompt="{src}", init_text=INIT_TEXT)
REAL_TASK = table_task(init_text="Write one sentence with all of the following facts:")


Limits = Mapping[str, tuple[float, bool]]  # limit of each figure; whether it is the least, or else the largest value
LIMITS: Limits = {
    "coverage": (0.90, True),
    "form": (0.95, True),
    "form with another's prefix": (0.10, False),
    "base coverage": (0.20, False),
}
# The encoder-decoder base writes notes of its own kinds about the table, so that its values say nothing.
SEQ2SEQ_LIMITS: Limits = {name: limit for name, limit in LIMITS.items() if name != "base coverage"}
SEQ2SEQ_LIMITS = {**SEQ2SEQ_LIMITS, "base form": (0.50, False)}


@dataclass(frozen=True)
class Setting:
    """Amounts of training, generation and measurement, so that the demo takes minutes.

    Attributes:
        task: Task that turns rows into strings.
        train_rows: Number of training rows of each job.
        fields: Options of `prefixfast.train`.
        heldout_rows: Number of held-out rows of each job.
        work: Batch whose throughput is measured, None for no measurement.
        lengths: Prefix lengths of the measurement.
        rounds: Number of repetitions of the measurement.
        jobs: Jobs, each with a prefix of its own.
        decoding: Options of `prefixfast.generate`.
        limits: Limits of the figures on the base of the package.
    """

    task: Any
    train_rows: int
    fields: Mapping[str, Any]
    heldout_rows: int
    work: Workload | None = None
    lengths: tuple[int, ...] = ()
    rounds: int = 1
    jobs: tuple[Job, ...] = JOBS
    decoding: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=lambda: LIMITS)


SMALL = {"prefix_length": 16, "max_steps": 220, "batch_size": 12, "learning_rate": 5e-2, "warmup_steps": 10}
REAL = {"prefix_length": 10, "max_steps": 60, "batch_size": 8, "learning_rate": 5e-2, "warmup_steps": 5}
# Amounts by the base, that of the package or another one, and whether it is an encoder-decoder model.
SETTINGS = {
    ("embedded", False): Setting(
        TASK, 4000, SMALL, 40, Workload(requests=24, prompt=24, new=24, one_by_one=3), (0, 16, 64, 128, 256), 2
    ),
    ("real", False): Setting(
        REAL_TASK, 1000, REAL, 12, Workload(requests=16, prompt=24, new=12, one_by_one=1), (0, 64, 256), 1
    ),
    ("embedded", True): Setting(
        SEQ2SEQ_TASK, 4000, SMALL, 40, jobs=JOBS[:2], decoding={"num_beams": 4}, limits=SEQ2SEQ_LIMITS
    ),
    ("real", True): Setting(REAL_TASK, 1000, REAL, 12, jobs=JOBS[:2], decoding={"num_beams": 4}),
}


@dataclass(frozen=True)
class Sample:
    """One held-out row and its three texts.

    Attributes:
        job: Job of the row.
        row: The row.
        text: Text with the job's prefix.
        wrong: Text with the prefix of ``wrong_job``.
        wrong_job: Another job.
        base: Text without a prefix.
    """

    job: Job
    row: Row
    text: str
    wrong: str
    wrong_job: Job
    base: str


@dataclass(frozen=True)
class Report:
    """Texts and times of the demo.

    Attributes:
        samples: Texts of all held-out rows.
        train_seconds: Seconds of training.
        generate_seconds: Seconds of the mixed batch.
        tokens: Generated tokens of the mixed batch.
        limits: Limits of the figures.
        prompt_tokens: Mean number of tokens of a table.
    """

    samples: list[Sample]
    train_seconds: float
    generate_seconds: float
    tokens: int
    limits: Limits
    prompt_tokens: float

    def of(self, job: Job) -> dict[str, float]:
        """Figures of one job, shares from 0 to 1."""
        own = [s for s in self.samples if s.job is job]

        def share(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        return {
            "coverage": share([coverage(s.text, s.row["table"]) for s in own]),
            "form": share([job.has_form(s.text) for s in own]),
            "form with another's prefix": share([job.has_form(s.wrong) for s in own]),
            "base coverage": share([coverage(s.base, s.row["table"]) for s in own]),
            "base form": share([job.has_form(s.base) for s in own]),
        }

    @property
    def jobs(self) -> list[Job]:
        """Jobs of the samples, in their order."""
        return list({s.job.name: s.job for s in self.samples}.values())

    @property
    def passed(self) -> bool:
        """Whether the figures of every job are within the limits."""
        return all(
            f[name] >= limit if at_least else f[name] <= limit
            for f in map(self.of, self.jobs)
            for name, (limit, at_least) in self.limits.items()
        )


def train_jobs(base: Any, setting: Setting, folder: Path | None, *, progress: bool | None = None) -> tuple[Any, float]:
    """Train one prefix for each job, all in the same batches.

    Args:
        base: Attached base.
        setting: Amounts of training.
        folder: Folder for the prefixes, in which those of an earlier demo are replaced; None for none.
        progress: Whether to show a progress bar; None shows one on a terminal.

    Returns:
        The run, and its seconds.
    """
    start = time.perf_counter()
    rows: dict[str, Any] = {job.name: job.rows("train", setting.train_rows, seed=0) for job in setting.jobs}
    place: dict[str, Any] = {"output_dir": folder, "overwrite": folder is not None}  # a second demo replaces the first
    run = prefixfast.train(base, rows, task=setting.task, progress=progress, **place, **setting.fields)
    return run, time.perf_counter() - start


def generate_all(base: Any, prefixes: Mapping[str, Any], setting: Setting, train_seconds: float) -> Report:
    """Generate one mixed batch: every held-out row with its job's prefix, with another job's, and without a prefix."""
    jobs = setting.jobs
    held = [(job, row) for job in jobs for row in job.rows("heldout", setting.heldout_rows, seed=1)]
    others = {job.name: jobs[(i + 1) % len(jobs)] for i, job in enumerate(jobs)}
    tokenizer = base.require_tokenizer()
    prompts = setting.task.prompts([row for _, row in held], tokenizer.eos)
    right = [prefixes[job.name] for job, _ in held]
    wrong = [prefixes[others[job.name].name] for job, _ in held]
    start = time.perf_counter()
    chosen = [*right, *wrong, *[None] * len(held)]
    how = {"max_new_tokens": 60, **setting.decoding}
    out = prefixfast.generate(prompts * 3, chosen, model=base, max_num_seqs=128, **how)
    seconds = time.perf_counter() - start
    n = len(held)
    texts = [g.text.strip() for g in out]
    samples = [
        Sample(job, row, texts[i], texts[n + i], others[job.name], texts[2 * n + i])
        for i, (job, row) in enumerate(held)
    ]
    counts = {name: sum(g.usage[name] for g in out) for name in ("completion_tokens", "prompt_tokens")}
    mean = counts["prompt_tokens"] / len(out)
    return Report(samples, train_seconds, seconds, counts["completion_tokens"], setting.limits, mean)


def measure_throughput(model: str, setting: Setting, work: Workload) -> list[Point]:
    """Throughput of generation by prefix length on a base, with PEFT beside it if it is installed."""
    plain = load_plain(model, "float32").eval() if find_spec("peft") else None
    with prefixfast.load(load_plain(model, "float32")) as base:
        return measure(Bases(base, plain), setting.lengths, (1, work.requests), work, rounds=setting.rounds)
