"""`evaluate`, which scores outputs against references with the metrics of their task."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError, check_choice, shown, suggestion
from prefixfast.metrics.outputs import read_outputs
from prefixfast.metrics.pairs import check_pairs, tables_of
from prefixfast.metrics.references import Reference, read_references
from prefixfast.metrics.registry import METRICS, Metric
from prefixfast.metrics.result import Metrics, MetricUnavailable, MetricValue, Scores, Tables
from prefixfast.metrics.tasks import TASK_METRICS

if TYPE_CHECKING:
    from prefixfast.engine.request import Generation

logger = logging.getLogger(__name__)
MOST_SUBSETS = 20  # each is scored by every metric, of which some start a program


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
        WebNLG, the scores of each subset have its name at their end, and those of all texts have none. More than 20
        subsets have no scores of their own.

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
    rows = tables_of(r.row for r in groups) or tables_of(o.row for o in texts)
    every = _Texts([o.text for o in texts], [r.texts for r in groups], None if rows is None else Tables(rows, rows))
    subsets = {name: every.of(places) for name, places in _subsets(groups).items()}
    values: dict[str, MetricValue] = {}
    missing: dict[str, str] = {}
    for metric, names in chosen.items():
        try:
            whole = every.scores(METRICS[metric])
        except MetricUnavailable as e:
            if metrics is not None:
                raise
            missing |= dict.fromkeys(names, str(e))
            continue
        for subset, own in subsets.items():
            try:
                values |= {
                    f"{name} {subset}": score for name, score in own.scores(METRICS[metric]).items() if name in names
                }
            except MetricUnavailable as e:  # such as references without words in this subset
                missing |= {f"{name} {subset}": str(e) for name in names}
        values |= {name: score for name, score in whole.items() if name in names}
    return Metrics(task, len(texts), values, missing)


class _Texts(NamedTuple):
    """Outputs with their references and tables."""

    outputs: list[str]
    references: list[list[str]]
    tables: Tables | None

    def of(self, places: Sequence[int]) -> _Texts:
        """Some of the texts, by their numbers."""
        tables = None if self.tables is None else self.tables.of(places)
        return _Texts([self.outputs[i] for i in places], [self.references[i] for i in places], tables)

    def scores(self, metric: Metric) -> Scores:
        """Scores of a metric with their better sides."""
        found = metric.function(*self)
        return {score.name: replace(found[score.name], better=score.better) for score in metric.scores}


def _subsets(groups: Sequence[Reference]) -> dict[str, list[int]]:
    """Places of the texts of each subset by its name; none if a text has no subset, or if there are many."""
    marks = [group.row.get("subset") for group in groups]
    names = sorted({mark for mark in marks if isinstance(mark, str)})
    if not all(isinstance(mark, str) for mark in marks):
        return {}
    if len(names) > MOST_SUBSETS:
        logger.warning("rows have %d subsets; scores of subsets are computed for at most %d", len(names), MOST_SUBSETS)
        return {}
    return {name: [i for i, mark in enumerate(marks) if mark == name] for name in names}


def _chosen(task: str, metrics: Sequence[str] | None) -> dict[str, list[str]]:
    """Names of the wanted scores of each metric, by the metric's name."""
    if metrics is None:
        return {name: list(METRICS[name].names) for name in TASK_METRICS[task]}
    is_list = isinstance(metrics, Iterable) and not isinstance(metrics, str | os.PathLike)
    wanted_names = list(metrics) if is_list else []
    if not wanted_names:
        msg = f"metrics: expected a list of at least one name, got {shown(metrics)}"
        raise ConfigError(msg)
    found: dict[str, list[str]] = {}
    for name in wanted_names:
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
