"""Forms that the official scripts bring texts into before they compare them, and the checks that they leave out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from prefixfast.errors import ConfigError
from prefixfast.metrics.ascii_form import ascii_form

NUM_REFERENCES = 3  # references of a text that the scripts of WebNLG 2017 and DART read


class Forms(NamedTuple):
    """Texts in the form of a script.

    Attributes:
        outputs: Outputs.
        references: References of each output.
    """

    outputs: list[str]
    references: list[list[str]]


def check_texts(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Check that there are texts, and that each has references.

    Args:
        outputs: Outputs, one text each.
        references: References of each output.

    Raises:
        ConfigError: If the numbers differ, if there is no text, or if a text has no reference.
    """
    if len(outputs) != len(references):
        msg = f"expected references of each text, got {len(outputs)} texts and {len(references)} lists of references"
        raise ConfigError(msg)
    if not outputs:
        msg = "expected at least one text to score, got none"
        raise ConfigError(msg)
    for number, (output, own) in enumerate(zip(outputs, references, strict=True), 1):
        if not _is_text(output):
            msg = f"text {number}: expected a str, got {type(output).__name__}"
            raise ConfigError(msg)
        if _is_text(own) or not own or not all(map(_is_text, own)):
            msg = f"text {number}: expected a list of at least one reference, each a str, got {own!r:.80}"
            raise ConfigError(msg)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def dart_forms(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Forms:
    """Texts in the form of the reference files of DART's script, with the first three references of each.

    The script compares its input as it is. Its reference files hold the references of DART v1.1.1 split at each
    character that is no letter, digit or underscore, then in lower case.

    Args:
        outputs: Outputs.
        references: References of each output.
    """
    check_texts(outputs, references)
    return Forms(
        [_split(o).lower() for o in outputs], [[_split(r).lower() for r in own[:NUM_REFERENCES]] for own in references]
    )


def webnlg_forms(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> Forms:
    """Texts in the form of WebNLG's script of 2017, with the first three references of each.

    The script turns outputs into ASCII before it splits them, and references after, so that the degree sign of
    ``5°`` is a part of its word in an output alone.

    Args:
        outputs: Outputs.
        references: References of each output.

    Raises:
        MetricUnavailable: If a character needs Unidecode, which is not installed.
    """
    check_texts(outputs, references)
    return Forms(
        [_split(ascii_form(o.strip()).lower()) for o in outputs],
        [[ascii_form(_split(r).lower()) for r in own[:NUM_REFERENCES]] for own in references],
    )


def _split(text: str) -> str:
    """Text with single spaces around each character that is no letter, digit or underscore."""
    return " ".join(" ".join(re.split(r"(\W)", text)).split())
