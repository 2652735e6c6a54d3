"""GPT-2 and Llama written out in plain torch, from their state dicts, with adapters behind the blocks if given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, KV_HEADS = 4, 2  # of the tiny models


def logits(family: str, weights: Mapping[str, Tensor], ids: Tensor, adapters: Mapping[str, Tensor] | None = None):
    """Logits ``[N, V]`` of one text.

    Args:
        family: ``"gpt2"`` or ``"llama"``.
        weights: State dict of the tiny model.
        ids: Token ids ``[N]``.
        adapters: Tensors of the adapters, by the names of prefixfast.
    """
    embed, block, norm = FAMILIES[family]
    x, i = embed(weights, ids), 0
    while f"{PLACE[family].format(i)}.{FIRST[family]}" in weights:
        x = block(sub(weights, PLACE[family].format(i)), x)
        x = x if adapters is None else adapted(sub(adapters, str(i)), x)
        i += 1
    return norm(weights, x) @ weights["lm_head.weight"].T


def adapted(w: dict[str, Tensor], x: Tensor) -> Tensor:
    """Hidden states after the adapter of Lin et al. 2020."""
    mean, spread = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    h = (x - mean) / torch.sqrt(spread + 1e-5) * w["norm.weight"] + w["norm.bias"]
    h = torch.clamp(h @ w["down.weight"].T + w["down.bias"], min=0)
    return x + h @ w["up.weight"].T + w["up.bias"]


def sub(weights: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """Weights of a module by their names inside it."""
    return {n.removeprefix(f"{place}."): t for n, t in weights.items() if n.startswith(f"{place}.")}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention ``[N, heads * D]`` of queries ``[N, heads, D]``."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -math.inf).softmax(-1), v).flatten(1)


def gpt2_embed(w: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    return w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][: len(ids)]


def gpt2_block(w: dict[str, Tensor], x: Tensor) -> Tensor:
    h = F.layer_norm(x, x.shape[-1:], w["ln_1.weight"], w["ln_1.bias"], 1e-5)
    h = h @ w["attn.c_attn.weight"] + w["attn.c_attn.bias"]
    q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in h.chunk(3, -1))
    x = x + attention(q, k, v) @ w["attn.c_proj.weight"] + w["attn.c_proj.bias"]
    h = F.layer_norm(x, x.shape[-1:], w["ln_2.weight"], w["ln_2.bias"], 1e-5)
    h = F.gelu(h @ w["mlp.c_fc.weight"] + w["mlp.c_fc.bias"], approximate="tanh")
    return x + h @ w["mlp.c_proj.weight"] + w["mlp.c_proj.bias"]


def gpt2_norm(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w["transformer.ln_f.weight"], w["transformer.ln_f.bias"], 1e-5)


def llama_embed(w: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    return w["model.embed_tokens.weight"][ids]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotated(x: Tensor) -> Tensor:
    """Queries or keys ``[N, heads, D]`` after RoPE at positions 0 to N - 1."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half) / half)[None]
    cos, sin = (t.to(x.dtype)[:, None] for t in (angle.cos(), angle.sin()))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def llama_block(w: dict[str, Tensor], x: Tensor) -> Tensor:
    h = rms(x, w["input_layernorm.weight"])
    q, k, v = (
        (h @ w[f"self_attn.{n}_proj.weight"].T).unflatten(-1, (heads, -1))
        for n, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    )
    x = x + attention(rotated(q), rotated(k), v) @ w["self_attn.o_proj.weight"].T
    h = rms(x, w["post_attention_layernorm.weight"])
    h = F.silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)
    return x + h @ w["mlp.down_proj.weight"].T


def llama_norm(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return rms(x, w["model.norm.weight"])


PLACE = {"gpt2": "transformer.h.{}", "llama": "model.layers.{}"}
FIRST = {"gpt2": "ln_1.weight", "llama": "input_layernorm.weight"}
FAMILIES: dict[str, Any] = {
    "gpt2": (gpt2_embed, gpt2_block, gpt2_norm),
    "llama": (llama_embed, llama_block, llama_norm),
}
