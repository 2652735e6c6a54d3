"""`FAMILIES`, the encoder-decoder models that prefixfast computes, by model type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from prefixfast.model.seq2seq.families.bart import BART, M2M100, WRAPPING_BART
from prefixfast.model.seq2seq.families.t5 import T5
from prefixfast.model.seq2seq.family import Family

FAMILIES: Final[Mapping[str, Family]] = {
    **dict.fromkeys(("bart", "pegasus", "marian", "blenderbot", "blenderbot-small"), BART),
    "m2m_100": M2M100,
    **dict.fromkeys(("mbart", "plbart"), WRAPPING_BART),
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
}
