"""A prefix from a text: the keys and values of the text's tokens in the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.config.json_types import JSON
from prefixfast.data.encode import encode_text
from prefixfast.errors import ConfigError, shown
from prefixfast.model.base import Model
from prefixfast.model.prefix_shape import own_layers
from prefixfast.model.shared_base import borrowed
from prefixfast.model.text_kv import text_kv
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.kv import context
from prefixfast.prefix.names import PrefixFields
from prefixfast.prefix.record import PrefixData


def text_prefix(
    model: str | Path | PreTrainedModel | Model,
    text: str | Sequence[int] | Sequence[Mapping[str, JSON]],
    length: int | None,
    after: Sequence[PrefixData],
) -> tuple[dict[str, Tensor], PrefixFields]:
    """Tensors and fields of `Prefix.from_text`.

    Args:
        model: Base model, as `load` takes it.
        text: String, token ids or chat messages.
        length: Number of rows P, None for all tokens of the text.
        after: Prefixes before the text, from left to right.

    Raises:
        ConfigError: If the text or the length is wrong, or the base model has too few positions.
        BaseMismatchError: If a prefix of ``after`` was made for another base model.
    """
    if length is not None and (type(length) is not int or length < 1):
        msg = f"prefix_length: expected a number of at least 1 or None, got {shown(length)}"
        raise ConfigError(msg)
    with borrowed(model) as base:
        if not isinstance(after, list | tuple):
            msg = f"after: expected a Prefix or a sequence of them, got {shown(after)}"
            raise ConfigError(msg)
        for i, prefix in enumerate(after):
            if not hasattr(prefix, "kv"):
                msg = f"after: expected a Prefix or a sequence of them, got {shown(prefix)} at {i}"
                raise ConfigError(msg)
            check_fits(base, prefix, f"after: prefix {i}")
            if prefix.position == "infix":
                msg = f"after: expected prefixes before the first token, got an infix at {i}, which no prefix follows"
                raise ConfigError(msg)
        ids = encode_text(base, text)
        rows = length or len(ids)
        start = max((p.pos_start for p in after), default=0)
        if start + rows >= base.max_positions:
            msg = (
                f"text: {shown(rows)} rows after position {start} leave no room in the base's {base.max_positions} "
                "positions; give a smaller prefix_length"
            )
            raise ConfigError(msg)
        kv = text_kv(base, ids.tolist(), rows, *context(after, base))
        training: dict[str, JSON] = {"text_tokens": len(ids), "num_trained": 0}
        if after:
            training["after"] = [p.digest for p in after]
        own = own_layers(base.layers)
        tensors = {f"self.{i}.{x}": t.cpu().contiguous() for i in own for x, t in zip("kv", kv[i], strict=True)}
        return tensors, {"pos_start": start + rows, "base": base.fingerprint, "training": training}
