"""Comparison of parity tests: a packed forward with mixed prefixes against PEFT with one prompt at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import tiny
from prefixfast.attention.plan import PrefixUse, training_plan
from prefixfast.model.load import load
from prefixfast.prefix import peft_format as layout
from prefixfast.prefix.kv import concat_kv, row_table
from prefixfast.prefix.prefix import Prefix


@dataclass
class Case:
    """Prompts and prefixes.

    Attributes:
        prompts: Token ids of each prompt.
        choice: Number of each prompt's prefix, -1 for none.
        tables: Prefixes in PEFT's layout.
    """

    prompts: list[torch.Tensor]
    choice: list[int]
    tables: list[torch.Tensor]

    def prefixes(self, model: Any) -> list[Prefix]:
        """The tables as `Prefix` objects."""
        return [Prefix(layout.from_table(t, *tiny.shapes(model)), pos_start=len(t)) for t in self.tables]


def case(make, *, vocab: int, longest: int, lengths=(5, 3), scale: float = 0.7, seed: int = 3) -> Case:
    """Two prefixes with a strong effect, and prompts up to a length beyond any sliding window of the tiny models."""
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, vocab, (n,), generator=g) for n in (7, 4, 1, longest, 6, longest - 9)]
    return Case(prompts, [0, 1, 0, 0, -1, 1], [tiny.peft_table(make(), n, i + 1, scale) for i, n in enumerate(lengths)])


def packed(base, c: Case, prefixes: list[Prefix], *, grad: bool = False, drop: int | None = None):
    """Logits ``[N, V]`` of all prompts in one forward, and the prefix tensors; ``drop`` leaves one prefix out."""
    leaves = [
        tuple(t.requires_grad_(grad) for t in kv) for kv in concat_kv(prefixes, base.layers, base.dtype, base.device)
    ]
    rows = row_table(prefixes, base)
    used = [[i] if i >= 0 and i != drop else [] for i in c.choice]
    indptr = np.cumsum([0, *map(len, used)], dtype=np.int32)
    lens = np.array([len(p) for p in c.prompts], np.int32)
    plan = training_plan(
        lens, PrefixUse(indptr, np.array([i for u in used for i in u], np.int32)), rows, leaves, backend=base.backend
    )
    return base.forward(plan, torch.cat(c.prompts)), leaves


def unpacked(make, c: Case, *, weights: list[torch.Tensor] | None = None):
    """Logits of PEFT, or of the model without a prefix, for each prompt alone.

    With ``weights``, the weights of each prompt's losses, also the gradients of the tables.
    """
    out, grads = [], [torch.zeros_like(t, dtype=torch.float64) for t in c.tables]
    models = [tiny.with_prefix(make(), t) for t in c.tables]
    plain = make()
    for i, (prompt, choice) in enumerate(zip(c.prompts, c.choice, strict=True)):
        model = plain if choice < 0 else models[choice]
        logits = model(input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None]).logits[0]
        out.append(logits.detach())
        if weights is not None and choice >= 0:
            weight = models[choice].prompt_encoder["default"].embedding.weight
            loss = (F.cross_entropy(logits, prompt.roll(-1), reduction="none") * weights[i]).sum()
            grads[choice] += torch.autograd.grad(loss, weight)[0].double()
    return torch.cat(out), grads


def compare_logits(make, c: Case, tokenizer: Any = None) -> tuple[float, float]:
    """Largest difference, and the smallest effect of leaving a prefix out, both relative to the largest logit."""
    with load(make(), tokenizer=tokenizer) as base, torch.no_grad():
        got, _ = packed(base, c, c.prefixes(base.hf))
        expected, _ = unpacked(make, c)
        top = expected.abs().max()
        effects = []
        for drop in range(len(c.tables)):
            without, _ = packed(base, c, c.prefixes(base.hf), drop=drop)
            seen = torch.cat([torch.full((len(p),), i == drop) for p, i in zip(c.prompts, c.choice, strict=True)])
            effects.append(((without - got)[seen].abs().amax(-1).median() / top).item())
        return ((got - expected).abs().max() / top).item(), min(effects)


def compare_gradients(make, c: Case) -> float:
    """Largest difference of prefix gradients relative to the largest gradient."""
    g = torch.Generator().manual_seed(9)
    weights = [torch.rand(len(p), generator=g) for p in c.prompts]
    _, expected = unpacked(make, c, weights=weights)
    with load(make()) as base:
        logits, leaves = packed(base, c, c.prefixes(base.hf), grad=True)
        targets = torch.cat([p.roll(-1) for p in c.prompts])
        (F.cross_entropy(logits, targets, reduction="none") * torch.cat(weights)).sum().backward()
        assert all(p.grad is None for p in base.hf.parameters())
        at, worst = 0, 0.0
        for table, gradient in zip(c.tables, expected, strict=True):
            part = {
                f"self.{i}.{x}": t.grad[at : at + len(table)]
                for i, kv in enumerate(leaves)
                for x, t in zip("kv", kv, strict=True)
            }
            got = layout.to_table(part).double()
            worst = max(worst, ((got - gradient).abs().max() / gradient.abs().max()).item())
            at += len(table)
    return worst
