"""Suite ``kernels``: the kernels are checked, contenders agree, the results file names contenders that did not run."""

import dataclasses
import json

import pytest
import torch

from prefixfast.bench import kernels, merged_attention
from prefixfast.bench.attention_contenders import CONTENDERS, ON_CPU, masked
from prefixfast.bench.attention_inputs import Inputs, Shape
from prefixfast.bench.harness import WrongResultError
from prefixfast_kernels.testing.tolerance import relative_error

CPU = torch.device("cpu")
SMALL = Shape("small", 5, 7, 4, 2, (4, 2, 16))


def test_the_check_of_the_kernels_runs_in_the_interpreter():
    pytest.importorskip("triton")
    kernels.check_kernels(CPU, (torch.float32,), ("one row",))


def test_wrong_kernels_are_not_timed(monkeypatch):
    pytest.importorskip("triton")
    real = kernels.run_triton
    monkeypatch.setattr(kernels, "run_triton", lambda *args: [t * 1.01 for t in real(*args)])
    with pytest.raises(WrongResultError, match="nothing is timed"):
        kernels.check_kernels(CPU, (torch.float32,), ("one row",))


def test_contenders_agree():
    x = Inputs.make(SMALL, torch.float32, CPU)
    first, *others = (kernels._outputs(CONTENDERS[name], x) for name in ON_CPU)
    for other in others:
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(first, other, strict=True))


def test_a_wrong_prefixfast_is_not_timed(monkeypatch):
    monkeypatch.setitem(CONTENDERS, "prefixfast", lambda x: masked(x) * 1.01)
    with pytest.raises(WrongResultError, match="prefixfast differs"):
        kernels.measure(SMALL, torch.float32, CPU, rounds=1)


@pytest.mark.parametrize("distinct", [1, 2])
def test_the_merge_of_two_flash_calls_is_right(distinct, monkeypatch):
    """Plain operators replace the device's flash operators, so that merge and gradient are tested."""

    def flash(qkv, shape, *, own):
        o, lse = _plain(*qkv, shape, own=own)
        return o, lse.T, (o.new_zeros(1), o.new_zeros(1))

    def backward(call, do, shape, *, own):
        leaves = [t.detach().requires_grad_() for t in (call.q, call.k, call.v)]
        with torch.enable_grad():
            part, stat = _plain(*leaves, shape, own=own)
            share = (stat - call.lse).exp()[..., None]  # share of this call in the merged output
            value = (part * share.detach() * do).sum() + (
                share * (do * (part.detach() - call.o)).sum(-1, keepdim=True)
            ).sum()
        return torch.autograd.grad(value, leaves)

    monkeypatch.setattr(merged_attention, "_flash", flash)
    monkeypatch.setattr(merged_attention, "_flash_backward", backward)
    x = Inputs.make(dataclasses.replace(SMALL, distinct=distinct), torch.float64, CPU)
    got, expected = (kernels._outputs(f, x) for f in (merged_attention.merged, masked))
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(got, expected, strict=True))


def _plain(q, k, v, shape, *, own):
    cu_q, cu_k, _, _ = merged_attention._lengths(shape, CPU, own=own)
    outs, stats = [], []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        group = q.shape[1] // k.shape[1]
        keys, values = (t[c:d].repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->qhk", q[a:b], keys) * shape.heads[2] ** -0.5
        if own:
            scores = scores.masked_fill(torch.ones(b - a, d - c, dtype=torch.bool).triu(1)[:, None], -torch.inf)
        stats.append(scores.logsumexp(-1))
        outs.append(torch.einsum("qhk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(outs), torch.cat(stats)


def test_the_report_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "CPU_SHAPES", (SMALL,))
    monkeypatch.setattr(kernels, "ON_CPU", (*ON_CPU, "copied prefix, varlen flash"))
    kernels.run(tmp_path, dtype="auto", rounds=2, device="cpu")
    first, command, *rows = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert first["environment"]["cores"]
    assert command["suite"] == "kernels"
    assert {r["work"] for r in rows if "seconds" in r} == {"forward", "forward and backward"}
    assert [r["contender"] for r in rows if "not_run" in r] == ["copied prefix, varlen flash"]
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    assert "| small | forward | prefixfast |" in capsys.readouterr().out
