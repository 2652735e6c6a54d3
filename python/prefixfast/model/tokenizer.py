"""`Tokenizer`, the tokenizer of a model with its special tokens and its chat template.

The Rust tokenizer reads a ``tokenizer.json``. A tokenizer of transformers without such a form runs in Python.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prefixfast import _rust
from prefixfast.config.json_types import JSONObject
from prefixfast.errors import ConfigError, DataError, shown
from prefixfast.model.python_tokenizer import PythonTokenizer, TextStream, TokenizerCore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]
SPACE = "\u2581"  # character of a space in the tokens of SentencePiece
SAMPLED_TOKENS = 512  # tokens of the vocabulary that the digest covers
SAMPLE = (
    " The Mill isn't 12,345.67 £ cheap;\n\tnaïve café — Ünïcode: Привет, 世界! 한국어 مرحبا 🙂 "
    "def f(x): return x**2  # ok\r\n"
)


# Libraries by import name that read tokenizers without a tokenizer.json.
CONVERTERS = {"sentencepiece": "sentencepiece", "tiktoken": "tiktoken", "google.protobuf": "protobuf"}
FILES = ("*.model", "*.tiktoken", "tokenizer*", "vocab*", "merges.txt", "tekken.json")


def read_tokenizer(name: str | Path, **how: Any) -> PreTrainedTokenizerBase:
    """Hugging Face tokenizer of a model.

    Args:
        name: Hub id or local folder.
        how: Arguments of ``AutoTokenizer.from_pretrained``.

    Raises:
        ConfigError: If it cannot be loaded, with the libraries that are missing.
    """
    from transformers import AutoTokenizer

    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **how)
    except Exception as e:  # transformers and the converters raise many kinds of errors
        folder, told = Path(name), " ".join(str(e).split())
        missing = [pip for library, pip in CONVERTERS.items() if not _is_installed(library)]
        if folder.is_dir() and not any(path for pattern in FILES for path in folder.glob(pattern)):
            reason = "the folder has no tokenizer; save one there, or give load(model, tokenizer=...)"
        elif missing and any(word in told.lower() for word in ("sentencepiece", "tiktoken", "protobuf")):
            reason = (
                f"there is no tokenizer.json, and other formats need further libraries; pip install "
                f"{' '.join(missing)} ({told})"
            )
        else:
            reason = told
        msg = f"model: the tokenizer of {shown(str(name))} cannot be loaded: {reason}"
        raise ConfigError(msg) from e
    return found


def _is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


@dataclass(frozen=True)
class Tokenizer:
    """Batch tokenizer over a Hugging Face tokenizer.

    Attributes:
        hf: Hugging Face tokenizer, for its chat template and its settings.
        core: Rust tokenizer, or one in Python for a tokenizer without a ``tokenizer.json`` form.
    """

    hf: PreTrainedTokenizerBase
    core: TokenizerCore

    @classmethod
    def from_hf(cls, tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
        """Wrap a Hugging Face tokenizer.

        Args:
            tokenizer: Hugging Face tokenizer. One without a ``tokenizer.json`` form is slower.

        Raises:
            ConfigError: If it is no tokenizer of transformers.
        """
        from transformers import PreTrainedTokenizerBase

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None and isinstance(tokenizer, PreTrainedTokenizerBase):
            return cls(tokenizer, PythonTokenizer(tokenizer))
        if backend is None:
            got = type(tokenizer).__name__
            msg = f"tokenizer: expected a tokenizer of transformers, got {got}; load it with AutoTokenizer"
            raise ConfigError(msg)
        return cls(tokenizer, _rust.Tokenizer(backend.to_str()))

    @property
    def eos_id(self) -> int | None:
        """Id of the end token, None if there is none."""
        return self.hf.eos_token_id

    @property
    def eos(self) -> str | None:
        """Text of the end token, None if there is none."""
        return self.hf.eos_token

    @cached_property
    def digest_text(self) -> str:
        """Text that identifies the tokenizer: size, end token, a sample of tokens, and the ids of a sample text.

        Unlike the file's content, these do not depend on the version of the library that wrote the file.
        """
        size = len(self.hf)
        sampled = self.hf.convert_ids_to_tokens(list(range(0, size, max(1, size // SAMPLED_TOKENS))))
        return json.dumps([size, self.eos_id, sampled, self.encode([SAMPLE])[0].tolist()])

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the chat template marks the assistant's tokens with ``{% generation %}``."""
        template = getattr(self.hf, "chat_template", None)
        return isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return frozenset(self.hf.all_special_ids)

    @cached_property
    def special_texts(self) -> dict[int, str]:
        """Texts of all special tokens by id."""
        return dict(
            zip(self.special_ids, self.decode([[i] for i in self.special_ids], skip_special_tokens=False), strict=True)
        )

    def chat(
        self,
        messages: Sequence[JSONObject],
        *,
        generation_prompt: bool,
        tools: list[JSONObject] | None = None,
        options: JSONObject | None = None,
    ) -> str:
        """Text of a conversation by the chat template, special tokens included.

        To encode the text, add no further special tokens.

        Args:
            messages: Messages with ``role`` and ``content``.
            generation_prompt: Whether the text ends with the start of the assistant's turn.
            tools: Descriptions of tools for the template.
            options: Further variables for the template.

        Raises:
            ConfigError: If the tokenizer has no chat template.
            DataError: If the template fails on the conversation.
        """
        return str(self._template(messages, tools, options, tokenize=False, add_generation_prompt=generation_prompt))

    def chat_answers(
        self,
        messages: Sequence[JSONObject],
        *,
        tools: list[JSONObject] | None = None,
        options: JSONObject | None = None,
    ) -> tuple[Ids, NDArray[np.bool_]]:
        """Token ids of a whole conversation, and the mask of the assistant's tokens from the chat template.

        Args:
            messages: Messages with ``role`` and ``content``.
            tools: Descriptions of tools for the template.
            options: Further variables for the template.

        Returns:
            Token ids int32 ``[N]`` and mask bool ``[N]``.

        Raises:
            ConfigError: If the tokenizer has no chat template.
            DataError: If the template fails on the conversation.
        """
        found = self._template(
            messages, tools, options, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return np.array(found["input_ids"], np.int32), np.array(found["assistant_masks"], bool)

    def _template(
        self,
        messages: Sequence[JSONObject],
        tools: list[JSONObject] | None,
        options: JSONObject | None,
        **how: bool,
    ) -> Any:
        if not getattr(self.hf, "chat_template", None):
            msg = (
                "this tokenizer has no chat template: give prompt and completion as strings, or set "
                "tokenizer.chat_template"
            )
            raise ConfigError(msg)
        from jinja2 import TemplateError

        try:
            return self.hf.apply_chat_template([dict(m) for m in messages], tools=tools, **dict(options or {}), **how)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as e:
            msg = f"the chat template refuses the conversation: {e}"
            raise DataError(msg) from e

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[Ids]:
        """Token ids of texts; special tokens written in a text become their ids.

        Args:
            texts: Texts.
            add_special_tokens: Whether to add the tokenizer's special tokens, such as a begin token.

        Returns:
            Token ids int32 of each text, as views of one array.
        """
        if add_special_tokens and self._has_languages and len(texts):
            return [np.array(ids, np.int32) for ids in self.hf(list(texts)).input_ids]
        ids, indptr = self.core.encode_batch(texts, add_special_tokens=add_special_tokens)
        return [ids[a:b] for a, b in itertools.pairwise(indptr)]

    def encode_labels(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of texts that a decoder writes behind its start token, with the tokenizer's special tokens.

        Args:
            texts: Texts.
        """
        if self._has_languages and len(texts):
            return [np.array(ids, np.int32) for ids in self.hf(text_target=list(texts)).input_ids]
        return self.encode(texts)

    @cached_property
    def _has_languages(self) -> bool:
        """Whether the special tokens depend on languages that the user sets, and differ in texts and in targets."""
        return hasattr(self.hf, "_switch_to_target_mode")

    def encode_targets(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of texts that follow a prompt, without special tokens.

        A tokenizer like that of Llama 2 writes a space before every text. It takes the place of a space that the text
        begins with, so that one space follows the prompt.

        Args:
            texts: Texts.
        """
        if self._adds_second_space:
            texts = [text[1:] if text.startswith(" ") and len(text) > 1 else text for text in texts]
        return self.encode(texts, add_special_tokens=False)

    @cached_property
    def _adds_second_space(self) -> bool:
        """Whether the tokenizer writes a space also before a text that begins with one."""
        plain, spaced = (ids.tolist() for ids in self.encode(["a", " a"], add_special_tokens=False))
        first = self.hf.convert_ids_to_tokens(plain[:1])
        return first[:1] != [] and str(first[0]).startswith(SPACE) and plain != spaced

    def decode(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """Texts of sequences of token ids.

        Args:
            sequences: Token ids of each text.
            skip_special_tokens: Whether to leave special tokens out.
        """
        indptr = np.cumsum([0, *(len(s) for s in sequences)], dtype=np.int32)
        flat = np.fromiter((t for s in sequences for t in s), dtype=np.int32, count=int(indptr[-1]))
        return self.core.decode_batch(flat, indptr, skip_special_tokens=skip_special_tokens)

    def stream(self) -> TextStream:
        """Decoder of one growing sequence of token ids, without special tokens."""
        return self.core.stream(skip_special_tokens=True)
