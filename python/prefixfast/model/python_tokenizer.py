"""`PythonTokenizer`, the calls of the Rust tokenizer for tokenizers of transformers without a ``tokenizer.json``.

Those of Marian, M2M100, PLBart and Blenderbot-small are such.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextStream(Protocol):
    """Decoder of one growing sequence of token ids, as `_rust.DetokenizeStream`."""

    def push(self, ids: Sequence[int]) -> str:
        """Append ids; returns text that later ids cannot change."""

    def finish(self) -> str:
        """Rest of the text, after which the decoder starts a new sequence."""


class TokenizerCore(Protocol):
    """Batch tokenizer, as `_rust.Tokenizer`."""

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Token ids of texts, int32 ``[N]``, and the offset of each text, int32 ``[n + 1]``."""

    def decode_batch(
        self, ids: NDArray[np.int32], indptr: NDArray[np.int32], *, skip_special_tokens: bool
    ) -> list[str]:
        """Texts of a ragged array of token ids."""

    def stream(self, *, skip_special_tokens: bool) -> TextStream:
        """Decoder of one growing sequence."""


@dataclass(frozen=True)
class PythonTokenizer:
    """Batch tokenizer over a Hugging Face tokenizer in Python.

    Attributes:
        hf: Hugging Face tokenizer.
    """

    hf: PreTrainedTokenizerBase

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Token ids of texts, as a ragged array.

        Args:
            texts: Texts, any number.
            add_special_tokens: Whether to add the tokenizer's special tokens.

        Returns:
            ``ids`` int32 ``[N]`` and ``indptr`` int32 ``[n + 1]``.

        Raises:
            UnicodeEncodeError: If a text has half a surrogate pair.
        """
        for text in texts:
            text.encode()
        found = self.hf(list(texts), add_special_tokens=add_special_tokens).input_ids if texts else []
        indptr = np.cumsum([0, *map(len, found)], dtype=np.int32)
        return np.fromiter(itertools.chain.from_iterable(found), np.int32, int(indptr[-1])), indptr

    def decode_batch(
        self, ids: NDArray[np.int32], indptr: NDArray[np.int32], *, skip_special_tokens: bool
    ) -> list[str]:
        """Texts of a ragged array of token ids.

        Args:
            ids: Token ids, int32 ``[N]``. Ids beyond the vocabulary give no text.
            indptr: Start of each text in ``ids``, int32 ``[n + 1]``.
            skip_special_tokens: Whether to leave special tokens out.
        """
        how, size = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}, len(self.hf)
        texts = [ids[a:b] for a, b in itertools.pairwise(indptr)]
        return [str(self.hf.decode(text[text < size].tolist(), **how)) for text in texts]

    def stream(self, *, skip_special_tokens: bool) -> PythonStream:
        """Decoder of one growing sequence.

        Args:
            skip_special_tokens: Whether to leave special tokens out.
        """
        return PythonStream(self, skip_special_tokens)


@dataclass
class PythonStream:
    """Decoder of one growing sequence, which returns whole words.

    Attributes:
        tokenizer: Tokenizer.
        skip_special_tokens: Whether to leave special tokens out.
        ids: Ids so far.
        returned: Number of characters that were returned.
    """

    tokenizer: PythonTokenizer
    skip_special_tokens: bool
    ids: list[int] = field(default_factory=list)
    returned: int = 0

    def push(self, ids: Sequence[int]) -> str:
        """Append ids; returns text up to the last word, which later ids can change.

        Args:
            ids: Next ids, any number.
        """
        self.ids += ids
        text = self._text()
        return self._next(text[: max(text.rfind(" "), self.returned)])

    def finish(self) -> str:
        """Rest of the text, after which the decoder starts a new sequence."""
        rest = self._next(self._text())
        self.ids, self.returned = [], 0
        return rest

    def _text(self) -> str:
        ids = np.array(self.ids, np.int32)
        ends = np.array([0, len(ids)], np.int32)
        return self.tokenizer.decode_batch(ids, ends, skip_special_tokens=self.skip_special_tokens)[0]

    def _next(self, text: str) -> str:
        start, self.returned = self.returned, len(text)
        return text[start:]
