"""ASCII form of a text as Unidecode 1.4.0 writes it, which WebNLG's script applies to outputs and references."""
# ruff: noqa: RUF001 - the table is of ambiguous characters

from __future__ import annotations

import importlib
import unicodedata
from functools import cache

from prefixfast.metrics.result import MetricUnavailable

# Signs, and letters that are no base letter with a mark, each before its form.
_PAIRS = """
¡ ! ¢ C/ £ PS ¤ $? ¥ Y= ¦ | § SS ¨ " © (c) « << ¬ ! ® (r) ¯ - ° deg ± +- ´ ' µ u ¶ P · * ¸ , » >> ¿ ? × x ÷ /
Æ AE æ ae Ð D ð d Ø O ø o Þ Th þ th ß ss Đ D đ d Ħ H ħ h ı i ĸ k Ŀ L ŀ l Ł L ł l ŉ 'n Ŋ NG ŋ ng Œ OE œ oe Ŧ T ŧ t
‐ - ‑ - ‒ - – - — -- ― -- ‘ ' ’ ' ‚ , “ " ” " „ ,, † + ‡ ++ • * … ... ′ ' ″ '' ‹ < › > € EUR → - ™ (tm)
"""
_FORMS = dict(zip(_PAIRS.split()[::2], _PAIRS.split()[1::2], strict=True))
_FORMS |= {"¼": " 1/4", "½": " 1/2", "¾": " 3/4", "\N{MINUS SIGN}": "-"}
_FORMS |= {"\N{THIN SPACE}": " ", "\N{NARROW NO-BREAK SPACE}": " ", "\N{ZERO WIDTH SPACE}": " "}
# The replacement character stands for half a character, with which a generated text can end.
_FORMS |= dict.fromkeys(("\N{SOFT HYPHEN}", "\N{ZERO WIDTH NO-BREAK SPACE}", "\N{REPLACEMENT CHARACTER}"), "")
_LATIN = (range(0xA0, 0x250), range(0x300, 0x363), range(0x1E00, 0x1E9B), range(0x1EA0, 0x1F00))


def ascii_form(text: str) -> str:
    """The text with each character in ASCII.

    Args:
        text: Text.

    Raises:
        MetricUnavailable: If a character needs Unidecode, which is not installed.
    """
    return text if text.isascii() else "".join(map(_form, text))


@cache
def _form(char: str) -> str:
    if char.isascii():
        return char
    if char in _FORMS:
        return _FORMS[char]
    if any(ord(char) in block for block in _LATIN):
        base = "".join(c for c in unicodedata.normalize("NFKD", char) if not unicodedata.combining(c))
        if base.isascii():
            return base
    try:
        library = importlib.import_module("unidecode")
    except ImportError as e:
        msg = f"the ASCII form of {char!r} (U+{ord(char):04X}) needs Unidecode: pip install Unidecode"
        raise MetricUnavailable(msg) from e
    return str(library.unidecode(char))
