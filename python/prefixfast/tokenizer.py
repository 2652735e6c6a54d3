"""Tokens of any `tokenizer.json`: a thin face of the Rust core that also knows the model's end, begin and padding tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefixfast import _rust
from prefixfast.errors import ConfigError

Ids = NDArray[np.int32]
SAMPLED_TOKENS = 512
SAMPLE = " The Mill isn't 12,345.67 £ cheap;\n\tnaïve café — Ünïcode: Привет, 世界! 한국어 مرحبا 🙂 def f(x): return x**2  # ok\r\n"


@dataclass(frozen=True)
class Tokenizer:
    """Batch tokenizer over a Hugging Face tokenizer.

    Attributes:
        hf: The Hugging Face tokenizer (for its chat template and its settings).
        core: The Rust tokenizer.
    """

    hf: Any
    core: _rust.Tokenizer

    @classmethod
    def from_hf(cls, tokenizer: Any) -> Tokenizer:
        """Wrap a fast Hugging Face tokenizer.

        Raises:
            ConfigError: If it has no `tokenizer.json` form.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            msg = f"tokenizer: expected a fast tokenizer (one with a tokenizer.json), got {type(tokenizer).__name__}; load it with AutoTokenizer"
            raise ConfigError(msg)
        return cls(tokenizer, _rust.Tokenizer(backend.to_str()))

    @property
    def eos_id(self) -> int | None:
        """Id of the end token, None if the tokenizer has none."""
        return self.hf.eos_token_id

    @property
    def eos(self) -> str | None:
        """Text of the end token."""
        return self.hf.eos_token

    @cached_property
    def digest_text(self) -> str:
        """What tells this tokenizer from others, whatever version wrote its file: size, end token, some of its tokens, and how it cuts a text of many kinds."""
        size = len(self.hf)
        sampled = self.hf.convert_ids_to_tokens(list(range(0, size, max(1, size // SAMPLED_TOKENS))))
        return json.dumps([size, self.eos_id, sampled, self.encode([SAMPLE])[0].tolist()])

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[Ids]:
        """Ids of each text, int32, views of one ragged array; special tokens written in a text count as such.

        Args:
            texts: Any number of strings.
            add_special_tokens: Add what the tokenizer adds to a text of its own (a begin token, for some).
        """
        ids, indptr = self.core.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [ids[a:b] for a, b in itertools.pairwise(indptr)]

    def decode(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """Text of each sequence of ids."""
        indptr = np.cumsum([0, *(len(s) for s in sequences)], dtype=np.int32)
        flat = np.fromiter((t for s in sequences for t in s), dtype=np.int32, count=int(indptr[-1]))
        return self.core.decode_batch(flat, indptr, skip_special_tokens=skip_special_tokens)
