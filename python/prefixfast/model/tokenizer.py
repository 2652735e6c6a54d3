"""Tokens of any `tokenizer.json`: a thin face of the Rust core that also knows the model's end, begin and padding tokens."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefixfast import _rust
from prefixfast.errors import ConfigError, DataError

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

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the chat template marks what the assistant says, with ``{% generation %}``."""
        template = getattr(self.hf, "chat_template", None)
        return isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return frozenset(self.hf.all_special_ids)

    @cached_property
    def special_texts(self) -> dict[int, str]:
        """All special tokens, by id."""
        return dict(
            zip(self.special_ids, self.decode([[i] for i in self.special_ids], skip_special_tokens=False), strict=True)
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generation_prompt: bool,
        tools: list[Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as the tokenizer's chat template writes it, special tokens included (encode it without adding any).

        Args:
            messages: Each with ``role`` and ``content``.
            generation_prompt: End with what opens the assistant's turn.
            tools: For the template.
            options: More variables for the template.

        Raises:
            ConfigError: If the tokenizer has no chat template.
            DataError: If the template refuses the conversation.
        """
        return str(self._template(messages, tools, options, tokenize=False, add_generation_prompt=generation_prompt))

    def chat_answers(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: list[Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Ids, NDArray[np.bool_]]:
        """Ids of a whole conversation, and which of them the chat template marks as the assistant's.

        Raises:
            ConfigError: If the tokenizer has no chat template.
            DataError: If the template refuses the conversation.
        """
        found = self._template(
            messages, tools, options, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return np.array(found["input_ids"], np.int32), np.array(found["assistant_masks"], bool)

    def _template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any] | None,
        options: Mapping[str, Any] | None,
        **how: Any,
    ) -> Any:
        if not getattr(self.hf, "chat_template", None):
            msg = "this tokenizer has no chat template: give prompt and completion as strings, or set tokenizer.chat_template"
            raise ConfigError(msg)
        from jinja2 import TemplateError

        try:
            return self.hf.apply_chat_template([dict(m) for m in messages], tools=tools, **dict(options or {}), **how)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as e:
            msg = f"the chat template refuses the conversation: {e}"
            raise DataError(msg) from e

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

    def stream(self) -> _rust.DetokenizeStream:
        """Makes text of one growing sequence of ids, without special tokens."""
        return self.core.stream(skip_special_tokens=True)
