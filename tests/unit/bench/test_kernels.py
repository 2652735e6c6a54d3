"""`prefixfast bench kernels`: its gate runs in the interpreter as on a device, its contenders agree, its report says what did not run."""

import dataclasses
import json

import pytest
import torch

from prefixfast.bench import baselines, kernels
from prefixfast.bench.baselines import CONTENDERS, ON_CPU, Shape
from prefixfast_kernels.testing.tables import relative_error

CPU = torch.device("cpu")
SMALL = Shape("small", 5, 7, 4, 2, (4, 2, 16))


def test_the_gate_runs_in_the_interpreter():
    pytest.importorskip("triton")
    kernels.check(CPU, (torch.float32,), ("one row",))


def test_the_gate_stops_wrong_kernels(monkeypatch):
    pytest.importorskip("triton")
    real = kernels.triton
    monkeypatch.setattr(kernels, "triton", lambda *args: [t * 1.01 for t in real(*args)])
    with pytest.raises(RuntimeError, match="nothing is timed"):
        kernels.check(CPU, (torch.float32,), ("one row",))


def test_contenders_agree():
    x = baselines.Inputs.make(SMALL, torch.float32, CPU)
    first, *others = (kernels._outputs(CONTENDERS[name], x) for name in ON_CPU)
    for other in others:
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(first, other, strict=True))


def test_a_wrong_prefixfast_is_not_timed(monkeypatch):
    monkeypatch.setitem(baselines.CONTENDERS, "prefixfast", lambda x: baselines.masked(x) * 1.01)
    with pytest.raises(RuntimeError, match="prefixfast differs"):
        kernels.measure(SMALL, torch.float32, CPU, rounds=1)


@pytest.mark.parametrize("distinct", [1, 2])
def test_the_merge_of_two_calls_is_right(distinct, monkeypatch):
    """The device's flash operators are replaced by plain ones; the merge and the gradient through the merged statistics are ours."""

    def flash(q, k, v, shape, *, own):
        o, lse = _plain(q, k, v, shape, own=own)
        return o, lse.T, (q.new_zeros(1), q.new_zeros(1))

    def backward(do, q, k, v, o, lse, shape, state, *, own):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            part, stat = _plain(*leaves, shape, own=own)
            share = (stat - lse).exp()[..., None]  # of this part in the whole
            value = (part * share.detach() * do).sum() + (
                share * (do * (part.detach() - o)).sum(-1, keepdim=True)
            ).sum()
        return torch.autograd.grad(value, leaves)

    monkeypatch.setattr(baselines, "_flash", flash)
    monkeypatch.setattr(baselines, "_flash_backward", backward)
    x = baselines.Inputs.make(dataclasses.replace(SMALL, distinct=distinct), torch.float64, CPU)
    got, expected = (kernels._outputs(f, x) for f in (baselines.cascade, baselines.masked))
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(got, expected, strict=True))


def _plain(q, k, v, shape, *, own):
    cu_q, cu_k, _, _ = baselines._lengths(shape, CPU, own=own)
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
