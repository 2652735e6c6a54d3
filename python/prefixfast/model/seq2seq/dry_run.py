"""Heads of all layers of an encoder-decoder model, from a forward in which each site of each layer must be reached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention import ops
from prefixfast.attention.hf_interface import MissingPlanError
from prefixfast.attention.plan import AttentionCall, Plan
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan, plain_seq2seq_plan
from prefixfast.config.sites import SITES, BySite, Site
from prefixfast.errors import ConfigError
from prefixfast.model.dry_run import FAILURES, UNBOUNDED, LayerShape
from prefixfast.model.seq2seq.site_modules import SiteModule
from prefixfast.model.seq2seq.stacks import seq2seq_hidden

DECODER_TOKENS, ENCODER_TOKENS = 5, 8


def probe_tokens(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Token ids of a decoder and of an encoder, without padding, which some models hide."""
    ids = torch.arange(max(DECODER_TOKENS, ENCODER_TOKENS), device=model.device) + 3
    sizes = (len(stack.embed_tokens.weight) for stack in (model.get_decoder(), model.get_encoder()))
    decoder, encoder = (ids % size for size in sizes)
    return decoder[:DECODER_TOKENS], encoder[:ENCODER_TOKENS]


def probe_plan(model: PreTrainedModel) -> Seq2SeqPlan:
    """Plan of the tokens of `probe_tokens`."""
    return plain_seq2seq_plan([DECODER_TOKENS], [ENCODER_TOKENS], backend=ops.Backend("reference"), device=model.device)


@torch.no_grad()
def seq2seq_dry_run(model: PreTrainedModel, modules: Sequence[SiteModule]) -> Mapping[Site, tuple[LayerShape, ...]]:
    """Heads of all layers by site, as the attention function gets them.

    Args:
        model: Attached encoder-decoder model.
        modules: Its attention modules.

    Raises:
        ConfigError: If a layer does not reach prefixfast's attention once at each of its sites, or if prefixfast does
            not compute what it asks for.
    """
    what = f"cannot attach {type(model).__name__} ({model.config.model_type})"
    seen: list[AttentionCall] = []

    def probed(plan: Plan) -> Plan:
        return replace(plan, probe=seen.append, reach=UNBOUNDED)  # every window can hide keys

    plan, tokens = probe_plan(model), probe_tokens(model)
    assert plan.encoder is not None
    plan = Seq2SeqPlan(probed(plan.decoder), probed(plan.cross), probed(plan.encoder))
    try:
        seq2seq_hidden(model, plan, *tokens)
    except MissingPlanError as e:
        msg = f"{what}: its layers do not pass keyword arguments on to attention, which needs the plan"
        raise ConfigError(msg) from e
    except FAILURES as e:
        msg = f"{what}: a packed forward fails: {type(e).__name__}: {e}"
        raise ConfigError(msg) from e
    reached, expected = Counter((c.site, c.layer) for c in seen), Counter((m.site, m.layer) for m in modules)
    if reached != expected:
        wrong = ", ".join(f"{site} {layer}" for site, layer in sorted((reached - expected) | (expected - reached)))
        msg = f"{what}: expected one call of prefixfast's attention at each site of each layer, others at {wrong}"
        raise ConfigError(msg)
    calls = {(c.site, c.layer): c for c in seen}
    counts = Counter(m.site for m in modules)
    shapes = BySite({s: tuple(_shape(calls[s, layer]) for layer in range(counts[s])) for s in SITES})
    if (reason := _unsupported(seen, shapes)) is not None:
        msg = f"{what}: {reason}"
        raise ConfigError(msg)
    return shapes


def _shape(call: AttentionCall) -> LayerShape:
    return LayerShape(call.q.shape[1], call.k.shape[1], call.q.shape[2], call.v.shape[2])


def _unsupported(calls: Sequence[AttentionCall], shapes: Mapping[Site, Sequence[LayerShape]]) -> str | None:
    """Reason why prefixfast does not compute a model's attention, None if it does."""
    if any(call.window for call in calls):
        return "a layer passes a sliding window to attention, which is not shown to be right for two stacks"
    if any(s.head_dim != s.value_dim for of_site in shapes.values() for s in of_site):
        return "its keys and values have different head dims"
    rows = {s.row_numbers for of_site in shapes.values() for s in of_site}
    if len(rows) != 1 or {s.row for s in shapes["cross"]} != {s.row for s in shapes["self"]}:
        return "the rows of its keys differ between encoder, decoder and cross-attention, which share one cache"
    return None
