"""Slot coverage, omissions and wrong slots: which values of a table a text says, and which of other tables."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from prefixfast.config.json_types import JSON
from prefixfast.metrics.e2e_phrases import PHRASES, YES_NO, said_yes_or_no
from prefixfast.metrics.result import MetricUnavailable, MetricValue, References, Score, Scores, Tables, Texts

SCORES = (
    Score("slot coverage", "0 to 1"),
    Score("omissions", "values per text", "lower"),
    Score("wrong slots", "values per text", "lower"),
)
MR_SLOT = re.compile(r"([^\[\],]+)\[([^\]]*)\]")
WORD = re.compile(r"[^\W_]+|[£$€%]")
Phrase: TypeAlias = tuple[str, ...]
WORDS = "values as whole words, without case, accents and punctuation"
TOOLS = (
    f"share of the tables' values that the texts say; {WORDS}",
    f"mean number of values of its table that a text leaves out; {WORDS}",
    f"mean number of values of other tables that a text says; {WORDS}",
)
PLACEHOLDER = re.compile(r"\[[A-Z_]+\]")  # subject or object of DART that is no value, such as [TABLECONTEXT]


@dataclass(frozen=True)
class Slot:
    """A slot of a table.

    Attributes:
        name: Name in lower case: an attribute of E2E, the relation of a triple, ``subject``, or a key of a table.
        value: Value as words between single spaces.
    """

    name: str
    value: str

    @property
    def phrases(self) -> tuple[Phrase, ...]:
        """Phrases of which one says the value; none for a slot of yes or no."""
        if self.name in YES_NO:
            return ()
        return tuple(tuple(p.split()) for p in (self.value, *PHRASES.get((self.name, self.value), ())))


def slots(outputs: Texts, references: References, tables: Tables | None = None) -> Scores:
    """Share of the tables' values that the texts say, values left out per text, and wrong values per text.

    A wrong value is one of another table of the evaluation, also of another subset, that the text says. It is neither a
    value of the text's own table nor a part of one, and none of the text's references says it. Values without a word of
    three characters are no wrong values, since they are part of other values. The rows of the tables have ``mr``,
    ``triples`` or ``table``.

    Raises:
        MetricUnavailable: If there are no tables, or a table cannot be split into values.
    """
    if tables is None:
        msg = "slots need rows with mr, triples or table as references, and these have none"
        raise MetricUnavailable(msg)
    own = [table_slots(row) for row in tables.rows]
    if not any(own):
        msg = "slots need tables with values, and these are empty"
        raise MetricUnavailable(msg)
    every = [slot for row in tables.all_rows for slot in table_slots(row)]
    others = {p for slot in every for p in slot.phrases if any(len(word) > 2 for word in p)}
    total = said = wrong = 0
    for text, refs, table in zip(outputs, references, own, strict=True):
        total += len(table)
        said += sum(is_said(slot, text) for slot in table)
        wrong += len(wrong_phrases(text, refs, table, others)) + _wrong_yes_no(text, refs, table)
    values = (said / total, (total - said) / len(outputs), wrong / len(outputs))
    found = zip(SCORES, values, TOOLS, strict=True)
    return {score.name: MetricValue(value, f"{value:.4f}", tool) for score, value, tool in found}


def words(text: str) -> list[str]:
    """Words, numbers and signs of currencies, in lower case and without accents."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(c))
    return WORD.findall(plain)


def table_slots(row: Mapping[str, JSON]) -> list[Slot]:
    """Different slots of a table, without empty values and placeholders.

    Args:
        row: Row with ``mr`` (text or pairs), ``triples`` (lists of subject, relation, object) or ``table`` (a mapping
            or pairs).

    Raises:
        MetricUnavailable: If the table has another form, such as the text of ToTTo.
    """
    value = next((row[key] for key in ("mr", "triples", "table") if row.get(key) is not None), None)
    if isinstance(value, str) and MR_SLOT.search(value):
        pairs: Iterable[tuple[JSON, JSON]] = MR_SLOT.findall(value)
    elif isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, Sequence) and not isinstance(value, str) and all(_is_list(item) for item in value):
        pairs = [pair for item in value for pair in _pairs_of(item)]
    else:
        msg = f"slots need tables of values, and this one is {value!r:.80}"
        raise MetricUnavailable(msg)
    found = (
        Slot(" ".join(str(name).casefold().split()), " ".join(words(str(v))))
        for name, v in pairs
        if v is not None and not PLACEHOLDER.fullmatch(str(v))
    )
    return list(dict.fromkeys(slot for slot in found if slot.value))


def _is_list(item: JSON) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, str) and len(item) in (2, 3)


def _pairs_of(item: JSON) -> Iterator[tuple[JSON, JSON]]:
    """The slots of a triple, or of a pair of a name and a value."""
    assert isinstance(item, Sequence)
    if len(item) == 3:
        yield "subject", item[0]
    yield item[-2], item[-1]


def is_said(slot: Slot, text: str) -> bool:
    """Whether a text says the value of a slot."""
    if slot.name in YES_NO:
        return said_yes_or_no(slot.name, words(text)) == (slot.value == "yes")
    said = words(text)
    return any(_place(phrase, said) >= 0 for phrase in slot.phrases)


def wrong_phrases(text: str, references: Sequence[str], table: Sequence[Slot], others: set[Phrase]) -> set[Phrase]:
    """Phrases of other tables in a text that none of its references and no phrase of its own table contains.

    Args:
        text: Text.
        references: References of the text.
        table: Slots of its table.
        others: Phrases of all tables.
    """
    said: list[str] = words(text)
    own = sorted((p for slot in table for p in slot.phrases), key=len, reverse=True)
    for phrase in own:
        while (at := _place(phrase, said)) >= 0:
            said[at : at + len(phrase)] = [""]
    allowed = [*own, *(tuple(words(reference)) for reference in references)]
    found: set[Phrase] = set()
    longest = max(map(len, others), default=0)
    at = 0
    while at < len(said):
        sizes = range(min(longest, len(said) - at), 0, -1)
        size = next((n for n in sizes if tuple(said[at : at + n]) in others), 0)
        phrase = tuple(said[at : at + size])
        if size and not any(_place(phrase, source) >= 0 for source in allowed):
            found.add(phrase)
        at += size or 1
    return found


def _wrong_yes_no(text: str, references: Sequence[str], table: Sequence[Slot]) -> int:
    """Number of slots of yes or no of which the text says what neither table nor a reference does."""
    if not any(slot.name in ("eattype", "familyfriendly", "pricerange") for slot in table):
        return 0  # the phrases are those of E2E
    known = {slot.name: slot.value == "yes" for slot in table}
    wrong = 0
    for name in YES_NO:
        said = said_yes_or_no(name, words(text))
        allowed = [known.get(name), *(said_yes_or_no(name, words(reference)) for reference in references)]
        wrong += said is not None and said not in allowed
    return wrong


def _place(phrase: Phrase, said: Sequence[str]) -> int:
    """First place of a phrase among words, -1 if it is not there."""
    size = len(phrase)
    return next((i for i in range(len(said) - size + 1) if tuple(said[i : i + size]) == phrase), -1)
