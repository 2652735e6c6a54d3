"""The demo: three prefixes for three jobs trained at once on one frozen base, then one batch that mixes them, and what it costs.

Held-out rows hold values that occur in no training row, so a text that names them was copied from its table, not remembered.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prefixfast
from prefixfast.bench.generate import Workload
from prefixfast.data.tasks import table_task
from prefixfast.demo.jobs import JOBS, Job, Row, coverage

EMBEDDED = Path(__file__).parent / "base"
WORDS = "These two notes belong together. First come the facts, then the sentence."
TASK = table_task(prompt=" {src} {eos}", target=" {ref} ", init_text=WORDS)
REAL_TASK = table_task(init_text="Write one sentence with all of the following facts:")


@dataclass(frozen=True)
class Setting:
    """How much the demo does on a base, so that it takes minutes.

    Attributes:
        task: How rows become strings.
        train_rows: Of each job.
        fields: Of `prefixfast.train`.
        heldout_rows: Of each job.
        work: The batch whose throughput is measured.
        lengths: Prefix lengths that it is measured at.
        rounds: How often.
    """

    task: Any
    train_rows: int
    fields: Mapping[str, Any]
    heldout_rows: int
    work: Workload
    lengths: tuple[int, ...]
    rounds: int


SMALL = {"prefix_length": 16, "max_steps": 220, "batch_size": 12, "learning_rate": 5e-2, "warmup_steps": 10}
REAL = {"prefix_length": 10, "max_steps": 60, "batch_size": 8, "learning_rate": 5e-2, "warmup_steps": 5}
SETTINGS = {
    "embedded": Setting(
        TASK, 4000, SMALL, 40, Workload(requests=24, prompt=24, new=24, one_by_one=3), (0, 16, 64, 128, 256), 2
    ),
    "real": Setting(REAL_TASK, 1000, REAL, 12, Workload(requests=16, prompt=24, new=12, one_by_one=1), (0, 64, 256), 1),
}


@dataclass(frozen=True)
class Sample:
    """One held-out row and its three texts."""

    job: Job
    row: Row
    text: str
    wrong: str
    wrong_job: Job
    base: str


@dataclass(frozen=True)
class Report:
    """What the demo found; shares from 0 to 1."""

    samples: list[Sample]
    train_seconds: float
    generate_seconds: float
    tokens: int

    def of(self, job: Job) -> dict[str, float]:
        """The figures of one job."""
        own = [s for s in self.samples if s.job is job]

        def share(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        return {
            "coverage": share([coverage(s.text, s.row["table"]) for s in own]),
            "form": share([job.check(s.text) for s in own]),
            "form with another's prefix": share([job.check(s.wrong) for s in own]),
            "base coverage": share([coverage(s.base, s.row["table"]) for s in own]),
        }

    @property
    def passed(self) -> bool:
        """Whether every job reaches what the demo promises (see `LIMITS`)."""
        return all(
            f[name] >= limit if at_least else f[name] <= limit
            for f in map(self.of, JOBS)
            for name, (limit, at_least) in LIMITS.items()
        )


LIMITS = {
    "coverage": (0.90, True),
    "form": (0.95, True),
    "form with another's prefix": (0.10, False),
    "base coverage": (0.20, False),
}


def train_jobs(base: Any, setting: Setting, folder: Path | None, *, progress: bool | None = None) -> tuple[Any, float]:
    """Train one prefix a job, all in the same batches; returns the run and its seconds."""
    start = time.perf_counter()
    rows = {job.name: job.rows("train", setting.train_rows, seed=0) for job in JOBS}
    run = prefixfast.train(base, rows, task=setting.task, output_dir=folder, progress=progress, **setting.fields)
    return run, time.perf_counter() - start


def generate_all(base: Any, prefixes: Mapping[str, Any], setting: Setting, train_seconds: float) -> Report:
    """One mixed batch: every held-out row with its job's prefix, with another job's, and without any."""
    held = [(job, row) for job in JOBS for row in job.rows("heldout", setting.heldout_rows, seed=1)]
    others = {job.name: JOBS[(i + 1) % len(JOBS)] for i, job in enumerate(JOBS)}
    tokenizer = base.require_tokenizer()
    prompts = setting.task.prompts([row for _, row in held], tokenizer.eos)
    right = [prefixes[job.name] for job, _ in held]
    wrong = [prefixes[others[job.name].name] for job, _ in held]
    start = time.perf_counter()
    out = prefixfast.generate(
        prompts * 3, [*right, *wrong, *[None] * len(held)], model=base, max_new_tokens=60, max_num_seqs=128
    )
    seconds = time.perf_counter() - start
    n = len(held)
    texts = [g.text.strip() for g in out]
    samples = [
        Sample(job, row, texts[i], texts[n + i], others[job.name], texts[2 * n + i])
        for i, (job, row) in enumerate(held)
    ]
    return Report(samples, train_seconds, seconds, sum(g.usage["completion_tokens"] for g in out))
