"""A prefix from a text: the keys and values of the text's tokens in the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention.plan import LayerKV
from prefixfast.config.json_types import JSON
from prefixfast.config.sites import BySite, Site
from prefixfast.data.encode import Ints, encode_text
from prefixfast.data.encode.seq2seq import pad_error
from prefixfast.errors import ConfigError, shown
from prefixfast.model.base import Model
from prefixfast.model.prefix_shape import own_layers
from prefixfast.model.seq2seq.tokens import Seq2Seq
from prefixfast.model.shared_base import borrowed
from prefixfast.model.text_kv import seq2seq_text_kv, text_kv
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.kv import context, site_prefixes
from prefixfast.prefix.names import PrefixFields
from prefixfast.prefix.record import PrefixData

ENCODER_SITES: tuple[Site, ...] = ("enc", "cross")  # sites of a text that an encoder reads


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
        if base.seq2seq is not None and _is_conversation(text):
            msg = "text: expected a string or token ids, got messages; an encoder-decoder base reads no conversations"
            raise ConfigError(msg)
        ids = encode_text(base, text)
        rows = length or len(ids)
        training: dict[str, JSON] = {"text_tokens": len(ids), "num_trained": 0}
        if after:
            training["after"] = [p.digest for p in after]
        if base.seq2seq is not None:
            _check_encoder_text(base.seq2seq, ids, rows)
            tensors = _encoder_tensors(base, base.seq2seq, ids, rows, after)
            return tensors, {"pos_start": 0, "base": base.fingerprint, "training": training}
        start = max((p.pos_start for p in after), default=0)
        if start + rows >= base.max_positions:
            msg = (
                f"text: {shown(rows)} rows after position {start} leave no room in the base's {base.max_positions} "
                "positions; give a smaller prefix_length"
            )
            raise ConfigError(msg)
        kv = text_kv(base, ids.tolist(), rows, *context(after, base))
        tensors = _tensors({"self": {i: kv[i] for i in own_layers(base.layers)}})
        return tensors, {"pos_start": start + rows, "base": base.fingerprint, "training": training}


def _tensors(kv: Mapping[Site, Mapping[int, LayerKV]]) -> dict[str, Tensor]:
    """Tensors of a prefix by name, from keys and values by site and layer."""
    return {
        f"{site}.{i}.{x}": t.cpu().contiguous()
        for site, layers in kv.items()
        for i, pair in layers.items()
        for x, t in zip("kv", pair, strict=True)
    }


def _is_conversation(text: object) -> bool:
    return isinstance(text, list | tuple) and bool(text) and isinstance(text[0], Mapping)


def _check_encoder_text(seq2seq: Seq2Seq, ids: Ints, rows: int) -> None:
    """Raise `ConfigError` for a text that the encoder of a base model cannot read."""
    if error := pad_error(seq2seq, ids):
        msg = f"text: {error}"
        raise ConfigError(msg)
    if rows > seq2seq.encoder_positions:
        msg = (
            f"text: {shown(rows)} rows, expected at most {seq2seq.encoder_positions}, the number of positions of the "
            "base's encoder; give a smaller prefix_length"
        )
        raise ConfigError(msg)


def _encoder_tensors(
    base: Model, seq2seq: Seq2Seq, ids: Ints, rows: int, after: Sequence[PrefixData]
) -> dict[str, Tensor]:
    """Keys and values of a text in the encoder, and those that cross-attention computes of it."""
    start = [seq2seq.pad if seq2seq.start is None else seq2seq.start]  # the decoder's keys and values are not used
    lengths = BySite.of(rows, ENCODER_SITES)
    kv = seq2seq_text_kv(base, ids.tolist(), start, lengths, site_prefixes(after, base))
    return _tensors({site: dict(enumerate(layers)) for site, layers in kv.items()})
