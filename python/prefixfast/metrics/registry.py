"""Tables of all metrics, and of the metrics of each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from prefixfast.config.json_types import JSON
from prefixfast.metrics.result import MetricValue

Texts: TypeAlias = Sequence[str]
References: TypeAlias = Sequence[Sequence[str]]
Tables: TypeAlias = Sequence[Mapping[str, JSON]]
MetricFunction: TypeAlias = Callable[[Texts, References, Tables | None], dict[str, MetricValue]]


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: Name of the metric, a key of `METRICS`.
        function: Function of the texts, the references of each text, and the rows of the tables that the texts
            describe (None without tables). It returns scores by name, and raises `MetricUnavailable` if this machine
            lacks what it needs.
        title: Description with the official script whose numbers the metric gives.
        scores: Names of the scores of ``function``.
    """

    name: str
    function: MetricFunction
    title: str
    scores: tuple[str, ...]


ALL: tuple[Metric, ...] = ()
METRICS: dict[str, Metric] = {metric.name: metric for metric in ALL}

# Metrics of each task, by the task's name, in the order of its official table.
TASK_METRICS: dict[str, tuple[str, ...]] = {
    "e2e": ("bleu", "nist", "meteor", "rouge_l", "cider", "slots", "lengths"),
    "webnlg": ("multi_bleu_lc", "meteor_webnlg", "ter", "chrf", "slots", "lengths"),
    "dart": ("multi_bleu", "meteor_dart", "ter", "moverscore", "bertscore", "bleurt", "slots", "lengths"),
    "totto": ("bleu_totto", "ter", "chrf", "lengths"),
    **dict.fromkeys(("xsum", "cnn_dailymail", "samsum", "dialogsum", "summary"), ("rouge", "lengths")),
    "table": ("bleu", "chrf", "slots", "lengths"),
}
