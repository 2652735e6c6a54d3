"""Dense oracle of prefixes and infixes: transformers' own forward of one sequence, with mask and positions by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from prefixfast import Prefix

ROPE = ("llama", "qwen3", "gpt_neox")  # families whose stored keys keep their positions
Leaves = list[list[tuple[Tensor, Tensor] | None]]  # keys and values [P, H, D] by prefix and layer, None without rows


def leaves(prefixes: Sequence[Prefix], num_layers: int, *, grad: bool = False) -> Leaves:
    """Keys and values of prefixes by layer."""
    return [
        [
            (p.kv[f"self.{i}.k"].requires_grad_(grad), p.kv[f"self.{i}.v"].requires_grad_(grad))
            if i in p.layers
            else None
            for i in range(num_layers)
        ]
        for p in prefixes
    ]


def positions(model: Any, prefixes: Sequence[Prefix], length: int, split: int) -> list[int]:
    """Position of each token of a sequence whose last prompt token is token ``split``."""
    starts = {place: max((p.pos_start for p in prefixes if p.position == place), default=0) for place in PLACES}
    if not any(p.position == "infix" for p in prefixes):
        return list(range(starts["prefix"], starts["prefix"] + length))
    first = -split if model.config.model_type in ROPE else starts["prefix"]
    before = list(range(first, first + split))
    return before + [first + t + starts["infix"] for t in range(split, length)]


PLACES = ("prefix", "infix")


@contextlib.contextmanager
def masked(model: Any, masks: Sequence[Tensor]) -> Iterator[None]:
    """Each layer of a model gets its own mask ``[1, 1, N, keys]``."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "attention_mask": masks[module.layer_idx]}

    layers = [m for m in model.modules() if hasattr(m, "layer_idx") and type(m).__name__.endswith("Attention")]
    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in layers]
    try:
        yield
    finally:
        for h in hooks:
            h.remove()


def logits(
    model: Any, prefixes: Sequence[Prefix], ids: Sequence[int], split: int, rows: Leaves | None = None
) -> Tensor:
    """Logits ``[N, V]`` of tokens; an infix is seen from token ``split`` on.

    Args:
        model: Model of transformers that is not attached, with attention "sdpa".
        prefixes: Prefixes from left to right.
        ids: Tokens.
        split: Index of the last prompt token.
        rows: Keys and values of the prefixes; those of the prefixes themselves if None.
    """
    num_layers, n = model.config.num_hidden_layers, len(ids)
    rows = leaves(prefixes, num_layers) if rows is None else rows
    token = torch.arange(n)
    own = token[:, None] >= token[None]
    like = next(kv for kvs in rows for kv in kvs if kv is not None) if rows else None
    filled, masks = [], []
    for i in range(num_layers):
        keys, values, seen = [], [], []
        for prefix, kvs in zip(prefixes, rows, strict=True):
            k, v = kvs[i] if kvs[i] is not None else [torch.zeros_like(t)[: prefix.length] for t in like]
            keys.append(k)
            values.append(v)
            visible = torch.ones(n, dtype=torch.bool) if prefix.position == "prefix" else token >= split
            seen.append((visible & (kvs[i] is not None))[:, None].expand(n, len(k)))
        if prefixes:
            filled.append(tuple(torch.cat(t).transpose(0, 1)[None].to(model.dtype) for t in (keys, values)))
        hidden = ~torch.cat([*seen, own], 1)
        masks.append(
            torch.zeros(hidden.shape, dtype=model.dtype).masked_fill(hidden, torch.finfo(model.dtype).min)[None, None]
        )
    with masked(model, masks):
        out = model(
            input_ids=torch.tensor([list(ids)]),
            past_key_values=DynamicCache(filled) if prefixes else None,
            attention_mask=masks[0],
            position_ids=torch.tensor([positions(model, prefixes, n, split)]),
            use_cache=bool(prefixes),
        )
    return out.logits[0]


@torch.no_grad()
def greedy(model: Any, prefixes: Sequence[Prefix], prompt: Sequence[int], count: int) -> list[int]:
    """Most likely tokens after a prompt, without an end token."""
    ids = list(prompt)
    for _ in range(count):
        scores = logits(model, prefixes, ids, len(prompt) - 1)[-1]
        scores[model.config.eos_token_id] = -torch.inf
        ids.append(int(scores.argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def beams(model: Any, prefixes: Sequence[Prefix], prompt: Sequence[int], count: int, width: int) -> list[int]:
    """Tokens of the best of ``width`` beams after ``count`` steps without an end token."""
    found: list[tuple[float, list[int]]] = [(0.0, list(prompt))]
    for _ in range(count):
        longer = []
        for score, ids in found:
            scores = logits(model, prefixes, ids, len(prompt) - 1)[-1].log_softmax(-1)
            scores[model.config.eos_token_id] = -torch.inf
            best = scores.topk(2 * width)
            longer += [(score + s, [*ids, t]) for s, t in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        found = sorted(longer, key=lambda entry: -entry[0])[:width]
    return found[0][1][len(prompt) :]


def make(
    base: Any, rows: int, seed: int, *, position: str = "infix", layers: Sequence[int] | None = None, **fields: Any
) -> Prefix:
    """Random prefix with a strong effect."""
    g = torch.Generator().manual_seed(seed)
    kv = {
        f"self.{i}.{x}": torch.randn(
            rows, *shape, generator=g, dtype=torch.float64 if base.dtype == torch.float64 else torch.float32
        )
        * 0.7
        for i, s in enumerate(base.layers)
        if layers is None or i in layers
        for x, shape in zip("kv", s.row, strict=True)
    }
    return Prefix(kv, **{"pos_start": rows, "position": position, "base": base.fingerprint, **fields})
