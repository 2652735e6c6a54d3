"""`Metrics`, the scores of texts, with the tool that made each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError

Texts: TypeAlias = Sequence[str]
References: TypeAlias = Sequence[Sequence[str]]
Better: TypeAlias = Literal["higher", "lower"]
ARROWS: dict[Better | None, str] = {"higher": "↑", "lower": "↓", None: ""}


class MetricUnavailable(ConfigError):
    """Error of a metric whose library, program or weights are missing, or of texts that have no such score."""


@dataclass(frozen=True)
class MetricValue:
    """One score.

    Attributes:
        value: Score in full precision.
        text: Score with the digits that the official script prints.
        tool: Name, version and settings of what computed the score.
        better: Better side of the score, None if it has none, such as a length.
    """

    value: float
    text: str
    tool: str
    better: Better | None = None

    def __str__(self) -> str:
        return self.text


Scores: TypeAlias = dict[str, MetricValue]  # by name


@dataclass(frozen=True)
class Tables:
    """Tables that texts describe.

    Attributes:
        rows: Rows with ``mr``, ``triples`` or ``table``, one for each text.
        all_rows: Rows of all texts of the evaluation, of which ``rows`` can be those of a subset.
    """

    rows: Sequence[Mapping[str, JSON]]
    all_rows: Sequence[Mapping[str, JSON]]

    def of(self, places: Sequence[int]) -> Tables:
        """Tables of some of the texts.

        Args:
            places: Numbers of the texts, from 0.
        """
        return Tables([self.rows[i] for i in places], self.all_rows)


class MetricFunction(Protocol):
    """Function that computes the scores of a metric."""

    def __call__(self, outputs: Texts, references: References, tables: Tables | None = None, /) -> Scores:
        """Scores of texts.

        Args:
            outputs: Texts.
            references: References of each text, at least one.
            tables: Tables that the texts describe, None without tables. Metrics that compare texts do not read them.

        Raises:
            MetricUnavailable: If the machine lacks what the metric needs, or the texts have no score.
        """
        ...


@dataclass(frozen=True)
class Score:
    """Description of a score.

    Attributes:
        name: Name without a subset.
        unit: Unit, or smallest and largest value.
        better: Better side, None if the score has none.
    """

    name: str
    unit: str
    better: Better | None = "higher"


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
        """Scores and missing metrics as lines of text, with the better side as an arrow, and the tool or the reason."""
        lines = [(n, v.text, ARROWS[v.better], v.tool) for n, v in self.values_by_name.items()]
        lines += [(name, "-", "", reason) for name, reason in self.missing.items()]
        wide = [max((len(line[i]) for line in lines), default=0) for i in range(2)]
        return "\n".join(f"{n:{wide[0]}}  {text:>{wide[1]}} {arrow:1}  {tool}" for n, text, arrow, tool in lines)

    def to_json(self) -> dict[str, JSON]:
        """Values that JSON holds: ``task``, ``num_texts``, ``scores``, each with tool and better side, ``missing``."""
        scores: dict[str, JSON] = {
            n: {"value": v.value, "text": v.text, "tool": v.tool, "better": v.better}
            for n, v in self.values_by_name.items()
        }
        return {"task": self.task, "num_texts": self.num_texts, "scores": scores, "missing": dict(self.missing)}
