"""The Triton kernels in Triton's interpreter, with the tile sizes that ship, against the specification; `make gpu` runs the same cases on a device."""

import dataclasses

import pytest
import torch

from prefixfast_kernels import launch
from prefixfast_kernels import tile_configs as tiles
from prefixfast_kernels.testing.packed_cases import CASES, FLOOR, NAMES, Case, errors, triton, within
from prefixfast_kernels.testing.tables import Problem, Request, relative_error
from prefixfast_kernels.torch_sdpa_lse import Options

pytest.importorskip("triton")
CPU = torch.device("cpu")
# The interpreter cuts bf16 off where a device rounds to nearest: one unit in the last place instead of a half.
INTERPRETED = FLOOR | {torch.bfloat16: 8e-3}
QUICK = ("one each, short", "infix", "chunks in the arena, window", "none", "dim 80")


def sizes_of(case: Case, dtype: torch.dtype) -> tiles.Sizes:
    hq, h, d = case.heads
    return tiles.sizes(CPU, dtype, ((hq // h, d),))._replace(depth=case.depth)


def check(name: str, dtype: torch.dtype) -> None:
    got, same = errors(CASES[name], dtype, sizes_of(CASES[name], dtype), triton)
    assert within(got, same, INTERPRETED[dtype]), dict(zip(NAMES, got, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_specification(name):
    check(name, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", QUICK)
def test_equals_the_specification_in_other_dtypes(name, dtype):
    check(name, dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if n not in QUICK])
def test_equals_the_specification_everywhere(name, dtype):
    check(name, dtype)


def test_loops_and_sums_are_long_enough_to_fail():
    """At the sizes that ship, the long cases take every loop at least three times and add at least two partial sums."""
    case = CASES["one for all"]
    sizes = sizes_of(case, torch.float16)
    q, k = (
        torch.empty(1, case.heads[0], case.heads[2], dtype=torch.float16),
        torch.empty(1, case.heads[1], case.heads[2], dtype=torch.float16),
    )
    how = {name: launch.tile(name, q, k, sizes, Options(1.0, 0, 0.0)) for name in tiles.KERNELS}
    longest, users, tables = (
        max(r.length for r in case.requests),
        sum(r.length for r in case.requests),
        case.problem(sizes).tables,
    )
    for name in ("prefix_fwd", "prefix_bwd_dq"):
        assert min(case.blocks[0], longest) // how[name]["BN"] >= 3, "whole tiles of the block and of the keys"
    assert longest // how["prefix_bwd_kv"]["TOKENS"] >= 3
    slices = launch.slices(
        len(tables.block_tiles) * k.shape[1], len(tables.user), how["prefix_bwd_block"]["TOKENS"], CPU
    )
    assert slices >= 2
    assert users / slices / how["prefix_bwd_block"]["TOKENS"] >= 3


SMALL = Case(
    (Request(20, ((0, True),)), Request(1, ((1, True),)), Request(33, ((0, True),))), (6, 13), (4, 2, 16), window=30
)


def changed(p: Problem, **tables) -> Problem:
    return dataclasses.replace(p, tables=p.tables._replace(**tables))


MISTAKES = {
    "prefix row off by one": lambda p: changed(p, block=p.tables.block + torch.tensor([1, 0], dtype=torch.int32)),
    "prefix one row short": lambda p: changed(p, block=p.tables.block - torch.tensor([0, 1], dtype=torch.int32)),
    "blocks exchanged": lambda p: changed(p, block=p.tables.block.flip(0)),
    "a tile forgotten": lambda p: changed(p, tiles=p.tables.tiles[1:]),
    "a key tile forgotten": lambda p: changed(p, key_tiles=p.tables.key_tiles[1:]),
    "a block tile forgotten": lambda p: changed(p, block_tiles=p.tables.block_tiles[:-1]),
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


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(mistake, monkeypatch):
    case, sizes = SMALL, tiles.Sizes(8, 16, 16, depth=1)

    def run(p, case, sizes):
        got = triton(MISTAKES[mistake](p), case, sizes)
        return [t / (0.6931 if i == 1 and mistake == "log to base 2" else 1) for i, t in enumerate(got)]

    good, same = errors(case, torch.float32, sizes, triton)
    assert within(good, same, FLOOR[torch.float32])
    if mistake == "gradient of one slice":
        from prefixfast_kernels import prefix_bwd

        real = prefix_bwd.prefix_bwd_sum
        monkeypatch.setattr(prefix_bwd, "prefix_bwd_sum", _Sliced(real))
    bad, same = errors(case, torch.float32, sizes, run)
    assert not within(bad, same, FLOOR[torch.float32])


class _Sliced:
    """The sum over slices, which leaves half of them out."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launched(parts_k, parts_v, dpk, dpv, tiles_, block, slices, **how):
            return self.kernel[grid](parts_k, parts_v, dpk, dpv, tiles_, block, slices // 2, **how)

        return launched


def test_equal_inputs_give_equal_bits():
    case, sizes = SMALL, tiles.Sizes(8, 16, 16, depth=1)
    p = case.problem(sizes).cast(torch.float16)
    first, second = (triton(p, case, sizes) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_saved_pass_over_the_prefix_changes_nothing():
    """With at most one short block a query, dQ of the prefix part comes from the kernel of the blocks."""
    case, sizes = dataclasses.replace(SMALL, window=0), tiles.Sizes(8, 16, 16)
    p = case.problem(sizes).cast(torch.float32)
    fused, plain = (triton(p, case, sizes._replace(depth=d)) for d in (1, 2))
    assert all(relative_error(a, b) < 2e-6 for a, b in zip(fused, plain, strict=True))
