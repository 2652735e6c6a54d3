"""The join of prompt and target, which are tokenized separately: whether the two run together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prefixfast.data.rows import Row
from prefixfast.data.task import Task
from prefixfast.errors import DataError, shown

SAMPLED_ROWS = 256
CONTEXT = 20  # characters on each side of a join that a message shows


@dataclass
class Joins:
    """Joins of rows.

    Attributes:
        rows: Number of rows with a prompt and a target.
        together: Number of rows in which prompt and target run together.
        first: Ends of the prompt and of the target of the first such row.
    """

    rows: int = 0
    together: int = 0
    first: tuple[str, str] = ("", "")

    def add(self, prompt: str, targets: Iterable[str]) -> None:
        """Count a row."""
        self.rows += 1
        wrong = next((t for t in targets if runs_together(prompt, t)), None)
        if wrong is not None:
            self.first = self.first if self.together else (prompt[-CONTEXT:], wrong[:CONTEXT])
            self.together += 1

    def warning(self) -> str:
        """Sentence on the rows in which prompt and target run together, empty if there is none."""
        if not self.together:
            return ""
        return (
            f"prompt and target run together in {self.together} of {self.rows} rows, as {shown(self.first[0])} and "
            f"{shown(self.first[1])}; end the prompt with a separator such as ' ->' or a line break, or begin the "
            "target with a space"
        )


def runs_together(prompt: str, target: str) -> bool:
    """Whether a letter or digit of the target follows one of the prompt."""
    return prompt[-1:].isalnum() and target[:1].isalnum()


def sample_joins(task: Task, rows: Iterable[Sequence[Row]]) -> Joins:
    """Joins of the first rows, up to the first malformed one.

    Args:
        task: Task of the rows.
        rows: Rows of each prefix.
    """
    found = Joins()
    for row in itertools.islice(itertools.chain.from_iterable(rows), SAMPLED_ROWS):
        if not (task.is_tokenized(row) or task.is_chat(row)):
            try:
                ((prompt, targets),) = task.pairs([row], "{eos}")
            except DataError:
                break
            found.add(prompt, targets)
    return found
