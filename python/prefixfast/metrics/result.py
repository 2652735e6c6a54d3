"""`Metrics`, the scores of texts, with the tool that made each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError

Texts: TypeAlias = Sequence[str]
References: TypeAlias = Sequence[Sequence[str]]
Tables: TypeAlias = Sequence[Mapping[str, JSON]]


class MetricUnavailable(ConfigError):
    """Error of a metric whose library, program or weights are missing on this machine."""


@dataclass(frozen=True)
class MetricValue:
    """One score.

    Attributes:
        value: Score in full precision.
        text: Score with the digits that the official script prints.
        tool: Name, version and settings of what computed the score.
    """

    value: float
    text: str
    tool: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Metrics(Mapping[str, float]):
    """Scores of texts by name, a mapping from names to numbers.

    The name of a score of a part of the texts ends with the part, for example ``"BLEU unseen"``.

    Attributes:
        task: Name of the task.
        num_texts: Number of texts.
        values_by_name: Scores with their digits and tools, by name.
        missing: Reasons why a metric of the task has no score, by the metric's name.
    """

    task: str
    num_texts: int
    values_by_name: Mapping[str, MetricValue]
    missing: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.values_by_name[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def table(self) -> str:
        """Scores and missing metrics as lines of text, with the tool or the reason of each."""
        lines = [(name, value.text, value.tool) for name, value in self.values_by_name.items()]
        lines += [(name, "-", reason) for name, reason in self.missing.items()]
        wide = [max((len(line[i]) for line in lines), default=0) for i in range(2)]
        return "\n".join(f"{name:{wide[0]}}  {text:>{wide[1]}}  {tool}" for name, text, tool in lines)

    def to_json(self) -> dict[str, JSON]:
        """Values that JSON holds: ``task``, ``num_texts``, ``scores``, each with its tool, and ``missing``."""
        scores: dict[str, JSON] = {
            n: {"value": v.value, "text": v.text, "tool": v.tool} for n, v in self.values_by_name.items()
        }
        return {"task": self.task, "num_texts": self.num_texts, "scores": scores, "missing": dict(self.missing)}
