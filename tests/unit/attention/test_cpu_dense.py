"""Attention of many queries over the same keys in Rust against fp64, and that prefill uses it."""

import pytest
import torch

from prefixfast import _rust
from prefixfast.attention import cpu_dense, cpu_packed, ops
from prefixfast.attention.plan import plain_plan
from prefixfast_kernels.inputs import AttnOptions
from prefixfast_kernels.torch_mask import run_mask
from prefixfast_kernels.torch_sdpa_lse import Qkv, sdpa_lse_fwd

PATHS = _rust.attend_paths()
# Sequences, queries, keys, query heads, kv heads, head dim.
SIZES = {
    "one of each": (1, 1, 1, 1, 1, 64),
    "a block and a bit": (2, 65, 65, 4, 2, 64),
    "fewer keys": (1, 130, 3, 2, 1, 80),
    "fewer queries": (3, 17, 200, 3, 3, 6),
    "whole chunks": (1, 64, 128, 2, 2, 256),
}


def random(size, *, dtype=torch.float32, seed=0):
    n, t, s, hq, h, d = size
    g = torch.Generator().manual_seed(seed)
    # Rows hold the heads of a token, as a model gives them.
    q, k, v = (torch.randn(n, rows, heads, d, generator=g).to(dtype) for rows, heads in ((t, hq), (s, h), (s, h)))
    return Qkv(*(x.transpose(1, 2) for x in (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_is_softmax_attention(size, path, dtype):
    for causal in (False, True)[: 1 + (size[1] == size[2])]:
        qkv = random(size, dtype=dtype)
        options = AttnOptions(0.3)
        wide = Qkv(*(t.double() for t in qkv))
        seen = torch.ones(size[1], size[2]).tril() if causal else torch.ones(size[1], size[2])
        scores = wide.q.unflatten(1, (size[4], -1)) @ wide.k[:, :, None].mT * options.scale
        scores = scores.masked_fill(seen == 0, -torch.inf)
        expected = (scores.softmax(-1) @ wide.v[:, :, None]).flatten(1, 2)
        o, lse = cpu_dense.dense(qkv, options.scale, causal=causal, path=path)
        assert o.dtype == dtype
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1).flatten(1, 2), rtol=1e-5, atol=2e-5)
        tolerance = 3e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(o.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", PATHS)
def test_a_query_depends_on_no_other_query(path):
    qkv = random((1, 100, 70, 2, 1, 64))
    o, lse = cpu_dense.dense(qkv, 0.125, causal=False, path=path)
    for own in (slice(0, 1), slice(99, 100), slice(3, 70)):
        few = Qkv(qkv.q[:, :, own], qkv.k, qkv.v)
        found = cpu_dense.dense(few, 0.125, causal=False, path=path)
        assert torch.equal(found[0], o[:, :, own])
        assert torch.equal(found[1], lse[:, :, own])


@pytest.mark.parametrize("path", PATHS)
def test_hidden_and_infinite_scores(path):
    q, k, v = random((1, 20, 90, 1, 1, 64))
    k[:, :, :70] = -torch.inf
    q = q.abs() + 0.1
    o, lse = cpu_dense.dense(Qkv(q, k, v), 0.125, causal=False, path=path)
    own = cpu_dense.dense(Qkv(q, k[:, :, 70:], v[:, :, 70:]), 0.125, causal=False, path=path)
    torch.testing.assert_close((o, lse), own, rtol=1e-5, atol=1e-6)
    o, lse = cpu_dense.dense(Qkv(q, k[:, :, :70], v[:, :, :70]), 0.125, causal=False, path=path)
    assert not o.any()
    assert (lse == -torch.inf).all()
    k[0, 0, 75, 0] = torch.nan
    assert cpu_dense.dense(Qkv(q, k, v), 0.125, causal=False, path=path)[0].isnan().all()


def test_what_rust_does_not_compute_stays_with_torch():
    qkv, options = random((1, 70, 70, 2, 1, 64)), AttnOptions(0.125)
    window = run_mask(0, (70, 70), 5, None, torch.float32, torch.device("cpu"))
    wide = Qkv(*(t.double() for t in qkv))
    for args in ((qkv, window, options), (qkv, None, AttnOptions(0.125, 0, 3.0)), (wide, None, options)):
        got, expected = cpu_dense.sdpa_lse(*args, causal=True), sdpa_lse_fwd(*args, causal=True)
        assert torch.equal(got[0], expected[0])


@pytest.mark.skipif("avx512" not in PATHS, reason="torch's operator is as fast without AVX-512")
def test_inference_and_training_over_many_queries_call_rust(monkeypatch):
    calls, dense = [], cpu_dense.dense
    monkeypatch.setattr(cpu_dense, "dense", lambda *a, **k: calls.append(a) or dense(*a, **k))
    plan = plain_plan([70, 3, 90], backend=ops.Backend("torch"))
    assert plan.packed is not None
    q, weight = torch.randn(163, 2, 64), torch.randn(163, 2, 64)
    args = (None, None, list(plan.packed[0]), None, None, 0.125, 0, 0.0, True, True, "torch", list(plan.backend.sizes))
    with torch.inference_mode():
        x = q.clone()
        found = ops.attn(x, x, x, *args)[0]
    assert len(calls) == 2  # the sequence of 3 tokens is too short

    def trained():
        q.grad, own = None, q.requires_grad_()
        o = ops.attn(own, own, own, *args)[0]
        (o * weight).sum().backward()
        return o.detach(), q.grad

    calls.clear()
    monkeypatch.setattr(cpu_packed, "is_used", lambda *_: False)  # as with a soft cap or a window
    fast = trained()
    assert calls
    monkeypatch.setattr(cpu_dense, "is_fast", lambda: False)
    calls.clear()
    slow = trained()
    assert not calls
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, slow[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_report_names_rust_where_long_texts_call_it(monkeypatch, is_fast):
    calls, cpu, backend = [], torch.device("cpu"), ops.Backend("torch")
    monkeypatch.setattr(cpu_dense, "dense", lambda qkv, *_, **__: calls.append(qkv) or sdpa_lse_fwd(*call, causal=True))
    monkeypatch.setattr(cpu_dense, "is_fast", lambda: is_fast)
    for dtype, head_dim in ((torch.float32, 64), (torch.bfloat16, 64), (torch.float64, 64), (torch.float32, 257)):
        qkv = Qkv(*(t.to(dtype) for t in random((1, 70, 70, 2, 1, head_dim))))
        call = (qkv, None, AttnOptions(0.125))
        calls.clear()
        cpu_dense.sdpa_lse(*call, causal=True)
        found = ops.explain_backends(backend, cpu, dtype, head_dim)
        assert ("rust" in found["attn"].partition(";")[0]) == bool(calls)
        assert bool(calls) == (is_fast and dtype != torch.float64 and head_dim == 64)
