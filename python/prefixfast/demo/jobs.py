"""Jobs of the demo: a restaurant's description, an invitation to a friend, an announcement of an event.

Each job has its own table, its own kind of sentence and a check of the sentence's form, which does not depend on the
values. Held-out rows are drawn from held-out values, which neither the base's text nor any training row contains.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import TypedDict

from prefixfast.demo.corpus import draw_scene, expand
from prefixfast.demo.values import Split
from prefixfast.errors import ConfigError


class Row(TypedDict):
    """Row of a job: a table, and a sentence with its values."""

    table: dict[str, str]
    ref: str


@dataclass(frozen=True)
class Job:
    """One job that a prefix learns.

    Attributes:
        name: Name of the job.
        about: Description in a few words.
        scene: Scene of the corpus that gives the table.
        form: Regular expression of a sentence of this job, for any values.
        patterns: Patterns of the reference sentences, in the grammar of `prefixfast.demo.corpus`.
    """

    name: str
    about: str
    scene: str
    form: str
    patterns: tuple[str, ...]

    def rows(self, split: Split, n: int, seed: int) -> list[Row]:
        """``n`` different rows of one side of the split, the same ones for the same seed.

        Args:
            split: Side of the split that the values are drawn from.
            n: Number of rows.
            seed: Seed of the rows.

        Raises:
            ConfigError: If ``n`` is negative.
        """
        if n < 0:
            msg = f"expected a number of rows of at least 0, got {n}"
            raise ConfigError(msg)
        rng = Random(f"{self.name} {split} {seed}")
        seen: dict[tuple[str, ...], Row] = {}
        while len(seen) < n:
            table = draw_scene(rng, self.scene, split)
            row = Row(table=table, ref=expand(rng, rng.choice(self.patterns), table))
            if len(set(table.values())) == len(table):  # a name of two keys would count twice in `coverage`
                seen.setdefault(tuple(table.values()), row)
        return list(seen.values())

    def has_form(self, text: str) -> bool:
        """Whether ``text`` has this job's form."""
        return re.fullmatch(self.form, text.strip()) is not None


JOBS: tuple[Job, ...] = (
    Job(
        name="describe",
        about="a restaurant's table becomes a sentence of a travel guide",
        scene="eatery",
        form=r"[A-Z][^.?!\"]*\.",
        patterns=(
            (
                "{name} is a (cosy/quiet/lively/friendly) (restaurant/inn) in {town}, near {near}, with {cook} "
                "as its cook."
            ),
            (
                "In {town}, near {near}, there is {name}, a (cosy/quiet/lively/friendly) (restaurant/inn) where "
                "{cook} is the cook."
            ),
        ),
    ),
    Job(
        name="invite",
        about="a plan for a trip becomes a question to the friend",
        scene="trip",
        form=r"\"[A-Z][^.?!\"]*\?\"",
        patterns=(
            '"{friend}, (would you like to come/will you come) from {from} to {place} with me and our guide, {guide}?"',
            '"Are you free, {friend}, to travel from {from} to {place} with {guide}?"',
        ),
    ),
    Job(
        name="announce",
        about="an event's table becomes a call to everyone",
        scene="event",
        form=r"(Attention|Good news|Last call|Listen), (everyone|neighbours|friends|all), [^.?!\"]*!",
        patterns=(
            "(Attention/Good news), (everyone/neighbours), {host} opens the {fair} Fair at {hall} Hall with {guest}!",
            (
                "(Attention/Good news), (everyone/neighbours), come to {hall} Hall and meet {guest} at the "
                "{fair} Fair with {host}!"
            ),
        ),
    ),
)


def coverage(text: str, table: Mapping[str, str]) -> float:
    """Share of the table's values that ``text`` contains, in any letter case."""
    found = [value.lower() in text.lower() for value in table.values()]
    return sum(found) / len(found) if found else 1.0
