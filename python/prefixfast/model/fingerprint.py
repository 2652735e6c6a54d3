"""Fingerprint of a base model: architecture, digest of the tokenizer, digest of sampled weights.

torch is imported only to make one, since a prefix that is read has one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from prefixfast.config.json_types import JSON
from prefixfast.config.sites import Site
from prefixfast.errors import BaseMismatchError, DataError, shown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
# Fields of the configuration that change the meaning of keys and values.
FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "rope_parameters",
    "sliding_window",
)
SEQ2SEQ_FIELDS = (  # further fields of encoder-decoder models
    "is_encoder_decoder",
    "encoder_layers",
    "decoder_layers",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "num_layers",
    "num_decoder_layers",
    "d_kv",
    "d_ff",
    "feed_forward_proj",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "decoder_start_token_id",
    "scale_embedding",
)
# Fields with the number of layers, by site. The number of hidden layers of an encoder-decoder model is its encoder's.
DEPTHS: dict[Site, tuple[str, ...]] = {
    "enc": ("encoder_layers", "num_layers"),
    **dict.fromkeys(("self", "cross"), ("decoder_layers", "num_decoder_layers")),
}
SAMPLED_ROWS = 8
NO_ADAPTERS = "none"  # digest of `adapters_digest` for a base model in which none acts
_WARNED: set[tuple[str | None, str | None]] = set()  # pairs of different tokenizers that a warning has named


class KVLayout(TypedDict):
    """Shapes of the keys and values of a base model, and the rows of a PEFT adapter for it.

    Attributes:
        layers: Number of heads, head dim of the keys, head dim of the values, and the layer whose keys and values are
            read, of each layer.
        peft: Number of heads and head dim of the rows of a PEFT adapter, or the reason why PEFT cannot hold a prefix.
    """

    layers: list[list[int]]
    peft: list[int] | str


class Fingerprint(TypedDict, total=False):
    """Fingerprint of a base model; an imported PEFT adapter has the name only.

    Attributes:
        name: Hub id or folder of the base model, for messages; empty if unknown.
        config: Values of the `FIELDS` of the configuration.
        tokenizer: Hex digest of the tokenizer, None without a tokenizer.
        weights: Hex digest of sampled weights, None for a base model in fp16.
        sample: A few numbers of the same weights by kind and parameter, in base64, by which a quantized copy of the
            base model is compared. Absent if an earlier version made the fingerprint.
        kv_layout: Shapes of keys and values, absent if all layers are alike and PEFT has the same rows.
        adapters: Hex digest of the adapters of PEFT that act in the layers, "none" if none acts. Absent for a base
            model without adapters. Unknown if an earlier version made the fingerprint, which then has no ``sample``.
    """

    name: str
    config: dict[str, JSON]
    tokenizer: str | None
    weights: str | None
    sample: dict[str, dict[str, str]]
    adapters: str
    kv_layout: KVLayout


def layout_of(base: Mapping[str, Any] | None) -> KVLayout | None:
    """Valid ``kv_layout`` of a fingerprint, None without one.

    Raises:
        DataError: If the layout is damaged.
    """
    layout = (base or {}).get("kv_layout")
    if layout is None:
        return None
    try:
        layers, peft = layout["layers"], layout["peft"]
        rows = [list(layer) for layer in layers]
        valid = bool(rows) and all(len(row) == 4 for row in rows) and set(layout) == {"layers", "peft"}
        valid = valid and all(type(n) is int and n >= 0 for row in rows for n in row)
        valid = valid and all(row[3] <= i and rows[row[3]][3] == row[3] for i, row in enumerate(rows))
        valid = valid and (isinstance(peft, str) or (len(peft) == 2 and all(type(n) is int and n > 0 for n in peft)))
    except (TypeError, KeyError, IndexError):
        valid = False
    if not valid:
        msg = f"base.kv_layout: expected heads, head dims and source of each layer and PEFT's rows, got {shown(layout)}"
        raise DataError(msg)
    return {"layers": rows, "peft": peft if isinstance(peft, str) else list(peft)}


def is_seq2seq(base: Mapping[str, Any] | None) -> bool:
    """Whether a fingerprint is that of an encoder-decoder model."""
    return ((base or {}).get("config") or {}).get("is_encoder_decoder") is True


def num_layers(base: Mapping[str, Any] | None, site: Site = "self") -> int | None:
    """Number of layers of the base model with this fingerprint, None if the fingerprint does not say.

    Args:
        base: Fingerprint.
        site: Kind of attention whose layers are counted.
    """
    config = (base or {}).get("config") or {}
    fields = DEPTHS[site] if is_seq2seq(base) else ("num_hidden_layers",)
    counts = [config[name] for name in fields if type(config.get(name)) is int]
    return counts[0] if counts else None


def fingerprint(model: PreTrainedModel, tokenizer: str | None) -> Fingerprint:
    """Fingerprint of a base model.

    Weights are compared in bf16, so that a base model has one fingerprint in fp32 and in bf16. A base model in fp16
    has no digest of weights, since fp16 rounds differently.

    Args:
        model: Base model.
        tokenizer: `Tokenizer.digest_text` of the tokenizer, None without a tokenizer.
    """
    import torch

    from prefixfast.model.adapters import adapters_digest, has_adapters
    from prefixfast.model.quantized_copy import weight_sample

    config = model.config.get_text_config()
    by_layer = getattr(config, "per_layer_attributes", None) or set()  # reading one from the whole config raises
    values = {
        f: [getattr(layer, f, None) for layer in config.per_layer_config] if f in by_layer else getattr(config, f, None)
        for f in (*FIELDS, *(SEQ2SEQ_FIELDS if model.config.is_encoder_decoder else ()))
    }
    fields = {f: value for f, value in values.items() if value is not None}
    found: Fingerprint = {
        "name": str(getattr(model, "name_or_path", "") or ""),
        "config": json.loads(json.dumps(fields, default=str)),
        "tokenizer": None if tokenizer is None else _digest(tokenizer.encode()),
        "weights": None if model.dtype == torch.float16 else _weights(model),
        "sample": weight_sample((name, _plain(parameter)) for name, parameter in _sampled_parameters(model)),
    }
    return {**found, "adapters": adapters_digest(model)} if has_adapters(model) else found


def check_same_base(
    ours: Mapping[str, Any] | None,
    base: Mapping[str, Any],
    what: str,
    quantization: str | None = None,
    *,
    allow_quantized: bool = False,
) -> None:
    """Check that a prefix was made for a base model; a prefix without a fingerprint passes.

    A different tokenizer is a warning, once per pair of tokenizers: the prefix works with token ids of any tokenizer.

    Args:
        ours: Fingerprint that the prefix holds, None if unknown.
        base: Fingerprint of the base model.
        what: Name of the prefix in the error's message.
        quantization: Quantization of the base model, None if its weights are not quantized.
        allow_quantized: Whether the base model may be a quantized copy of the prefix's, which is a warning then.

    Raises:
        BaseMismatchError: If the prefix was made for another base model.
    """
    if ours is None:
        return
    from prefixfast.model.quantized_copy import copy_error, warn_copy

    tokenizers = ours.get("tokenizer"), base.get("tokenizer")
    ours, base = _with_adapters(ours), _with_adapters(base)
    for key in ("config", "adapters", "weights"):
        if ours.get(key) is None or base.get(key) is None or ours[key] == base[key]:
            continue
        detail, advice = f"{key} differ", "load the base it was trained on"
        if key == "weights" and allow_quantized:
            if (reason := copy_error(ours, base, quantization)) is None:
                warn_copy(ours, base, quantization, what)
                continue
            detail = f"weights differ: {reason}"
        elif key == "weights" and quantization is not None:
            advice += f", or load(..., allow_base_mismatch='quantized') if this base ({quantization}) is a copy of it"
        if key == "adapters":
            detail = "other adapters of PEFT act in its layers, or they are merged in one of the two"
            advice = "set the base's adapters as they were in training"
        if key == "config":
            names = sorted(k for k in {*ours[key], *base[key]} if ours[key].get(k) != base[key].get(k))
            if not names:
                continue
            pairs = ((n, shown(ours[key].get(n)), shown(base[key].get(n))) for n in names)
            detail = ", ".join(f"{n} is {theirs} there and {mine} here" for n, theirs, mine in pairs)
        there, here = ours.get("name") or "unknown", base.get("name") or "this model"
        msg = f"{what} was made for base {shown(there)}, not for {shown(here)}: {detail}; {advice}"
        raise BaseMismatchError(msg)
    if None not in tokenizers and tokenizers[0] != tokenizers[1] and tokenizers not in _WARNED:
        _WARNED.add(tokenizers)
        logger.warning(
            "%s was made with another tokenizer than that of this base: texts can become other tokens than in training",
            what,
        )


def _with_adapters(base: Mapping[str, Any]) -> Mapping[str, Any]:
    """A fingerprint that says that no adapter acts, where its version is known to record those that do."""
    return {"adapters": NO_ADAPTERS, **base} if "sample" in base else base


def _weights(model: PreTrainedModel) -> str:
    """Digest of sampled weights in bf16: embedding rows, the first and the last layer, and weights outside layers.

    Of an encoder-decoder model it has all layers, and the bias of the logits. Prefixes that 0.1.0 has made for
    decoder-only models hold the digest without layers in between.
    """
    import torch

    from prefixfast.model.lm_head import logits_bias

    embedding = model.get_input_embeddings().weight
    rows = torch.linspace(0, embedding.shape[0] - 1, SAMPLED_ROWS, device=embedding.device).long()
    parts = [_plain(embedding)[rows]]
    is_seq2seq = bool(model.config.is_encoder_decoder)
    for _, parameter in sorted(model.named_parameters()) if is_seq2seq else _sampled_parameters(model):
        flat = _plain(parameter).reshape(-1)
        parts.append(flat[:: max(1, len(flat) // 256)])
    if is_seq2seq and (bias := logits_bias(model)) is not None:
        parts.append(bias)  # whole, since few tokens have one
    sampled = torch.cat([p.to(embedding.device, torch.bfloat16).reshape(-1) for p in parts])  # one copy to the host
    return _digest(sampled.cpu().view(torch.int16).numpy().tobytes())


def _sampled_parameters(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Parameters of the first and the last layer and outside of the layers, in the order of their names."""
    config = model.config
    last, decoder_last = config.get_text_config().num_hidden_layers - 1, -1
    if config.is_encoder_decoder:
        decoder_last = next(getattr(config, n) for n in DEPTHS["self"] if getattr(config, n, None) is not None) - 1

    def is_sampled(parts: list[str]) -> bool:
        layer = next((int(part) for part in parts if part.isdigit()), 0)
        return layer in (0, decoder_last if config.is_encoder_decoder and "decoder" in parts else last)

    return sorted((n, p) for n, p in model.named_parameters() if is_sampled(n.split(".")))


def _plain(parameter: Tensor) -> Tensor:
    """Values of a parameter, dequantized if it is a quantized tensor such as those of torchao."""
    import torch

    values = parameter.detach()
    return values.dequantize() if type(values) is not torch.Tensor else values


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
