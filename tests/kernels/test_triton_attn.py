"""The Triton kernels in Triton's interpreter, with the shipped tile sizes, against the specification.

`make gpu` runs the same cases on a device.
"""

import dataclasses

import pytest
import torch

from prefixfast_kernels import launch
from prefixfast_kernels.inputs import AttnOptions
from prefixfast_kernels.testing.packed_cases import CASES, OUTPUT_NAMES, Case, output_errors, run_triton
from prefixfast_kernels.testing.packed_problem import PackedProblem
from prefixfast_kernels.testing.tables import Request
from prefixfast_kernels.testing.tolerance import FLOOR, relative_error, within_tolerance
from prefixfast_kernels.tile_configs import KERNELS
from prefixfast_kernels.tile_selection import TileSizes, tile_sizes

pytest.importorskip("triton")
CPU = torch.device("cpu")
# The interpreter truncates to bf16 where a device rounds to nearest: one unit in the last place instead of a half.
INTERPRETER_FLOOR = FLOOR | {torch.bfloat16: 8e-3}
QUICK = ("one each, short", "infix", "chunks in the arena, window", "none", "dim 80")


def case_sizes(case: Case, dtype: torch.dtype) -> TileSizes:
    """Shipped tile sizes for the heads of a case."""
    hq, h, d = case.heads
    return tile_sizes(CPU, dtype, ((hq // h, d),))._replace(depth=case.depth)


def assert_equals_the_specification(name: str, dtype: torch.dtype) -> None:
    got, same_dtype = output_errors(CASES[name], dtype, case_sizes(CASES[name], dtype), run_triton)
    assert within_tolerance(got, same_dtype, INTERPRETER_FLOOR[dtype]), dict(zip(OUTPUT_NAMES, got, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_specification(name):
    assert_equals_the_specification(name, torch.float16)


def cases_of_other_dtypes():
    """Cases and dtypes, of which the quick ones run by default. Small tiles make fp32 slow in the interpreter."""
    for name in CASES:
        for dtype, quick in ((torch.float32, QUICK[1:4:2]), (torch.bfloat16, QUICK)):
            yield pytest.param(name, dtype, marks=() if name in quick else pytest.mark.long, id=f"{name}-{dtype}")


@pytest.mark.parametrize(("name", "dtype"), cases_of_other_dtypes())
def test_equals_the_specification_in_other_dtypes(name, dtype):
    assert_equals_the_specification(name, dtype)


def test_cases_repeat_every_loop_and_sum():
    """At the shipped sizes, long cases run every loop at least three times and add at least two partial sums."""
    case = CASES["one for all"]
    sizes = case_sizes(case, torch.float16)
    hq, h, d = case.heads
    q, k = torch.empty(1, hq, d, dtype=torch.float16), torch.empty(1, h, d, dtype=torch.float16)
    args = {kernel: launch.tile_args(kernel, q, k, sizes, AttnOptions(1.0)) for kernel in KERNELS}
    lengths, tables = [r.length for r in case.requests], case.problem(sizes).tables
    for kernel in ("prefix_fwd", "prefix_bwd_dq"):
        assert min(case.blocks[0], max(lengths)) // args[kernel]["BN"] >= 3, "whole tiles of the block and of the keys"
    assert max(lengths) // args["prefix_bwd_kv"]["TOKENS"] >= 3
    tokens = args["prefix_bwd_block"]["TOKENS"]
    slices = launch.num_slices(len(tables.block_tiles) * h, len(tables.user), tokens, CPU)
    assert slices >= 2
    assert sum(lengths) / slices / tokens >= 3


SMALL = Case(
    (Request(20, ((0, True),)), Request(1, ((1, True),)), Request(33, ((0, True),))), (6, 13), (4, 2, 16), window=30
)


def test_the_bias_has_its_right_place_in_every_kernel():
    """A shifted, dropped or exchanged bias changes the output and all gradients."""
    case, sizes = dataclasses.replace(SMALL, window=0, causal=False, max_distance=25), TileSizes(8, 16, 16, depth=2)
    good, same_dtype = output_errors(case, torch.float32, sizes, run_triton)
    assert within_tolerance(good, same_dtype, FLOOR[torch.float32])
    for change in (lambda b: b.roll(1, 1), lambda b: b.roll(1, 0), lambda b: b.flip(1), lambda _: None):

        def run(p, case, sizes, change=change):
            return run_triton(dataclasses.replace(p, bias=change(p.bias)), case, sizes)

        bad, _ = output_errors(case, torch.float32, sizes, run)
        assert min(bad) > 0.01


def changed(p: PackedProblem, **tables) -> PackedProblem:
    """The problem with some tables replaced."""
    return dataclasses.replace(p, tables=p.tables._replace(**tables))


MISTAKES = {
    "prefix row off by one": lambda p: changed(p, block=p.tables.block + torch.tensor([1, 0], dtype=torch.int32)),
    "prefix one row short": lambda p: changed(p, block=p.tables.block - torch.tensor([0, 1], dtype=torch.int32)),
    "blocks exchanged": lambda p: changed(p, block=p.tables.block.flip(0)),
    "a tile missing": lambda p: changed(p, tiles=p.tables.tiles[1:]),
    "a key tile missing": lambda p: changed(p, key_tiles=p.tables.key_tiles[1:]),
    "a block tile missing": lambda p: changed(p, block_tiles=p.tables.block_tiles[:-1]),
    "a user twice": lambda p: changed(
        p, user=p.tables.user.clone().index_fill_(0, torch.tensor([0]), int(p.tables.user[1]))
    ),
    "window off by one": lambda p: changed(
        p, use=p.tables.use + torch.tensor([0, 1, 0], dtype=torch.int32), user_pos=p.tables.user_pos + 1
    ),
    "a neighbour's keys": lambda p: changed(
        p,
        seg=p.tables.seg
        + torch.tensor([0, 0, 1, 0], dtype=torch.int32) * (torch.arange(len(p.tables.seg)) == 0)[:, None].int(),
    ),
    "log to base 2": lambda p: p,
    "gradient of one slice": lambda p: p,
}


SMALL_SIZES = TileSizes(8, 16, 16, depth=1)


def test_right_results_are_within_tolerance():
    good, same_dtype = output_errors(SMALL, torch.float32, SMALL_SIZES, run_triton)
    assert within_tolerance(good, same_dtype, FLOOR[torch.float32])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_results_are_out_of_tolerance(mistake, monkeypatch):

    def run(p, case, sizes):
        got = run_triton(MISTAKES[mistake](p), case, sizes)
        return [t / (0.6931 if i == 1 and mistake == "log to base 2" else 1) for i, t in enumerate(got)]

    if mistake == "gradient of one slice":
        from prefixfast_kernels import prefix_bwd

        real = prefix_bwd.prefix_bwd_sum
        monkeypatch.setattr(prefix_bwd, "prefix_bwd_sum", _HalfSum(real))
    bad, same_dtype = output_errors(SMALL, torch.float32, SMALL_SIZES, run)
    assert not within_tolerance(bad, same_dtype, FLOOR[torch.float32])


class _HalfSum:
    """A kernel `prefix_bwd_sum` that leaves out half of the slices."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch_kernel(parts_k, parts_v, dpk, dpv, block_tiles, block, slices, **kwargs):
            return self.kernel[grid](parts_k, parts_v, dpk, dpv, block_tiles, block, slices // 2, **kwargs)

        return launch_kernel


def test_equal_inputs_give_equal_bits():
    p = SMALL.problem(SMALL_SIZES).cast(torch.float16)
    first, second = (run_triton(p, SMALL, SMALL_SIZES) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_fused_backward_equals_the_plain_one():
    """If every query sees at most one short block, `prefix_bwd_block` computes the prefix part of dQ."""
    case, sizes = dataclasses.replace(SMALL, window=0), TileSizes(8, 16, 16)
    p = case.problem(sizes).cast(torch.float32)
    fused, plain = (run_triton(p, case, sizes._replace(depth=d)) for d in (1, 2))
    assert all(relative_error(a, b) < 2e-6 for a, b in zip(fused, plain, strict=True))
