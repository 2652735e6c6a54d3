"""Plans of encoder-decoder bases, and the attention function that runs them, against attention over joined keys."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prefixfast.attention.hf_interface import TAG, SiteTag, prefixfast_attention
from prefixfast.attention.plan import AttentionCall, PlannedPrefix, PrefixUse, SitePrefixes, plain_plan, prefix_rows
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan, plain_seq2seq_plan, seq2seq_training_plan
from prefixfast.config.sites import SITES, Site
from prefixfast_kernels.tile_selection import Backend

LENGTHS, ENCODER_LENGTHS = [7, 4, 1, 9], [6, 11, 1, 5]
ROWS: list[dict[Site, int]] = [{"enc": 3, "self": 5, "cross": 2}, {"cross": 4}, {"enc": 6}]  # of each prefix
USED = [[0], [1, 0], [], [2, 1]]  # prefixes of each sequence
HEADS, DIM, MAX_DISTANCE = 2, 8, 6
REFERENCE = Backend("reference")


def int32(values: list[int]) -> Any:
    return np.array(values, np.int32)


@dataclass
class Case:
    plan: Seq2SeqPlan
    kv: dict[Site, tuple[Tensor, Tensor]]  # prefix rows of all prefixes, one layer


@pytest.fixture(scope="module")
def case() -> Case:
    generator = torch.Generator().manual_seed(0)
    kv, prefixes = {}, {}
    for site in SITES:
        planned = [
            PlannedPrefix((0,) if rows.get(site) else (), rows.get(site, 0), rows.get("self", 0), True) for rows in ROWS
        ]
        total = sum(rows.get(site, 0) for rows in ROWS)
        kv[site] = tuple(torch.randn(total, HEADS, DIM, generator=generator) for _ in range(2))
        prefixes[site] = SitePrefixes(prefix_rows(planned, 1), [kv[site]])
    indptr = np.cumsum([0, *map(len, USED)]).astype(np.int32)
    used = PrefixUse(indptr, int32([number for numbers in USED for number in numbers]))
    return Case(seq2seq_training_plan(int32(LENGTHS), int32(ENCODER_LENGTHS), used, prefixes, backend=REFERENCE), kv)


def module(site: Site, bias: Tensor | None = None, layer: int = 0) -> nn.Module:
    made = nn.Module()
    made.is_causal = site == "self"
    setattr(made, TAG, SiteTag(site, layer, bias))
    return made


def qkv(site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[1, H, tokens, D]``."""
    generator = torch.Generator().manual_seed(SITES.index(site))
    queries = sum(ENCODER_LENGTHS if site == "enc" else LENGTHS)
    keys = sum(LENGTHS if site == "self" else ENCODER_LENGTHS)
    q, k, v = (torch.randn(1, HEADS, n, DIM, generator=generator) for n in (queries, keys, keys))
    return q, k, v


def joined(case: Case, site: Site, bias: Tensor | None) -> Tensor:
    """Output ``[N, H, D]`` of attention of each sequence alone over its prefix rows and its keys."""
    q, k, v = (t[0] for t in qkv(site))
    starts = np.cumsum([0, *(rows.get(site, 0) for rows in ROWS)])
    outs, first, key = [], 0, 0
    for queries, keys, used in zip(
        ENCODER_LENGTHS if site == "enc" else LENGTHS, LENGTHS if site == "self" else ENCODER_LENGTHS, USED, strict=True
    ):
        index = torch.cat([torch.arange(starts[p], starts[p + 1]) for p in used] or [torch.arange(0)])
        pk, pv = (t[index].transpose(0, 1) for t in case.kv[site])
        all_k, all_v = torch.cat([pk, k[:, key : key + keys]], 1), torch.cat([pv, v[:, key : key + keys]], 1)
        scores = q[:, first : first + queries] @ all_k.transpose(1, 2) * 0.3
        distance = torch.arange(-len(index), keys)[None] - torch.arange(queries)[:, None]
        if bias is not None:
            scores = scores + bias[:, distance.clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE]
        if site == "self":
            scores = scores.masked_fill(distance > 0, float("-inf"))
        outs.append(scores.softmax(-1) @ all_v)
        first, key = first + queries, key + keys
    return torch.cat(outs, 1).transpose(0, 1)


@pytest.mark.parametrize(("site", "biased"), [(s, b) for s in SITES for b in (False, True) if s != "cross" or not b])
def test_each_site_is_attention_over_joined_keys(case: Case, site: Site, *, biased: bool) -> None:
    bias = torch.randn(HEADS, 2 * MAX_DISTANCE + 1, generator=torch.Generator().manual_seed(9)) if biased else None
    out, _ = prefixfast_attention(
        module(site, bias), *qkv(site), None, scaling=0.3, prefixfast=case.plan, position_bias=torch.zeros(1)
    )
    torch.testing.assert_close(out[0], joined(case, site, bias), rtol=1e-5, atol=1e-5)


def test_a_swap_of_two_sites_is_seen(case: Case) -> None:
    swapped = Seq2SeqPlan(case.plan.at("self"), replace(case.plan.cross, prefix=[case.kv["self"]]), case.plan.encoder)
    out, _ = prefixfast_attention(module("cross"), *qkv("cross"), None, scaling=0.3, prefixfast=swapped)
    assert (out[0] - joined(case, "cross", None)).abs().max() > 0.1


def test_positions_count_pos_start_in_the_decoder_only(case: Case) -> None:
    starts = [5, 5, 0, 0]
    expected = [start + t for start, n in zip(starts, LENGTHS, strict=True) for t in range(n)]
    assert case.plan.position_ids[0].tolist() == expected
    assert case.plan.at("enc").position_ids[0].tolist() == [t for n in ENCODER_LENGTHS for t in range(n)]


def test_only_causal_attention_has_a_padded_layout(case: Case) -> None:
    sizes = {}
    for site in SITES:
        (tables,) = case.plan.at(site).packed or ()
        sizes[site] = [len(table) for table in (tables.bucket, tables.gather, tables.scatter)]
    assert sizes["self"][2] == sum(LENGTHS)
    assert sizes["enc"] == sizes["cross"] == [0, 0, 0]
    kinds = {site: (p.causal, p.square, p.num_keys) for site in SITES for p in [case.plan.at(site)]}
    expected = {"enc": (False, True, None), "self": (True, True, None)}
    assert kinds == {**expected, "cross": (False, False, sum(ENCODER_LENGTHS))}


def test_tokens_given_twice_count_once() -> None:
    """On CPUs a single token is given twice, so that its products round as those of several tokens."""
    plan = plain_seq2seq_plan([1], [1], backend=REFERENCE)
    generator = torch.Generator().manual_seed(3)
    once = [torch.randn(1, HEADS, 1, DIM, generator=generator) for _ in range(3)]
    for site in SITES:
        twice = [t.expand(-1, -1, 2, -1) for t in once]
        out, _ = prefixfast_attention(module(site), *twice, None, prefixfast=plan)
        torch.testing.assert_close(out, once[2].transpose(1, 2).expand(-1, 2, -1, -1))


def test_probes_see_every_site(case: Case) -> None:
    seen: list[AttentionCall] = []
    plan = case.plan.with_probe(seen.append)
    for layer, site in enumerate(SITES):
        prefixfast_attention(module(site), *qkv(site), None, prefixfast=plan)
        assert (seen[layer].site, len(seen[layer].q), len(seen[layer].k)) == (
            site,
            qkv(site)[0].shape[2],
            qkv(site)[1].shape[2],
        )


def test_logits_at_is_that_of_the_decoder(case: Case) -> None:
    index = torch.tensor([3, 1])
    plan = case.plan.with_logits_at(index)
    assert plan.logits_at is index
    assert plan.cross is case.plan.cross
    assert plan.backend is REFERENCE or plan.backend.name == "reference"
    assert plan.decode is None


def test_calls_that_do_not_fit_the_base_are_refused(case: Case) -> None:
    plain = nn.Module()
    plain.layer_idx, plain.is_causal = 0, True
    tensors, decoder_only = qkv("self"), plain_plan(LENGTHS, backend=REFERENCE)
    marker, real = torch.zeros(1), torch.zeros(1, HEADS, sum(LENGTHS), sum(LENGTHS))
    with pytest.raises(RuntimeError, match="belongs to a decoder-only base"):
        prefixfast_attention(plain, *tensors, None, prefixfast=case.plan)
    with pytest.raises(RuntimeError, match="belongs to an encoder-decoder base"):
        prefixfast_attention(module("self"), *tensors, None, prefixfast=decoder_only)
    with pytest.raises(RuntimeError, match="passes position_bias"):
        prefixfast_attention(module("self"), *tensors, None, prefixfast=case.plan, position_bias=real)
    with pytest.raises(RuntimeError, match="passes position_bias"):
        prefixfast_attention(plain, *tensors, None, prefixfast=decoder_only, position_bias=marker)
    with pytest.raises(RuntimeError, match="the encoder runs in a decode step"):
        prefixfast_attention(module("enc"), *qkv("enc"), None, prefixfast=replace(case.plan, encoder=None))
