"""`Family`, the code and the facts that a kind of encoder-decoder model needs beside the common ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from prefixfast.model.seq2seq.site_modules import SiteModule

UNBOUNDED = 2**31 - 1  # number of positions of a model whose positions are distances


Undo = list[Callable[[], None]]


@dataclass(frozen=True)
class Family:
    """Kind of encoder-decoder models.

    Attributes:
        hook: Function that makes a model compute the positions of packed sequences. It gets the model, its tagged
            attention modules and a list, to which it appends a function for each change that undoes it. It returns a
            function that reads again what it made of the weights.
        positions: Function that gives the number of positions of the encoder or of the decoder.
        has_distances: Whether positions are distances between tokens.
        wraps: Whether the last label is the first decoder token in training.
        skips_pads: Whether padding tokens inside a text take no position.
    """

    hook: Callable[[PreTrainedModel, Sequence[SiteModule], Undo], Callable[[], None]]
    positions: Callable[[Any], int]
    has_distances: bool = False
    wraps: bool = False
    skips_pads: bool = False
