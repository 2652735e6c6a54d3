"""The specification itself, against torch's SDPA on concatenated [prefix; keys] in fp64."""

import torch
import torch.nn.functional as F

from prefixfast_kernels import reference
from prefixfast_kernels.testing.tables import Request, problem

SEQUENCES = [Request(7, ((0, True),)), Request(1, ((1, True),)), Request(12, ((0, True), (1, True))), Request(5)]
BLOCKS = [6, 3]


def sdpa(p, window=0):
    """Each sequence alone, keys and values concatenated, an explicit mask."""
    out, group = [], p.q.shape[1] // p.k.shape[1]
    for (start, n, *_), s in zip(p.tables.seg.tolist(), SEQUENCES, strict=True):
        rows = [slice(*(b := p.tables.block[i].tolist())[:1], b[0] + b[1]) for i, _ in s.blocks]
        part = slice(start, start + n)
        k = torch.cat([*(p.prefix_k[r] for r in rows), p.k[part]]).repeat_interleave(group, 1)
        v = torch.cat([*(p.prefix_v[r] for r in rows), p.v[part]]).repeat_interleave(group, 1)
        before = len(k) - n
        distance = torch.arange(n)[:, None] + before - torch.arange(len(k))[None]
        mask = (distance >= 0) & ((distance < window) if window else True)
        out.append(
            F.scaled_dot_product_attention(
                p.q[part].transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), mask, scale=p.scale
            ).transpose(0, 1)
        )
    return torch.cat(out)


def make():
    return problem(SEQUENCES, BLOCKS, num_heads=6, num_kv_heads=2, head_dim=16)


def run(p, **kw):
    return reference.attn(p.q, p.k, p.v, p.prefix_k, p.prefix_v, p.tables, scale=p.scale, **kw)


def test_equals_sdpa_on_concatenated_keys():
    p = make()
    assert torch.allclose(run(p)[0], sdpa(p), rtol=0, atol=1e-12)


def test_equals_sdpa_with_a_sliding_window():
    p = make()
    for window in (1, 4, 9):
        assert torch.allclose(run(p, window=window)[0], sdpa(p, window), rtol=0, atol=1e-12)


def test_a_block_that_is_always_seen_ignores_the_window():
    p = make()
    fixed = p.tables.use.clone()
    fixed[:, 2] = 0
    always = run(
        p.__class__(
            *[getattr(p, f) for f in ("q", "k", "v", "prefix_k", "prefix_v", "do")],
            p.tables._replace(use=fixed),
            p.scale,
        ),
        window=1,
    )[0]
    assert not torch.allclose(always, run(p, window=1)[0])
    # with a window of one token each query sees its blocks and itself only
    i, group = 3, 3
    k = torch.cat([p.prefix_k[:6], p.k[i : i + 1]]).repeat_interleave(group, 1)
    v = torch.cat([p.prefix_v[:6], p.v[i : i + 1]]).repeat_interleave(group, 1)
    expected = F.scaled_dot_product_attention(
        p.q[i : i + 1].transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale=p.scale
    )
    assert torch.allclose(always[i : i + 1], expected.transpose(0, 1), atol=1e-12)


def test_log_sum_exp_is_natural_and_soft_cap_is_applied():
    p = make()
    _, lse = run(p)
    group = p.q.shape[1] // p.k.shape[1]
    scores = (
        torch.einsum("hd,khd->hk", p.q[0], torch.cat([p.prefix_k[:6], p.k[:1]]).repeat_interleave(group, 1)) * p.scale
    )
    assert torch.allclose(lse[0], scores.logsumexp(-1), atol=1e-12)
    _, capped = run(p, softcap=0.5)
    assert torch.allclose(capped[0], (0.5 * torch.tanh(scores / 0.5)).logsumexp(-1), atol=1e-12)


def test_a_query_that_sees_nothing_gives_zero():
    p = make()
    seg = p.tables.seg.clone()
    seg[3, 3] = 0  # the last sequence keeps its queries and loses its keys
    o, lse = reference.attn(p.q, p.k, p.v, p.prefix_k, p.prefix_v, p.tables._replace(seg=seg), scale=p.scale)
    assert torch.equal(o[-5:], torch.zeros_like(o[-5:]))
    assert bool(lse[-5:].isneginf().all())


def test_position_bias_is_added_by_clamped_distance():
    p = make()
    bias = torch.randn(6, 2 * 4 + 1, dtype=torch.float64)
    o, _ = run(p, bias=bias)
    # sequence 0, query 2: prefix rows at -6..-1, keys 0..2
    k = torch.cat([p.prefix_k[:6], p.k[:3]]).repeat_interleave(3, 1)
    v = torch.cat([p.prefix_v[:6], p.v[:3]]).repeat_interleave(3, 1)
    distance = torch.cat([torch.arange(-6, 0), torch.arange(3)]) - 2
    scores = torch.einsum("hd,khd->hk", p.q[2], k) * p.scale + bias[:, distance.clamp(-4, 4) + 4]
    assert torch.allclose(o[2], torch.einsum("hk,khd->hd", scores.softmax(-1), v), atol=1e-12)
