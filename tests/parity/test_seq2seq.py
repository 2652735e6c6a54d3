"""Packed forwards of encoder-decoder models with prefixes at every subset of the sites, against the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import seq2seq
from prefixfast.attention.plan import PlannedPrefix, PrefixUse, SitePrefixes, prefix_rows
from prefixfast.attention.seq2seq_plan import seq2seq_training_plan
from prefixfast.model.base import Model
from prefixfast.model.load import load
from seq2seq import (
    DISTANCES,
    FAST,
    LENGTHS,
    NAMES,
    SITES,
    SUBSETS,
    logits_of,
    random_kv,
    random_texts,
)

ENCODER_LENGTHS = (6, 11, 1, 40, 8, 30)
DECODER_LENGTHS = (7, 1, 4, 30, 26, 2)
KV = Mapping[str, Tensor]


def make(name: str, **config: Any) -> PreTrainedModel:
    """Model whose rounding errors in fp32 stay below 1e-5."""
    return seq2seq.make_seq2seq(name, spread=0.4, **config)


def site_tensors(kvs: Sequence[KV], site: str, layers: int, shape: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of all prefixes at a site by layer, one prefix after the other."""
    none = torch.zeros(0, shape.num_kv_heads, shape.head_dim)
    return [
        tuple(torch.cat([none, *(kv[f"{site}.{i}.{x}"] for kv in kvs if f"{site}.{i}.{x}" in kv)]) for x in "kv")
        for i in range(layers)
    ]


def plan_of(
    model: Model,
    kvs: Sequence[KV],
    starts: Sequence[int],
    used: Sequence[Sequence[int]],
    lengths: Sequence[Sequence[int]] = (DECODER_LENGTHS, ENCODER_LENGTHS),
) -> Any:
    """Plan of all requests, each with its prefixes."""
    prefixes = {}
    for site in SITES:
        shapes = model.sites[site]
        rows = []
        for kv, start in zip(kvs, starts, strict=True):
            layers = [i for i in range(len(shapes)) if f"{site}.{i}.k" in kv]
            length = len(kv[f"{site}.{layers[0]}.k"]) if layers else 0
            rows.append(PlannedPrefix(layers, length, start, True))
        tensors = site_tensors(kvs, site, len(shapes), shapes[0])
        prefixes[site] = SitePrefixes(prefix_rows(rows, len(shapes)), tensors)
    use = PrefixUse(
        np.cumsum([0, *map(len, used)], dtype=np.int32), np.array([n for own in used for n in own], np.int32)
    )
    counts = [np.array(n, np.int32) for n in lengths]
    return seq2seq_training_plan(*counts, use, prefixes, backend=model.backend)


def texts() -> tuple[list[Tensor], list[Tensor]]:
    return random_texts(ENCODER_LENGTHS, seed=1), random_texts(DECODER_LENGTHS, seed=2)


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def all_logits(model: Model, kvs: Sequence[KV], starts: Sequence[int], used: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of each request by one packed forward."""
    encoder, decoder = texts()
    plan = plan_of(model, kvs, starts, used)
    return list(model.forward(plan, torch.cat(decoder), torch.cat(encoder)).split(DECODER_LENGTHS))


USED = [[0], [], [1], [0], [0], []]  # prefixes of each request


def prefixes_of(hf: PreTrainedModel, number: int, sites: Sequence[str]) -> tuple[list[KV], list[int]]:
    """Tensors and first decoder positions of two prefixes, of which the first one has all of the sites."""
    kvs = [random_kv(hf, {s: LENGTHS[s] for s in sites}, seed=7 + number), random_kv(hf, {"cross": 4})]
    return kvs, [LENGTHS["self"] if "self" in sites else 0, 0]


def oracle_logits(hf: PreTrainedModel, kvs: Sequence[KV], starts: Sequence[int]) -> list[Tensor]:
    """Logits of each request alone by the oracle."""
    return [
        logits_of(hf, e, d, *((kvs[own[0]], starts[own[0]]) if own else ({}, 0)))
        for e, d, own in zip(*texts(), USED, strict=True)
    ]


def check(name: str, subsets: Sequence[Sequence[str]], backend: str) -> None:
    """Two prefixes at each subset of the sites and requests without one, packed and mixed."""
    hf, own = make(name), make(name)
    with load(hf, backend=backend) as model, torch.no_grad():
        for number, sites in enumerate(subsets):
            kvs, starts = prefixes_of(own, number, sites)
            got = all_logits(model, kvs, starts, USED)
            for part, expected, prefixes in zip(got, oracle_logits(own, kvs, starts), USED, strict=True):
                assert relative(part, expected) < 1e-5, (sites, prefixes)


@pytest.mark.parametrize("name", FAST)
def test_logits_with_three_sites_equal_the_oracle(name):
    check(name, [SITES], "torch")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.long
def test_logits_with_every_subset_of_the_sites_equal_the_oracle(name, backend):
    check(name, SUBSETS, backend)


# ---- gradients ----


def check_gradients(name: str, subsets: Sequence[Sequence[str]], backend: str) -> None:
    """Gradients of two prefixes at each subset of the sites, summed over the requests that see them."""
    hf, own = make(name), make(name)
    encoder, decoder = texts()
    own.requires_grad_(False)
    targets = random_texts(DECODER_LENGTHS, seed=3)
    with load(hf, backend=backend) as model:
        for number, sites in enumerate(subsets):
            made, starts = prefixes_of(own, number, sites)
            ours, theirs = ([{n: t.clone().requires_grad_() for n, t in kv.items()} for kv in made] for _ in range(2))
            plan = plan_of(model, ours, starts, USED).with_logits_at(torch.arange(sum(DECODER_LENGTHS)))
            losses = model.losses(plan, torch.cat(decoder), torch.cat(targets), torch.cat(encoder))
            losses.sum().backward()
            logits = torch.cat(oracle_logits(own, theirs, starts))
            expected = F.cross_entropy(logits, torch.cat(targets), reduction="none")
            expected.sum().backward()
            assert relative(losses.detach(), expected.detach()) < 1e-5
            largest = max(t.grad.abs().max() for kv in theirs for t in kv.values())
            for mine, reference in zip(ours, theirs, strict=True):
                for tensor in reference:
                    error = (mine[tensor].grad - reference[tensor].grad).abs().max() / largest
                    assert error < 1e-5, (sites, tensor, error)


@pytest.mark.parametrize("name", FAST)
def test_losses_and_gradients_equal_the_oracle(name):
    check_gradients(name, [SITES], "torch")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.long
def test_gradients_with_every_subset_of_the_sites_equal_the_oracle(name, backend):
    check_gradients(name, SUBSETS, backend)


# ---- faults that the comparison must see ----


@pytest.mark.parametrize("pair", itertools.combinations(SITES, 2), ids="-".join)
@pytest.mark.parametrize("name", FAST)
@torch.no_grad()
def test_two_sites_that_are_swapped_are_seen(name, pair):
    depth = {"num_layers": 2} if name in DISTANCES else {"encoder_layers": 2}
    own = make(name, **depth)
    kv = random_kv(own, dict.fromkeys(SITES, 4))
    other = dict(zip(pair, reversed(pair), strict=True))
    swapped = {f"{other.get((site := tensor.split('.')[0]), site)}{tensor[len(site) :]}": t for tensor, t in kv.items()}
    encoder, decoder = texts()
    used = [[0]] * len(encoder)
    with load(make(name, **depth)) as model:
        right, wrong = (all_logits(model, [given], [4], used) for given in (kv, swapped))
    for part, fault, e, d in zip(right, wrong, encoder, decoder, strict=True):
        expected = logits_of(own, e, d, kv, 4)
        assert relative(part, expected) < 1e-5
        assert relative(fault, expected) > 1e-2


@pytest.mark.parametrize("name", FAST)
@torch.inference_mode()
def test_a_request_alone_is_the_request_in_a_batch_to_the_bit(name):
    """Also with one token in the encoder, in the decoder or in both."""
    width = {"d_ff": 64} if name in DISTANCES else {}  # torch rounds the tail of a GELU over other sizes differently
    with load(make(name, **width)) as model:
        kv = random_kv(make(name, **width), {"enc": 1, "self": 2, "cross": 1})
        sizes = [(1, 1), (9, 1), (1, 6), (2, 2), (12, 7)]
        encoder, decoder = (random_texts(n, seed=5) for n in zip(*sizes, strict=True))

        def logits(chosen: Sequence[int]) -> list[Tensor]:
            lengths = [[len(texts[i]) for i in chosen] for texts in (decoder, encoder)]
            plan = plan_of(model, [kv], [2], [[0]] * len(chosen), lengths)
            ids = [torch.cat([texts[i] for i in chosen]) for texts in (decoder, encoder)]
            return list(model.forward(plan, *ids).split(lengths[0]))

        model.prepack()
        with model.run():
            together = logits(range(len(sizes)))
            for i, part in enumerate(together):
                assert torch.equal(logits([i])[0], part), sizes[i]
