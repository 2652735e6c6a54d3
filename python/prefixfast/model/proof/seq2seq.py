"""`prove_seq2seq`, the comparison of an attached encoder-decoder model with its own forward."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention.ops import Backend
from prefixfast.config.sites import Site
from prefixfast.errors import ConfigError
from prefixfast.model.attention_switch import configs_of
from prefixfast.model.dry_run import FAILURES, LayerShape
from prefixfast.model.proof.brute_force import brute_force_logits
from prefixfast.model.proof.own import attention_of
from prefixfast.model.proof.precision import float32_weights
from prefixfast.model.proof.relative_error import relative_error
from prefixfast.model.proof.seq2seq_cases import (
    DECODER_TEXT,
    ENCODER_TEXT,
    NEW,
    PREFIX,
    PackedSeq2Seq,
    Request,
    SitePrefix,
    plain_requests,
    requests_with_prefixes,
)
from prefixfast.model.proof.seq2seq_serving import serve_seq2seq
from prefixfast.model.seq2seq.facts import seq2seq_facts
from prefixfast.model.seq2seq.families import FAMILIES
from prefixfast.model.seq2seq.head import find_seq2seq_head
from prefixfast.model.seq2seq.tokens import Seq2Seq

logger = logging.getLogger(__name__)
BACKEND = Backend("torch")
BEAMS = 1  # number of the request that has two beams
Found = tuple[str, Tensor, Tensor]  # name of the feature, logits, expected logits


def prove_seq2seq(model: PreTrainedModel, sites: Mapping[Site, Sequence[LayerShape]]) -> None:
    """Raise `ConfigError` if an attached encoder-decoder model gives other results than its own forward.

    The model computes packed requests with different prefixes, by the plans of training and of the engine. Its own
    forward computes each alone: texts without a change, and random prefixes with their rows inside each attention
    module. Half precision is compared in fp32.

    Args:
        model: Attached model.
        sites: Heads of every layer by site.
    """
    what, facts = f"cannot attach {type(model).__name__} ({model.config.model_type})", seq2seq_facts(model)
    positions = FAMILIES[model.config.model_type].positions
    for stack, least in ((model.get_encoder(), ENCODER_TEXT), (model.get_decoder(), DECODER_TEXT)):
        if positions(stack) < least:
            msg = f"{what}: expected at least {least} positions of {type(stack).__name__}, got {positions(stack)}"
            raise ConfigError(msg)
    head = find_seq2seq_head(model)  # while its layer has no hooks of `float32_weights`
    try:
        with float32_weights(model) as (dtype, limit):
            packed = PackedSeq2Seq(model, sites, head, BACKEND, dtype)
            errors: dict[str, float] = {}
            for name, got, expected in _compared(packed, facts):
                errors[name] = max(errors.get(name, 0.0), relative_error(got, expected))
    except FAILURES as e:
        msg = f"{what}: the comparison with its own forward fails: {type(e).__name__}: {e}"
        raise ConfigError(msg) from e
    logger.debug("%s: relative errors %s, limit %.0e", type(model).__name__, errors, limit)
    if wrong := [f"{name} (relative error {e:.0e})" for name, e in errors.items() if not e < limit]:
        msg = f"{what}: its results differ from its own forward: {'; '.join(wrong)}; run it with transformers alone"
        raise ConfigError(msg)


@torch.no_grad()
def _compared(packed: PackedSeq2Seq, facts: Seq2Seq) -> Iterator[Found]:
    """Logits of every feature with the expected ones."""
    model, plain = packed.model, plain_requests(packed.model, facts.pad)
    expected = _own_logits(model, plain)
    logits, text_kv = packed.texts(plain)
    for r, part, of_text in zip(plain, logits.split([len(r.ids) for r in plain]), expected, strict=True):
        yield r.name, part, of_text
    yield _labels(model, plain[0], facts)
    requests, prefixes = requests_with_prefixes(plain, text_kv)
    wanted = [expected[0][PREFIX:] if r.prefix == 0 else _brute_force(model, r, r.ids, prefixes) for r in requests]
    parts = packed.training(requests, prefixes).split([len(r.ids) for r in requests])
    yield from ((r.name, part, own_logits) for r, part, own_logits in zip(requests, parts, wanted, strict=True))
    other = torch.cat([requests[BEAMS].ids[:-NEW], requests[BEAMS].ids[-NEW:].flip(0)])
    beams = [[r.ids] for r in requests]
    beams[BEAMS].append(other)
    by_beam = [[w] for w in wanted]
    by_beam[BEAMS].append(_brute_force(model, requests[BEAMS], other, prefixes))
    for served in serve_seq2seq(packed, requests, prefixes, beams):
        yield served.step, served.logits[None], by_beam[served.request][served.beam][served.token][None]


def _brute_force(model: PreTrainedModel, request: Request, ids: Tensor, prefixes: Sequence[SitePrefix]) -> Tensor:
    """Logits ``[N, V]`` of decoder tokens with the prefix of a request inside the attention modules."""
    kv, start = ({}, 0) if request.prefix is None else (prefixes[request.prefix].kv, prefixes[request.prefix].pos_start)
    return brute_force_logits(model, request.encoder_ids, ids, kv, start)


def _own_logits(model: PreTrainedModel, requests: Sequence[Request]) -> list[Tensor]:
    """Logits ``[N, V]`` of requests without prefixes by the model's own forward."""
    with attention_of(model, ["eager"] * len(configs_of(model))):
        return [
            model(input_ids=r.encoder_ids[None], decoder_input_ids=r.ids[None], use_cache=False).logits[0]
            for r in requests
        ]


def _labels(model: PreTrainedModel, request: Request, facts: Seq2Seq) -> Found:
    """Logits of labels by the model's own shift, against those of the decoder ids that training gives it."""
    labels = request.ids
    ids = torch.tensor(facts.decoder_ids(labels.tolist()), device=labels.device).long()[:-1]
    with attention_of(model, ["eager"] * len(configs_of(model))):
        expected = model(input_ids=request.encoder_ids[None], labels=labels[None], use_cache=False).logits[0]
        got = model(input_ids=request.encoder_ids[None], decoder_input_ids=ids[None], use_cache=False).logits[0]
    return "decoder tokens of labels", got, expected
