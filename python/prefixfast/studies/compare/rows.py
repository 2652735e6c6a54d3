"""Rows of a comparison, and the held-out inputs with all references of each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefixfast.data.chat import split_conversation
from prefixfast.data.row_values import references
from prefixfast.data.rows import Row
from prefixfast.data.task import Task
from prefixfast.errors import DataError
from prefixfast.studies.compare.study import Study, digest
from prefixfast.training.held_out import choose_held_out
from prefixfast.training.inputs import SINGLE_NAME
from prefixfast.training.job import JobArguments, prepare

SPLIT_SEED = 0  # of the choice of rows, the same for all runs


@dataclass(frozen=True)
class StudyRows:
    """Rows of a comparison.

    Attributes:
        task: Task of the rows.
        train: Training rows.
        held_out: Held-out rows, whose loss is measured.
        requests: One row for each distinct held-out input, without its target.
        references: References of each request. Equal ones are kept, since official scripts count each.
    """

    task: Task
    train: list[Row]
    held_out: list[Row]
    requests: list[Row]
    references: list[list[str]]

    def digest(self) -> str:
        """Hex digest of what the task reads of the rows."""
        own = [[_input(self.task, r, i), targets(self.task, r, i)] for i, r in enumerate(self.train)]
        held = [[_input(self.task, r, i), targets(self.task, r, i)] for i, r in enumerate(self.held_out)]
        return digest([self.task.spec(), own, held])


def read_study_rows(study: Study) -> StudyRows:
    """Read the rows of a comparison. The choice of rows is the same in every process.

    Args:
        study: Settings of the comparison.

    Raises:
        ConfigError: If options do not fit each other.
        DataError: If rows cannot be read, have no input, or are too few.
    """
    job = prepare(JobArguments(study.data, eval_data=study.eval_data, **study.reading))
    task, rows = job.task, job.rows.rows[SINGLE_NAME]
    _check_task(task, rows)
    if job.rows.eval_rows is None:
        chosen = choose_held_out([_input(task, r, i) for i, r in enumerate(rows)], study.eval_fraction, SPLIT_SEED)
        if not chosen:
            msg = f"--eval-fraction {study.eval_fraction:g} of {len(rows)} rows holds out no input; give --eval-data"
            raise DataError(msg)
        held_out = [rows[i] for i in sorted(chosen)]
        rows = [r for i, r in enumerate(rows) if i not in chosen]
    else:
        held_out = job.rows.eval_rows[SINGLE_NAME]
        _check_task(task, held_out)
    by_input: dict[str, list[int]] = {}
    for i, row in enumerate(held_out):
        by_input.setdefault(_input(task, row, i), []).append(i)
    kept = _sample(list(by_input.values()), study.max_inputs)
    requests = [_request(task, held_out[group[0]]) for group in kept]
    refs = [[t for i in group for t in targets(task, held_out[i], i)] for group in kept]
    evaluated = [held_out[i] for i in sorted(i for group in kept for i in group)]
    return StudyRows(task, _sample(rows, study.max_rows), evaluated, requests, refs)


def targets(task: Task, row: Row, number: int) -> list[str]:
    """References of a row, without what the task's template adds.

    Args:
        task: Task of the row.
        row: Row.
        number: Number of the row, for errors.
    """
    if task.is_chat(row):
        return ["\n".join(str(m.get("content") or "") for m in split_conversation(row, number)[1])]
    if task.format == "table":
        return references(row, number)
    return [task.clean(target) for target in task.targets(row, number)]


def _sample(items: list[Any], most: int | None) -> list[Any]:
    """At most so many of the items, drawn at random, in their order."""
    if most is None or most >= len(items):
        return items
    return [items[i] for i in sorted(random.Random(SPLIT_SEED).sample(range(len(items)), most))]


def _check_task(task: Task, rows: Sequence[Row]) -> None:
    """Raise `DataError` for rows without an input of their own, since nothing can be generated for them."""
    for row in rows:
        if task.format == "text" or task.is_tokenized(row):
            got = "text alone" if task.format == "text" else "token ids"
            msg = f"compare: expected rows with an input and a target, got {got}"
            raise DataError(msg)


def _input(task: Task, row: Row, number: int) -> str:
    """Text that the model reads of a row before its target, as far as no tokenizer is needed."""
    return digest(split_conversation(row, number)[0]) if task.is_chat(row) else task.prompts([row], "{eos}")[0]


def _request(task: Task, row: Row) -> Row:
    """A row without the answer that a request must not have. Other targets are not read."""
    if not task.is_chat(row) or row.get("prompt") is not None:
        return row
    kept = {k: v for k, v in row.items() if k not in ("messages", "conversations", "system")}
    return {**kept, "messages": list(split_conversation(row, 0)[0])}
