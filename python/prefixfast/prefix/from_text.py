"""A text as a prefix: tokens of a text, of token ids or of a chat, and their keys and values in the base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from prefixfast.data.encode import encode_text
from prefixfast.errors import ConfigError
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
        ids = encode_text(base, text)
        rows = length or len(ids)
        start = max((p.pos_start for p in after), default=0)
        if start + rows >= base.max_positions:
            msg = f"text: {rows} rows after position {start} leave no room in the base's {base.max_positions} positions; give a smaller prefix_length"
            raise ConfigError(msg)
        kv = text_kv(base, ids.tolist(), rows, *context(after, base))
        training: dict[str, Any] = {"text_tokens": len(ids), "num_trained": 0}
        if after:
            training["after"] = [p.digest for p in after]
        tensors = {f"self.{i}.{x}": t.cpu() for i, pair in enumerate(kv) for x, t in zip("kv", pair, strict=True)}
        return tensors, {"pos_start": start + rows, "base": base.fingerprint, "training": training}
