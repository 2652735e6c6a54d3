"""Packed forwards of encoder-decoder models with prefixes at every subset of the sites, against the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prefixfast.attention.plan import PlannedPrefix, PrefixUse, SitePrefixes, prefix_rows
from prefixfast.attention.seq2seq_plan import seq2seq_training_plan
from prefixfast.model.base import Model
from prefixfast.model.load import load
from seq2seq import (
    FAST,
    LENGTHS,
    NAMES,
    SITES,
    SUBSETS,
    logits_of,
    make_seq2seq,
    random_kv,
    random_texts,
)

ENCODER_LENGTHS = (6, 11, 1, 40, 8, 30)
DECODER_LENGTHS = (7, 1, 4, 30, 26, 2)
KV = Mapping[str, Tensor]


def site_tensors(kvs: Sequence[KV], site: str, layers: int, shape: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of all prefixes at a site by layer, one prefix after the other."""
    none = torch.zeros(0, shape.num_kv_heads, shape.head_dim)
    return [
        tuple(torch.cat([none, *(kv[f"{site}.{i}.{x}"] for kv in kvs if f"{site}.{i}.{x}" in kv)]) for x in "kv")
        for i in range(layers)
    ]


def plan_of(model: Model, kvs: Sequence[KV], starts: Sequence[int], used: Sequence[Sequence[int]]) -> Any:
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
    lengths = [np.array(n, np.int32) for n in (DECODER_LENGTHS, ENCODER_LENGTHS)]
    return seq2seq_training_plan(*lengths, use, prefixes, backend=model.backend)


def texts() -> tuple[list[Tensor], list[Tensor]]:
    return random_texts(ENCODER_LENGTHS, seed=1), random_texts(DECODER_LENGTHS, seed=2)


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def all_logits(model: Model, kvs: Sequence[KV], starts: Sequence[int], used: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits of each request by one packed forward."""
    encoder, decoder = texts()
    plan = plan_of(model, kvs, starts, used)
    return list(model.forward(plan, torch.cat(decoder), torch.cat(encoder)).split(DECODER_LENGTHS))


def check(name: str, subsets: Sequence[Sequence[str]], backend: str) -> None:
    """Two prefixes at each subset of the sites and requests without one, packed and mixed."""
    hf, own = make_seq2seq(name), make_seq2seq(name)
    encoder, decoder = texts()
    with load(hf, backend=backend) as model, torch.no_grad():
        for number, sites in enumerate(subsets):
            kvs = [random_kv(own, {s: LENGTHS[s] for s in sites}, seed=7 + number), random_kv(own, {"cross": 4})]
            starts = [LENGTHS["self"] if "self" in sites else 0, 0]
            used = [[0], [], [1], [0], [0], []]
            got = all_logits(model, kvs, starts, used)
            for part, e, d, prefixes in zip(got, encoder, decoder, used, strict=True):
                kv, start = (kvs[prefixes[0]], starts[prefixes[0]]) if prefixes else ({}, 0)
                assert relative(part, logits_of(own, e, d, kv, start)) < 1e-5, (sites, prefixes)


@pytest.mark.parametrize("name", FAST)
def test_logits_with_three_sites_equal_the_oracle(name):
    check(name, [SITES], "torch")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.long
def test_logits_with_every_subset_of_the_sites_equal_the_oracle(name, backend):
    check(name, SUBSETS, backend)
