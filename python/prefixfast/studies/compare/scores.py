"""Scores of the texts of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prefixfast.data.formats import FORMATS
from prefixfast.metrics.evaluate import evaluate
from prefixfast.metrics.result import Metrics
from prefixfast.metrics.tasks import TASK_METRICS
from prefixfast.studies.compare.rows import StudyRows
from prefixfast.studies.compare.study import Study

TABLE_KEYS = (*FORMATS["table"].inputs, "subset")  # of a row, read by metrics


def score_texts(study: Study, rows: StudyRows, texts: Sequence[str]) -> Metrics:
    """Scores of one text for each request. Tasks without an official script have the metrics of ``"table"``.

    Args:
        study: Settings of the comparison, with the names of the metrics.
        rows: Rows of the comparison.
        texts: Texts.

    Raises:
        ConfigError: If a named metric is unknown, or cannot be computed on this machine.
    """
    references: list[Any] = list(rows.references)
    if rows.task.format == "table":  # rows with their tables, of which some metrics read the slots
        tables = [{k: row[k] for k in TABLE_KEYS if row.get(k) is not None} for row in rows.requests]
        references = [{**table, "refs": refs} for table, refs in zip(tables, rows.references, strict=True)]
    task = rows.task.name if rows.task.name in TASK_METRICS else "table"
    return evaluate(texts, references, task=task, metrics=study.metrics)


def check_metrics(study: Study, rows: StudyRows) -> None:
    """Raise `ConfigError` if a named metric is unknown or cannot be computed here, before anything is trained.

    Args:
        study: Settings of the comparison.
        rows: Rows of the comparison.
    """
    if study.metrics is not None:
        first = replace(rows, requests=rows.requests[:1], references=rows.references[:1])
        score_texts(study, first, first.references[0][:1])
