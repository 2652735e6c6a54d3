"""Attention of a training step in Rust against the specification in fp64, and which calls take it."""

import dataclasses

import pytest
import torch

import prefixfast
from prefixfast import _rust
from prefixfast.attention import cpu_packed, ops
from prefixfast_kernels.inputs import NeedsGrad, OutputGrad
from prefixfast_kernels.testing.packed_cases import CASES, OUTPUT_NAMES, Case, nan_filled_empty, output_errors
from prefixfast_kernels.testing.tables import Request
from prefixfast_kernels.tile_selection import TileSizes

PATHS = _rust.attend_paths()
DTYPES = [torch.float32, torch.bfloat16]
SIZES = TileSizes(16, 16, 16, 16)
OWN = {
    "many users": Case(tuple(Request(3 + 7 * i % 90, ((i // 5, True),)) for i in range(70)), (10,) * 14, (4, 2, 24)),
    "dim 6": Case((Request(65, ((0, True),)), Request(17)), (3,), (2, 1, 6)),
    "several blocks of queries": Case((Request(200, ((1, True), (0, True))),), (64, 5), (6, 3, 40)),
    "a wide window": Case((Request(20, ((0, True),)), Request(4)), (5,), (2, 2, 16), window=25),
}


def problem(case):
    return case.problem(SIZES)


def takes(case, dtype=torch.float32, *, like=None):
    p = problem(case).cast(dtype)
    with torch.no_grad():
        return cpu_packed._fits(p.tables, (len(p.inputs.q), len(p.inputs.k)), case.options(p.scale))


def is_plain(case):
    return not (case.arena or case.softcap or case.max_distance) and takes(case)


RUN = {name: case for name, case in (CASES | OWN).items() if is_plain(case)}


def test_the_cases_that_run_here_are_these():
    assert set(OWN) < set(RUN)
    assert {"one for all", "one each", "composed", "encoder", "cross", "dim 256", "none"} <= set(RUN)
    assert not {"infix", "window", "cap", "bias", "chunks in the arena", "cross, causal"} & set(RUN)


def runner(path, change=lambda p: p):
    def run(p, case, sizes):
        p = change(p)
        options = case.options(p.scale)
        with nan_filled_empty():
            o, lse = cpu_packed.attn_fwd(p.inputs, p.tables, options, path=path)
            grads = cpu_packed.attn_bwd(OutputGrad(p.do, o, lse), p.inputs, p.tables, options, NeedsGrad(), path=path)
        return [o, lse, *(g for g in grads if g is not None)]

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", RUN)
def test_outputs_and_gradients_are_those_of_the_specification(name, path, dtype):
    ours, theirs = output_errors(RUN[name], dtype, SIZES, runner(path))
    floor = 2e-6 if dtype == torch.float32 else 4e-3
    for what, error, limit in zip(OUTPUT_NAMES, ours, theirs, strict=False):
        assert error <= 2 * limit + floor, what


@pytest.mark.parametrize("mistake", ["block", "segment", "scale"])
def test_mistakes_change_the_result(mistake):
    def change(p):
        if mistake == "scale":
            return dataclasses.replace(p, scale=p.scale * 1.02)
        tables = p.tables
        if mistake == "block":
            block = tables.block.clone()
            block[0, 0] += 1
            block[0, 1] -= 1
            return dataclasses.replace(p, tables=tables._replace(block=block))
        seg = tables.seg.clone()
        seg[0, 3] -= 1
        seg[0, 1] -= 1
        seg[1, [0, 2]] -= 1
        seg[1, [1, 3]] += 1
        return dataclasses.replace(p, tables=tables._replace(seg=seg))

    ours, _ = output_errors(RUN["one each"], torch.float32, SIZES, runner(None, change))
    assert max(ours) > 1e-3


@pytest.mark.parametrize("path", PATHS)
def test_results_do_not_depend_on_threads_and_on_what_is_needed(path):
    case = RUN["many users"]
    p, threads, found = problem(case).cast(torch.float32), torch.get_num_threads(), []
    options = case.options(p.scale)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(runner(path)(p, case, SIZES))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    o, lse = found[0][:2]
    grads = cpu_packed.attn_bwd(OutputGrad(p.do, o, lse), p.inputs, p.tables, options, NeedsGrad(own=False), path=path)
    assert grads[:3] == (None, None, None)
    for got, expected in zip(grads[3:], found[0][5:], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    grads = cpu_packed.attn_bwd(
        OutputGrad(p.do, o, lse), p.inputs, p.tables, options, NeedsGrad(prefix=False), path=path
    )
    assert grads[3:] == (None, None)
    assert all(torch.equal(got, expected) for got, expected in zip(grads[:3], found[0][2:5], strict=True))


@pytest.mark.parametrize(
    ("table", "entry", "value"),
    [
        ("seg", (0, 0), 1),
        ("seg", (0, 1), 2**30),
        ("seg", (1, 2), -1),
        ("seg", (1, 3), 2**30),
        ("use", (0, 0), 9),
        ("use", (0, 0), -1),
        ("use_indptr", (1,), 99),
        ("block", (0, 0), 2**30),
        ("block", (0, 1), -3),
    ],
)
def test_tables_that_do_not_fit_are_refused(table, entry, value):
    case = RUN["one each"]
    p = problem(case).cast(torch.float32)
    wrong = getattr(p.tables, table).clone()
    wrong[entry] = value
    with pytest.raises(prefixfast.ConfigError, match="tables of 5 sequences"):
        cpu_packed.attn_fwd(p.inputs, p.tables._replace(**{table: wrong}), case.options(p.scale))


@pytest.mark.skipif(not cpu_packed.is_fast(), reason="torch's operators are used here")
def test_the_operator_takes_it_for_training_alone(monkeypatch):
    calls = []
    for name in ("attend_packed", "attend_packed_backward"):
        own = getattr(_rust, name)
        monkeypatch.setattr(_rust, name, lambda *a, own=own, name=name: (calls.append(name), own(*a))[1])

    def attend(case, dtype=torch.float32):
        p = problem(case).cast(dtype)
        leaves, options = p.leaves(), case.options(p.scale)
        numbers = (options.scale, options.window, options.softcap, options.causal, True, "torch", [0] * 4)
        out, _ = ops.attn(*leaves, list(p.tables), p.slots, p.bias, *numbers)
        out.backward(p.do)
        return calls.copy(), calls.clear()

    assert attend(RUN["one each"])[0] == ["attend_packed", "attend_packed_backward"]
    assert attend(RUN["one each"], torch.float64)[0] == []
    for other in ("infix", "window", "cap", "bias"):
        assert attend(CASES[other])[0] == [], other
    threads = torch.get_num_threads()
    try:  # a single text is divided by heads
        torch.set_num_threads(2)
        assert attend(RUN["several blocks of queries"])[0] == []
    finally:
        torch.set_num_threads(threads)
    with torch.inference_mode():
        p = problem(RUN["one each"]).cast(torch.float32)
        ops.attn(*p.inputs[:5], list(p.tables), None, None, p.scale, 0, 0.0, True, True, "torch", [0] * 4)
    assert calls == []
