"""The specification against torch's SDPA on concatenated [prefix; keys], in fp64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from prefixfast_kernels import reference
from prefixfast_kernels.inputs import AttnOptions, DecodeInputs
from prefixfast_kernels.testing.packed_problem import make_problem
from prefixfast_kernels.testing.tables import Request, decode_tables

REQUESTS = [Request(7, ((0, True),)), Request(1, ((1, True),)), Request(12, ((0, True), (1, True))), Request(5)]
BLOCKS = [6, 3]


def sdpa(p, window=0):
    """Attention of each request alone: keys and values concatenated, with an explicit mask."""
    out, group = [], p.q.shape[1] // p.k.shape[1]
    for (start, n, *_), request in zip(p.tables.seg.tolist(), REQUESTS, strict=True):
        blocks = [p.tables.block[i].tolist() for i, _ in request.blocks]
        rows = [slice(first, first + length) for first, length in blocks]
        part = slice(start, start + n)
        k = torch.cat([*(p.prefix_k[r] for r in rows), p.k[part]]).repeat_interleave(group, 1)
        v = torch.cat([*(p.prefix_v[r] for r in rows), p.v[part]]).repeat_interleave(group, 1)
        before = len(k) - n
        distance = torch.arange(n)[:, None] + before - torch.arange(len(k))[None]
        mask = (distance >= 0) & ((distance < window) if window else True)
        q, k, v = (t.transpose(0, 1) for t in (p.q[part], k, v))
        out.append(F.scaled_dot_product_attention(q, k, v, mask, scale=p.scale).transpose(0, 1))
    return torch.cat(out)


def make():
    return make_problem(REQUESTS, BLOCKS, (6, 2, 16))


def run(p, *, bias=None, **options):
    return reference.attn(p.inputs, p.tables, AttnOptions(p.scale, **options), bias)


def test_equals_sdpa_on_concatenated_keys():
    p = make()
    assert torch.allclose(run(p)[0], sdpa(p), rtol=0, atol=1e-12)


def test_equals_sdpa_with_a_sliding_window():
    p = make()
    for window in (1, 4, 9):
        assert torch.allclose(run(p, window=window)[0], sdpa(p, window), rtol=0, atol=1e-12)


def test_a_block_without_sliding_ignores_the_window():
    p = make()
    use = p.tables.use.clone()
    use[:, 2] = 0
    always = run(dataclasses.replace(p, tables=p.tables._replace(use=use)), window=1)[0]
    assert not torch.allclose(always, run(p, window=1)[0])
    # With a window of one token, each query sees only its blocks and itself.
    i, group = 3, 3
    k = torch.cat([p.prefix_k[:6], p.k[i : i + 1]]).repeat_interleave(group, 1)
    v = torch.cat([p.prefix_v[:6], p.v[i : i + 1]]).repeat_interleave(group, 1)
    q, k, v = (t.transpose(0, 1) for t in (p.q[i : i + 1], k, v))
    expected = F.scaled_dot_product_attention(q, k, v, scale=p.scale)
    assert torch.allclose(always[i : i + 1], expected.transpose(0, 1), atol=1e-12)


def test_log_sum_exp_is_natural_and_soft_cap_is_applied():
    p = make()
    _, lse = run(p)
    group = p.q.shape[1] // p.k.shape[1]
    keys = torch.cat([p.prefix_k[:6], p.k[:1]]).repeat_interleave(group, 1)
    scores = torch.einsum("hd,khd->hk", p.q[0], keys) * p.scale
    assert torch.allclose(lse[0], scores.logsumexp(-1), atol=1e-12)
    _, capped = run(p, softcap=0.5)
    assert torch.allclose(capped[0], (0.5 * torch.tanh(scores / 0.5)).logsumexp(-1), atol=1e-12)


def test_a_query_without_visible_keys_gives_zero():
    p = make()
    seg = p.tables.seg.clone()
    seg[3, 3] = 0  # the last request keeps its queries and loses its keys
    o, lse = run(dataclasses.replace(p, tables=p.tables._replace(seg=seg)))
    assert torch.equal(o[-5:], torch.zeros_like(o[-5:]))
    assert bool(lse[-5:].isneginf().all())


def test_position_bias_is_added_by_clamped_distance():
    p = make()
    bias = torch.randn(6, 2 * 4 + 1, dtype=torch.float64)
    o, _ = run(p, bias=bias)
    # Request 0, query 2: prefix rows at positions -6..-1, keys at 0..2.
    k = torch.cat([p.prefix_k[:6], p.k[:3]]).repeat_interleave(3, 1)
    v = torch.cat([p.prefix_v[:6], p.v[:3]]).repeat_interleave(3, 1)
    distance = torch.cat([torch.arange(-6, 0), torch.arange(3)]) - 2
    scores = torch.einsum("hd,khd->hk", p.q[2], k) * p.scale + bias[:, distance.clamp(-4, 4) + 4]
    assert torch.allclose(o[2], torch.einsum("hk,khd->hd", scores.softmax(-1), v), atol=1e-12)


KEYS = [4, 9, 1, 30]


def by_hand(p, requests, i, *, causal, bias):
    """Attention of one request in fp64: keys of blocks and its own, concatenated, with mask and bias written out."""
    (row, n, key, m), group = p.tables.seg[i].tolist(), p.q.shape[1] // p.k.shape[1]
    rows = [p.tables.block[b].tolist() for b, _ in requests[i].blocks]
    own = slice(key, key + m)
    k = torch.cat([*(p.prefix_k[a : a + length] for a, length in rows), p.k[own]]).repeat_interleave(group, 1)
    v = torch.cat([*(p.prefix_v[a : a + length] for a, length in rows), p.v[own]]).repeat_interleave(group, 1)
    before = len(k) - m
    distance = torch.arange(len(k))[None] - before - torch.arange(n)[:, None]
    added = torch.zeros(p.q.shape[1], n, len(k), dtype=torch.float64)
    if bias is not None:
        furthest = bias.shape[1] // 2
        added = added + bias[:, distance.clamp(-furthest, furthest) + furthest]
    if causal:
        added = added.masked_fill(distance > 0, -torch.inf)
    q, k, v = (t.transpose(0, 1) for t in (p.q[row : row + n], k, v))
    return F.scaled_dot_product_attention(q, k, v, added, scale=p.scale).transpose(0, 1)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("causal", "separate"), [(True, False), (False, False), (False, True)], ids=["self", "enc", "cross"]
)
def test_encoder_and_cross_attention_equal_sdpa(causal, separate, bias):
    requests = REQUESTS
    if separate:
        requests = [dataclasses.replace(r, keys=m) for r, m in zip(REQUESTS, KEYS, strict=True)]
    p = make_problem(requests, BLOCKS, (6, 2, 16), max_distance=5 if bias else 0)
    o, _ = run(p, bias=p.bias, causal=causal)
    expected = [by_hand(p, requests, i, causal=causal, bias=p.bias) for i in range(4)]
    assert torch.allclose(o, torch.cat(expected), rtol=0, atol=1e-12)


def test_decode_without_own_keys_sees_the_blocks_alone():
    g = torch.Generator().manual_seed(0)
    q, (k, v) = torch.randn(3, 6, 16, generator=g).double(), torch.randn(2, 40, 2, 16, generator=g).double()
    blocks, seen = [(2, 5), (10, 30)], [(0, 1), (1,), ()]
    requests = [Request(0, tuple((b, True) for b in uses)) for uses in seen]
    inputs = DecodeInputs(q, k, v, torch.zeros(3, 0, dtype=torch.int32))
    o, lse = reference.attn_decode(inputs, decode_tables([0] * 3, requests, blocks), AttnOptions(0.25))
    for i, uses in enumerate(seen[:2]):
        rows = torch.cat([torch.arange(blocks[b][0], sum(blocks[b])) for b in uses])
        keys, values = (t[rows].repeat_interleave(3, 1).transpose(0, 1) for t in (k, v))
        expected = F.scaled_dot_product_attention(q[i, :, None], keys, values, scale=0.25)[:, 0]
        assert torch.allclose(o[i], expected, rtol=0, atol=1e-12)
    assert torch.equal(o[2], torch.zeros_like(o[2]))
    assert bool(lse[2].isneginf().all())
