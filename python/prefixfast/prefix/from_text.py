"""A text as a prefix: tokens of a text, of token ids or of a chat, and their keys and values in the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from prefixfast.errors import ConfigError
from prefixfast.model.base import Model
from prefixfast.model.shared_base import borrowed
from prefixfast.model.text_kv import text_kv
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.kv import context
from prefixfast.prefix.record import PrefixData


def text_prefix(
    model: Any, text: Any, length: int | None, after: Sequence[PrefixData]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and fields of `Prefix.from_text`; its arguments and errors.

    Args:
        model: The base, as `load` takes it.
        text: A string, token ids or chat messages.
        length: P, None for all tokens.
        after: Prefixes before the text, left to right.
    """
    if length is not None and (type(length) is not int or length < 1):
        msg = f"prefix_length: expected a number of at least 1 or None, got {length!r}"
        raise ConfigError(msg)
    with borrowed(model) as base:
        for i, prefix in enumerate(after):
            if not hasattr(prefix, "kv"):
                msg = f"after: expected a Prefix or a sequence of them, got {prefix!r:.80} at {i}"
                raise ConfigError(msg)
            check_fits(base, prefix, f"after: prefix {i}")
        ids = token_ids(base, text)
        rows = length or len(ids)
        start = max((p.pos_start for p in after), default=0)
        if start + rows >= base.max_positions:
            msg = f"text: {rows} rows after position {start} leave no room in the base's {base.max_positions} positions; give a smaller prefix_length"
            raise ConfigError(msg)
        kv = text_kv(base, ids, rows, *context(after, base))
        training: dict[str, Any] = {"text_tokens": len(ids), "num_trained": 0}
        if after:
            training["after"] = [p.digest for p in after]
        tensors = {f"self.{i}.{x}": t.cpu() for i, pair in enumerate(kv) for x, t in zip("kv", pair, strict=True)}
        return tensors, {"pos_start": start + rows, "base": base.fingerprint, "training": training}


def token_ids(model: Model, text: Any) -> list[int]:
    """Tokens of a string, of token ids as they are, or of chat messages.

    Raises:
        ConfigError: For anything else, or no tokens.
    """
    if isinstance(text, str):
        ids = model.require_tokenizer().encode([text])[0].tolist()
    elif isinstance(text, Sequence) and text and all(isinstance(m, Mapping) for m in text):
        ids = _chat_ids(model, text)
    elif isinstance(text, Sequence) and all(type(t) is int and 0 <= t < model.vocab_size for t in text):
        ids = list(text)
    else:
        msg = f"text: expected a string, token ids from 0 to {model.vocab_size - 1}, or messages {{'role', 'content'}}, got {text!r:.80}"
        raise ConfigError(msg)
    if not ids:
        msg = f"text: expected at least one token, got {text!r:.80}"
        raise ConfigError(msg)
    return ids


def _chat_ids(model: Model, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or "content" not in message:
            msg = f"text: message {i}: expected 'role' and 'content', got the keys {sorted(map(str, message))}"
            raise ConfigError(msg)
    tokenizer = model.require_tokenizer()
    if not getattr(tokenizer.hf, "chat_template", None):
        msg = "text: this tokenizer has no chat template; give a string, or load(model, tokenizer=...) one that has"
        raise ConfigError(msg)
    try:
        rendered = tokenizer.hf.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=False
        )
    except Exception as e:  # a template is a program; what it raises is its own
        msg = f"text: the chat template refuses these messages: {e}"
        raise ConfigError(msg) from e
    ids: list[int] = tokenizer.encode([rendered], add_special_tokens=False)[0].tolist()
    return ids
