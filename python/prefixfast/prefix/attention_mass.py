"""Measurements of a prefix's effect on one prompt: attention mass on the prefix, and divergence of the predictions.

Shape letters: L layers, HQ query heads, N tokens of a site's queries, n measured positions, V vocabulary tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from prefixfast.attention import ops
from prefixfast.attention.plan import AttentionCall, Plan, PrefixUse, plain_plan, training_plan
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan, plain_seq2seq_plan, seq2seq_training_plan
from prefixfast.config.sites import BySite, Site
from prefixfast.model.base import Model
from prefixfast.prefix.inspected_text import InspectedText
from prefixfast.prefix.kv import site_prefixes
from prefixfast.prefix.record import PrefixData

POSITIONS_PER_CHUNK = 256  # positions whose distributions over the vocabulary are in memory at once


class Measured(NamedTuple):
    """Effect of a prefix on one prompt.

    Attributes:
        mass: Attention mass ``[L, HQ]`` of each site, fp32, summed over the measured queries, NaN beyond the heads of a
            layer.
        counts: Number of measured queries of each site.
        divergence: Divergence ``[n]``, fp32, in nats.
    """

    mass: BySite[Tensor]
    counts: BySite[int]
    divergence: Tensor


@torch.no_grad()
def measure_prompt(model: Model, prefix: PrefixData, text: InspectedText) -> Measured:
    """Measure the effect of a prefix on a prompt.

    All tokens of an encoder are queries of its site; at the other sites they are the tokens from the first measured
    position on.

    Args:
        model: Base model.
        prefix: Prefix.
        text: Tokens of the prompt.
    """
    tokens = torch.tensor(text.ids, device=model.device)
    at = torch.arange(text.first, len(text.ids), device=model.device)
    found: dict[Site, dict[int, Tensor]] = {site: {} for site in prefix.sites}

    def probe(call: AttentionCall) -> None:
        if call.site in found:
            first = 0 if call.site == "enc" else text.first
            own = plan if isinstance(plan, Plan) else plan.at(call.site)
            found[call.site][call.layer] = prefix_mass(own, call)[first:].sum(0)

    plan, alone = (made.with_logits_at(at) for made in _plans(model, prefix, text))
    probed = replace(plan, probe=probe) if isinstance(plan, Plan) else plan.with_probe(probe)
    encoder_ids = None if text.encoder_ids is None else torch.tensor(text.encoder_ids, device=model.device)
    with model.guard.running():
        p, q = model.forward(probed, tokens, encoder_ids), model.forward(alone, tokens, encoder_ids)
    chunks = zip(p.split(POSITIONS_PER_CHUNK), q.split(POSITIONS_PER_CHUNK), strict=True)
    divergence = torch.cat([_divergence(a, b) for a, b in chunks])
    masses = {site: [layers[i] for i in range(len(layers))] for site, layers in found.items()}
    padded = {
        site: torch.nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=torch.nan).float().cpu()
        for site, own in masses.items()
    }
    counts = {site: len(text.encoder_ids or ()) if site == "enc" else len(at) for site in found}
    return Measured(BySite(padded), BySite(counts), divergence.float().cpu())


def _plans(model: Model, prefix: PrefixData, text: InspectedText) -> tuple[Plan | Seq2SeqPlan, Plan | Seq2SeqPlan]:
    """Plans of a prompt with the prefix and alone."""
    how: PlanOptions = {"backend": model.backend, "device": model.device}
    lengths = np.array([len(text.ids)], np.int32)
    use = PrefixUse(np.array([0, 1], np.int32), np.zeros(1, np.int32))
    prefixes = site_prefixes([prefix], model)
    if text.encoder_ids is not None:
        encoder_lengths = np.array([len(text.encoder_ids)], np.int32)
        plan = seq2seq_training_plan(lengths, encoder_lengths, use, prefixes, **how)
        return plan, plain_seq2seq_plan(lengths.tolist(), encoder_lengths.tolist(), **how)
    last = np.array([text.first if prefix.position == "infix" else 0], np.int32)
    return training_plan(lengths, use, *prefixes["self"], **how, last_prompt_token=last), plain_plan(
        lengths.tolist(), **how
    )


class PlanOptions(TypedDict):
    """Arguments that all plans of a model have."""

    backend: ops.Backend
    device: torch.device


def prefix_mass(plan: Plan, call: AttentionCall) -> Tensor:
    """Share of each query's attention that goes to its prefix blocks, ``[N, HQ]``.

    The share is ``exp(lse of the prefix rows - lse of all keys)``, from the log-sum-exp of the scores.
    """
    assert plan.packed is not None
    if plan.prefix is None or not len(plan.prefix[call.layer][0]):  # the prefix leaves this layer out
        return torch.zeros_like(call.lse)
    packed = plan.packed[plan.view(call.layer)]
    seg = packed.seg.clone()
    seg[:, 3] = 0  # no keys of the sequence itself, so that only the prefix rows are left
    tables = list(packed._replace(seg=seg))
    options = (call.scale, call.window, call.softcap, True, False, "reference", list(plan.backend.sizes))
    rows = plan.prefix[call.layer][0]  # in place of the values, which the log-sum-exp does not depend on
    _, lse = ops.attn(call.q, call.k, call.k, rows, rows, tables, None, call.bias, *options)
    return (lse - call.lse).exp()


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p || q) in nats of logits ``[n, V]``, computed in fp32 or fp64."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    log_p, log_q = (t.to(dtype).log_softmax(-1) for t in (p, q))
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # rounding can put equal distributions below zero
