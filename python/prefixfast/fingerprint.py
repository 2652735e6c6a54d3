"""What tells one base model from another: its architecture, its tokenizer, and a sample of its weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from prefixfast.errors import BaseMismatchError

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


def fingerprint(model: PreTrainedModel, tokenizer_json: str | None) -> dict[str, Any]:
    """The fingerprint of a base.

    Args:
        model: The base.
        tokenizer_json: Text of its `tokenizer.json`, None if it has no tokenizer.

    Returns:
        ``name`` (for messages), ``config`` (the fields above), ``tokenizer`` and ``weights`` (hex digests; weights are compared in bf16, so that a base
        loaded in fp32 and in bf16 is the same; None in fp16, which rounds differently).
    """
    config = model.config.get_text_config()
    fields = {f: getattr(config, f) for f in FIELDS if getattr(config, f, None) is not None}
    return {
        "name": str(getattr(model, "name_or_path", "") or ""),
        "config": json.loads(json.dumps(fields, default=str)),
        "tokenizer": None if tokenizer_json is None else _digest(tokenizer_json.encode()),
        "weights": None if model.dtype == torch.float16 else _weights(model),
    }


def check_base(ours: dict[str, Any] | None, base: dict[str, Any], what: str) -> None:
    """Raise `BaseMismatchError` if a prefix with fingerprint ``ours`` was not made for ``base``; a prefix without one passes.

    The tokenizer's digest is for information: the same vocabulary is written differently by different versions of the tokenizers library.
    """
    if ours is None:
        return
    for key in ("config", "weights"):
        if ours.get(key) is None or base[key] is None or ours[key] == base[key]:
            continue
        detail = f"{key} differ"
        if key == "config":
            names = sorted(k for k in {*ours[key], *base[key]} if ours[key].get(k) != base[key].get(k))
            if not names:
                continue
            detail = ", ".join(f"{n} is {ours[key].get(n)!r} there and {base[key].get(n)!r} here" for n in names)
        msg = f"{what} was made for base {ours.get('name') or 'unknown'!r}, not for {base['name'] or 'this model'!r}: {detail}; load the base it was trained on"
        raise BaseMismatchError(msg)


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
    data = b"".join(p.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes() for p in parts)
    return _digest(data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
