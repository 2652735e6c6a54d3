"""`Example`, a training row as token ids."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefixfast.data.encode.token_ids import Ints


class Example(NamedTuple):
    """One tokenized training example.

    Attributes:
        ids: Token ids, int32. For an encoder-decoder base model they are those of the decoder: the start token and the
            labels, with padding where a label is -100.
        targets: Indices of the target tokens in ``ids``, int64, ascending, at least 1.
        row: Number of the row.
        has_no_prompt: Whether the targets begin with the row's first tokens, so that truncation removes the end of the
            example instead of the start of its prompt.
        encoder_ids: Token ids of the source, which the encoder reads, int32, at least one; None for a decoder-only base
            model.
    """

    ids: Ints
    targets: NDArray[np.int64]
    row: int
    has_no_prompt: bool = False
    encoder_ids: Ints | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens, those of the source included."""
        return len(self.ids) + (0 if self.encoder_ids is None else len(self.encoder_ids))

    @property
    def has_one_target(self) -> bool:
        """Whether the target tokens follow each other."""
        return int(self.targets[-1] - self.targets[0]) == len(self.targets) - 1
