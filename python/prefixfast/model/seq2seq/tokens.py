"""`Seq2Seq`, the facts of an encoder-decoder model that rows, requests and generation need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # label of a token without a loss in transformers


@dataclass(frozen=True)
class Seq2Seq:
    """Tokens and positions of an encoder-decoder model.

    Attributes:
        start: Id of the first decoder token, None if the language of a request decides it.
        wraps: Whether the last label is the first decoder token in training, as in mBART and PLBart.
        pad: Id of the padding token.
        vocab_size: Number of rows of the decoder's embedding.
        encoder_positions: Number of positions of the encoder.
        has_distances: Whether positions are distances between tokens (T5), so that there is no first position.
        skips_pads: Whether padding tokens inside a text take no position (M2M100), so that rows cannot have them.
    """

    start: int | None
    wraps: bool
    pad: int
    vocab_size: int
    encoder_positions: int
    has_distances: bool
    skips_pads: bool = False

    def decoder_ids(self, labels: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int32]:
        """Decoder tokens of labels, with the start token before them.

        The model's input is all but the last of them, and the targets are all but the first.

        Args:
            labels: Ids of the target tokens, at least one. -100 becomes the padding token.

        Returns:
            Ids, int32 ``[n + 1]``.
        """
        ids = np.array(labels, np.int32)
        ids[ids == IGNORED] = self.pad
        if self.wraps:
            start = ids[np.count_nonzero(ids != self.pad) - 1]
        else:
            assert self.start is not None
            start = self.start
        return np.concatenate([np.array([start], np.int32), ids])
