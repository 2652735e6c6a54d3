"""Tokens of mteval-v13a, the script of BLEU and NIST in E2E's evaluation."""

from __future__ import annotations

import re
import string

_ENTITIES = (("<skipped>", ""), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)  # letters outside ASCII keep their case
_RULES = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def mteval_tokens(text: str) -> list[str]:
    """Tokens of a text in lower case.

    Args:
        text: Text. A line break is a space.
    """
    text = " ".join(text.split())
    for entity, char in _ENTITIES:
        text = text.replace(entity, char)
    text = f" {text} ".translate(_LOWER)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text.split()
