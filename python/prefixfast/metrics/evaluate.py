"""`evaluate`, which scores outputs against references with the metrics of their task."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError, check_choice, shown, suggestion
from prefixfast.metrics.registry import METRICS, TASK_METRICS, Metric
from prefixfast.metrics.result import Metrics, MetricUnavailable, MetricValue
from prefixfast.metrics.texts import Output, Reference, check_pairs, read_outputs, read_references, tables_of

if TYPE_CHECKING:
    from prefixfast.engine.request import Generation


def evaluate(
    outputs: str | Path | Iterable[str | Generation | Mapping[str, JSON]],
    references: str | Path | Iterable[str | Sequence[str] | Mapping[str, JSON] | Path],
    *,
    task: str,
    metrics: Sequence[str] | None = None,
    split: Literal["train", "dev", "test"] | None = None,
) -> Metrics:
    """Score outputs with the metrics of a task, which are equal to those of its official script.

    Outputs and references are matched by position. Where both have an ``id`` or an input, these are compared.

    Args:
        outputs: Texts, results of `generate`, or rows with the output under ``text``. A path of a ``.jsonl``, ``.csv``
            or other file of rows is read as rows, and a path of any other file as one text a line.
        references: Path of the task's official file, of a file of rows, or of a text file with one reference a line
            or, as for E2E's script, with an empty line between the references of two texts. Or `Path` objects of
            several text files with one line for each text, rows with ``ref``, ``refs`` or ``summary``, one text for
            each output, or one list of texts for each output.
        task: Name of the task, for example ``"e2e"``.
        metrics: Names of metrics or of scores, for example ``["BLEU", "slots"]``. None computes all metrics of the
            task, and lists those that this machine cannot compute in `Metrics.missing`.
        split: Split of the official file. None reads its rows as those of the test split, and does not compare their
            number with the official one.

    Returns:
        Scores by name. Where each row of the references has a ``subset``, such as ``"seen"`` and ``"unseen"`` in
        WebNLG, the scores of each subset have its name at their end, and those of all texts have none.

    Raises:
        ConfigError: If the task or a metric is unknown, or a named metric cannot be computed on this machine.
        DataError: If a file or row is malformed, if there are not as many outputs as groups of references, or if the
            id or input of an output differs from that of its references.

    Example:
        >>> scores = evaluate(["the cat sat"], [["the cat sat", "a cat sat"]], task="e2e", metrics=["lengths"])
        >>> scores["length"], scores.values_by_name["length"].text
        (3.0, '3.00')
    """
    check_choice("task", task, TASK_METRICS)
    chosen = _chosen(task, metrics)
    texts = read_outputs(outputs)
    groups = read_references(references, task, split)
    check_pairs(texts, groups)
    tables = tables_of(r.row for r in groups) or tables_of(o.row for o in texts)
    values: dict[str, MetricValue] = {}
    missing: dict[str, str] = {}
    for metric, names in chosen.items():
        try:
            values |= _scores(METRICS[metric], names, texts, groups, tables)
        except MetricUnavailable as e:
            if metrics is not None:
                raise
            missing |= dict.fromkeys(names, str(e))
    return Metrics(task, len(texts), values, missing)


def _scores(
    metric: Metric,
    names: Sequence[str],
    texts: Sequence[Output],
    groups: Sequence[Reference],
    tables: Sequence[Mapping[str, JSON]] | None,
) -> dict[str, MetricValue]:
    """Scores of each subset, and of all texts."""
    values: dict[str, MetricValue] = {}
    for subset, places in _subsets(groups).items():
        scores = metric.function(
            [texts[i].text for i in places],
            [groups[i].texts for i in places],
            None if tables is None else [tables[i] for i in places],
        )
        values |= {
            f"{s.name} {subset}".rstrip(): replace(scores[s.name], better=s.better)
            for s in metric.scores
            if s.name in names
        }
    return values


def _subsets(groups: Sequence[Reference]) -> dict[str, list[int]]:
    """Places of the texts of each subset by its name, and of all texts under an empty name, which comes last."""
    marks = [group.row.get("subset") for group in groups]
    named = sorted({m for m in marks if isinstance(m, str)}) if all(isinstance(m, str) for m in marks) else []
    return {name: [i for i, m in enumerate(marks) if m == name] for name in named} | {"": list(range(len(groups)))}


def _chosen(task: str, metrics: Sequence[str] | None) -> dict[str, list[str]]:
    """Names of the wanted scores of each metric, by the metric's name."""
    if metrics is None:
        return {name: list(METRICS[name].names) for name in TASK_METRICS[task]}
    if isinstance(metrics, str | os.PathLike) or not isinstance(metrics, Iterable) or not metrics:
        msg = f"metrics: expected a list of at least one name, got {shown(metrics)}"
        raise ConfigError(msg)
    found: dict[str, list[str]] = {}
    for name in metrics:
        metric, score = _named(task, name)
        wanted = found.setdefault(metric, [])
        wanted += [s for s in (METRICS[metric].names if score is None else (score,)) if s not in wanted]
    return found


def _named(task: str, name: object) -> tuple[str, str | None]:
    """The metric of a name, and the score that is named (None for all scores of the metric).

    The task's own metrics come first, since scripts differ in what they call BLEU, then the case of the letters counts.
    """
    own = TASK_METRICS[task]
    low = name.lower() if isinstance(name, str) else ""
    found: list[list[tuple[str, str | None]]] = [
        [(m, None) for m in own if m == name],
        [(m, s) for m in own for s in METRICS[m].names if s.lower() == low],
        [(m, None) for m in METRICS if m == name],
        [(m, s) for m in METRICS for s in METRICS[m].names if s == name],
        [(m, None) for m in METRICS if m == low],
        [(m, s) for m in METRICS for s in METRICS[m].names if s.lower() == low],
    ]
    if single := [pairs[0] for pairs in found if len(pairs) == 1]:
        return single[0]
    if found[-1]:
        several = " and ".join(m for m, _ in found[-1])
        msg = f"metrics: expected the name of one metric, got {shown(name)}, a score of {several}"
        raise ConfigError(msg)
    known = [*own, *(s for m in own for s in METRICS[m].names)]
    msg = f"metrics: expected names of metrics or scores, got {shown(name)}; {suggestion(name, known, listed=30)}"
    raise ConfigError(msg)
