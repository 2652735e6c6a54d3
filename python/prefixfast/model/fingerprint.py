"""What tells one base model from another: its architecture, its tokenizer, and a sample of its weights."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from prefixfast.errors import BaseMismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
# Configuration that changes what keys and values mean.
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
SAMPLED_ROWS = 8
_WARNED: set[tuple[str | None, str | None]] = set()  # tokenizers that were found to differ


def num_layers(base: Mapping[str, Any] | None) -> int | None:
    """Layers of the base with this fingerprint, None if it does not say."""
    count = ((base or {}).get("config") or {}).get("num_hidden_layers")
    return count if type(count) is int else None


def fingerprint(model: PreTrainedModel, tokenizer: str | None) -> dict[str, Any]:
    """The fingerprint of a base.

    Args:
        model: The base.
        tokenizer: `Tokenizer.digest_text` of its tokenizer, None if it has none.

    Returns:
        ``name`` (for messages), ``config`` (the fields above), ``tokenizer`` and ``weights`` (hex digests; weights are compared in bf16, so that a base
        loaded in fp32 and in bf16 is the same; None in fp16, which rounds differently).
    """
    config = model.config.get_text_config()
    fields = {f: getattr(config, f) for f in FIELDS if getattr(config, f, None) is not None}
    return {
        "name": str(getattr(model, "name_or_path", "") or ""),
        "config": json.loads(json.dumps(fields, default=str)),
        "tokenizer": None if tokenizer is None else _digest(tokenizer.encode()),
        "weights": None if model.dtype == torch.float16 else _weights(model),
    }


def check_base(ours: dict[str, Any] | None, base: dict[str, Any], what: str) -> None:
    """Raise `BaseMismatchError` if a prefix with fingerprint ``ours`` was not made for ``base``; a prefix without one passes.

    Another tokenizer is a warning, once: a prefix is keys and values, and token ids mean the same to the base whoever makes them.
    """
    if ours is None:
        return
    tokenizers = ours.get("tokenizer"), base.get("tokenizer")
    for key in ("config", "weights"):
        if ours.get(key) is None or base.get(key) is None or ours[key] == base[key]:
            continue
        detail = f"{key} differ"
        if key == "config":
            names = sorted(k for k in {*ours[key], *base[key]} if ours[key].get(k) != base[key].get(k))
            if not names:
                continue
            detail = ", ".join(f"{n} is {ours[key].get(n)!r} there and {base[key].get(n)!r} here" for n in names)
        there, here = ours.get("name") or "unknown", base.get("name") or "this model"
        msg = f"{what} was made for base {there!r}, not for {here!r}: {detail}; load the base it was trained on"
        raise BaseMismatchError(msg)
    if None not in tokenizers and tokenizers[0] != tokenizers[1] and tokenizers not in _WARNED:
        _WARNED.add(tokenizers)
        logger.warning(
            "%s was made with another tokenizer than this base has: texts may become other tokens than in training",
            what,
        )


@torch.no_grad()
def _weights(model: PreTrainedModel) -> str:
    """Digest of embedding rows and of all one-dimensional weights of the first and last layer and the final norm, in bf16."""
    embedding = model.get_input_embeddings().weight
    rows = torch.linspace(0, embedding.shape[0] - 1, SAMPLED_ROWS, device=embedding.device).long()
    last = str(model.config.get_text_config().num_hidden_layers - 1)
    parts = [embedding[rows]]
    for name, parameter in sorted(model.named_parameters()):
        layers = [p for p in name.split(".") if p.isdigit()]
        if not layers or layers[0] in ("0", last):
            flat = parameter.detach().reshape(-1)
            parts.append(flat[:: max(1, len(flat) // 256)])
    sampled = torch.cat([p.to(embedding.device, torch.bfloat16).reshape(-1) for p in parts])  # one copy to the host
    return _digest(sampled.cpu().view(torch.int16).numpy().tobytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
