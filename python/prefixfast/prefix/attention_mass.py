"""Measurements of a prefix's effect on one prompt: attention mass on the prefix, and divergence of the predictions.

Shape letters: L layers, HQ query heads, N prompt tokens, n measured positions, V vocabulary tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from prefixfast.attention import ops
from prefixfast.attention.plan import AttentionCall, LayerKV, Plan, PrefixUse, plain_plan, training_plan
from prefixfast.model.base import Model
from prefixfast.prefix.kv import row_table
from prefixfast.prefix.record import PrefixData

POSITIONS_PER_CHUNK = 256  # positions whose distributions over the vocabulary are in memory at once


@torch.no_grad()
def measure_prompt(
    model: Model, prefix: PrefixData, kv: list[LayerKV], ids: list[int], first: int
) -> tuple[Tensor, Tensor]:
    """Measure the effect of a prefix on a prompt.

    Args:
        model: Base model.
        prefix: Prefix.
        kv: Keys and values of the prefix by layer, on the model's device.
        ids: Token ids of the prompt.
        first: First position that is measured, for an infix that of the last prompt token.

    Returns:
        Attention mass ``[L, HQ]``, fp32, summed over the measured positions, NaN beyond the heads of a layer; and
        divergence ``[n]``, fp32, in nats.
    """
    tokens = torch.tensor(ids, device=model.device)
    at = torch.arange(first, len(ids), device=model.device)
    rows = row_table([prefix], model)
    lengths, indptr, used = np.array([len(ids)], np.int32), np.array([0, 1], np.int32), np.zeros(1, np.int32)
    last = np.array([first if prefix.position == "infix" else 0], np.int32)
    plan = training_plan(
        lengths,
        PrefixUse(indptr, used),
        rows,
        kv,
        backend=model.backend,
        device=model.device,
        last_prompt_token=last,
    )
    plan = plan.with_logits_at(at)
    masses: dict[int, Tensor] = {}

    def probe(call: AttentionCall) -> None:
        masses[call.layer] = prefix_mass(plan, call)[first:].sum(0)

    alone = plain_plan([len(ids)], backend=model.backend, device=model.device).with_logits_at(at)
    with model.guard.running():
        p, q = model.forward(replace(plan, probe=probe), tokens), model.forward(alone, tokens)
    chunks = zip(p.split(POSITIONS_PER_CHUNK), q.split(POSITIONS_PER_CHUNK), strict=True)
    divergence = torch.cat([_divergence(a, b) for a, b in chunks])
    by_layer = [masses[i] for i in range(len(masses))]
    mass = torch.nn.utils.rnn.pad_sequence(by_layer, batch_first=True, padding_value=torch.nan)
    return mass.float().cpu(), divergence.float().cpu()


def prefix_mass(plan: Plan, call: AttentionCall) -> Tensor:
    """Share of each query's attention that goes to its prefix blocks, ``[N, HQ]``.

    The share is ``exp(lse of the prefix rows - lse of all keys)``, from the log-sum-exp of the scores.
    """
    assert plan.packed is not None
    assert plan.prefix is not None
    if not len(plan.prefix[call.layer][0]):  # the prefix leaves this layer out
        return torch.zeros_like(call.lse)
    packed = plan.packed[plan.view(call.layer)]
    seg = packed.seg.clone()
    seg[:, 3] = 0  # no keys of the sequence itself, so that only the prefix rows are left
    tables = list(packed._replace(seg=seg))
    options = (call.scale, call.window, call.softcap, True, False, "reference", list(plan.backend.sizes))
    rows = plan.prefix[call.layer][0]  # in place of the values, which the log-sum-exp does not depend on
    _, lse = ops.attn(call.q, call.k, call.k, rows, rows, tables, None, None, *options)
    return (lse - call.lse).exp()


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p || q) in nats of logits ``[n, V]``, computed in fp32 or fp64."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    log_p, log_q = (t.to(dtype).log_softmax(-1) for t in (p, q))
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # rounding can put equal distributions below zero
