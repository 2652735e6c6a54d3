"""Decode attention in Triton's interpreter, with the tiles that ship, against the specification; `make gpu` runs the same cases on a device."""

import dataclasses

import pytest
import torch

from prefixfast.attention import ops
from prefixfast.errors import ConfigError
from prefixfast_kernels import launch
from prefixfast_kernels import tile_configs as tiles
from prefixfast_kernels.testing import decode_cases
from prefixfast_kernels.testing.decode_cases import (
    CASES,
    MODES,
    NAMES,
    Case,
    errors,
    problem,
    replayed,
    sizes_of,
    specification,
    triton,
)
from prefixfast_kernels.testing.packed_cases import FLOOR, within
from prefixfast_kernels.testing.tables import relative_error
from prefixfast_kernels.torch_sdpa_lse import Options

pytest.importorskip("triton")
# The interpreter cuts bf16 off where a device rounds to nearest: one unit in the last place instead of a half.
INTERPRETED = FLOOR | {torch.bfloat16: 8e-3}
QUICK = ("composed", "forty rows", "window, some blocks stay", "separate, window")
COMMON = ("grouped", "inline, split")
OTHERS = [torch.float32, torch.bfloat16]


def check(name, dtype, mode):
    got, same = errors(CASES[name], dtype, mode, triton)
    assert within(got, same, INTERPRETED[dtype]), dict(zip(NAMES, got, strict=True))


@pytest.mark.parametrize("mode", COMMON)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_specification(name, mode):
    check(name, torch.float16, mode)


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
@pytest.mark.parametrize("name", QUICK)
def test_equals_the_specification_in_other_dtypes(name, dtype):
    check(name, dtype, "grouped, split")


@pytest.mark.parametrize("name", QUICK[:2])
def test_equals_the_specification_as_the_cost_model_chooses(name):
    check(name, torch.float16, "chosen")


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, *OTHERS], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_specification_everywhere(name, dtype, mode):
    check(name, dtype, mode)


def test_loops_and_sums_are_long_enough_to_fail():
    """At the sizes that ship, each loop is taken at least three times and each merge has at least two partial sums."""
    case = CASES["one for all"]
    q, k = torch.empty(1, 4, 64, dtype=torch.float16), torch.empty(1, 2, 64, dtype=torch.float16)
    cut = {mode: problem(case, sizes_of(case, torch.float16, "cpu", mode)) for mode in MODES}
    keys = launch.decode_tile(q, k, cut["grouped"].users, Options(1.0, 0, 0.0))["BN"]
    assert min(case.blocks[0], max(case.lens)) // keys >= 3
    assert len(cut["inline"].tables.work) == len(case.lens), "whole rows"
    assert len(cut["inline"].tables.part) == 0, "one launch"
    for mode in ("grouped, split", "inline, split"):
        assert int(cut[mode].tables.part_indptr.diff().min()) >= 2
    assert int((cut["grouped, split"].tables.work[:, 0] >= 0).sum()) >= 2, "the block is split"
    many = CASES["forty rows of eight heads"]
    tables = problem(many, sizes_of(many, torch.float16, "cpu", "grouped")).tables
    assert int(tables.user_indptr.diff().max()) > 3 * sizes_of(many, torch.float16, "cpu", "grouped").users, (
        "a group of several tiles"
    )


# ---- planted mistakes ----

SMALL = Case(
    (40, 85, 90, 7),
    (((0, True),), ((0, True), (1, False)), ((1, True),), ((0, True),)),
    (6, 33),
    (6, 2, 16),
    window=100,
)


def changed(p, **tables):
    return dataclasses.replace(p, tables=p.tables._replace(**tables))


def item(p, column, add, *, group):
    """The work with a number added to a column, of items of groups or of rows."""
    work = p.tables.work.clone()
    work[(work[:, 0] >= 0) == group, column] += add
    return changed(p, work=work)


def exchanged(t):
    """The first two entries exchanged."""
    return torch.cat([t[:2].flip(0), t[2:]])


MISTAKES = {
    "prefix row off by one": lambda p: changed(p, block=p.tables.block + torch.tensor([1, 0], dtype=torch.int32)),
    "blocks exchanged": lambda p: changed(p, block=p.tables.block.flip(0)),
    "a group forgotten": lambda p: changed(p, work=p.tables.work[1:]),
    "a row forgotten": lambda p: changed(p, work=p.tables.work[:-1]),
    "a group's last row of the block": lambda p: item(p, 4, -1, group=True),
    "a row's last key": lambda p: item(p, 4, -1, group=False),
    "a group's first row of the block": lambda p: item(p, 3, 1, group=True),
    "a user too few": lambda p: item(p, 2, -1, group=True),
    "another user": lambda p: changed(p, user=exchanged(p.tables.user)),
    "another user's window": lambda p: changed(p, user_pos=p.tables.user_pos + 30),
    "a window that slides over all": lambda p: changed(
        p, user_slides=p.tables.user_slides * 0 + 1, use=p.tables.use.clone().index_fill_(1, torch.tensor([2]), 1)
    ),
    "read twice": lambda p: changed(p, grouped=p.tables.grouped * 0),
    "another row's partial sum": lambda p: changed(p, part=p.tables.part.roll(1)),
    "a partial sum forgotten": lambda p: changed(
        p, part_indptr=p.tables.part_indptr - (torch.arange(len(p.tables.part_indptr)) == 4).int()
    ),
    "another row of the slot table": lambda p: changed(p, row=exchanged(p.tables.row)),
    "a key too few": lambda p: changed(p, lens=p.tables.lens - 1),
    "log to base 2": lambda p: p,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(mistake):
    def run(p):
        p = MISTAKES[mistake](p)
        o, lse = triton(
            dataclasses.replace(p, table=p.table.clamp(max=len(p.k_arena) - 1))
        )  # a mistake must not read outside of the arena
        return o, lse / (0.6931 if mistake == "log to base 2" else 1)

    good, same = errors(SMALL, torch.float32, "grouped", triton)
    assert within(good, same, FLOOR[torch.float32])
    bad, same = errors(SMALL, torch.float32, "grouped", run)
    assert not within(bad, same, FLOOR[torch.float32])


# ---- one shape of tables, whatever is in them ----


def test_equal_inputs_give_equal_bits():
    p = problem(SMALL, sizes_of(SMALL, torch.float16, "cpu", "grouped, split")).cast(torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(triton(p), triton(p), strict=True))


def test_other_tables_in_the_same_memory_and_dead_rows():
    for o, lse, dead in replayed(torch.float32):
        assert max(o, lse) < 2e-6
        assert dead == 0


class Recorder:
    """Stands for a kernel: keeps how it was launched."""

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda **how: self.launched.append((grid, {n: v for n, v in how.items() if not torch.is_tensor(v)}))


def launches(monkeypatch, p):
    """Grids and numbers of a call with all tensors on `meta`, where reading one is an error."""
    from prefixfast_kernels import prefix_decode

    kernels = Recorder(), Recorder()
    monkeypatch.setattr(prefix_decode, "prefix_decode", kernels[0])
    monkeypatch.setattr(prefix_decode, "decode_combine", kernels[1])
    monkeypatch.setattr(tiles, "chip", lambda _: "sm90")
    p = p.cast(torch.float16).to("meta")
    prefix_decode.attn_decode(p.q, p.k_arena, p.v_arena, None, None, p.table, p.tables, p.users, p.options)
    return [k.launched for k in kernels]


def test_the_launcher_reads_no_table(monkeypatch):
    first, second, third = (launches(monkeypatch, p) for p in decode_cases.steps())
    assert first == second == third
    assert [len(kernel) for kernel in first] == [1, 1]
    reading = launch.decode_tile
    monkeypatch.setattr(launch, "decode_tile", lambda q, *rest: reading(q, *rest) | {"longest": int(q.sum())})
    with pytest.raises(RuntimeError, match="meta"):
        launches(monkeypatch, decode_cases.steps()[0])


def test_nothing_split_and_nothing_grouped_is_one_launch(monkeypatch):
    case = CASES["one each"]
    assert [
        len(kernel) for kernel in launches(monkeypatch, problem(case, sizes_of(case, torch.float16, "cpu", "inline")))
    ] == [1, 0]


# ---- the operator ----


def decode(p, backend, users):
    given = (p.q, p.k_arena, p.v_arena, p.prefix_k, p.prefix_v, p.table, list(p.tables), None, int(p.tables.lens.max()))
    return ops.attn_decode(*given, *vars(p.options).values(), backend, users)


@pytest.mark.parametrize("case", ["composed", "separate"])
def test_the_operator_runs_it(case):
    p = problem(CASES[case], sizes_of(CASES[case], torch.float32, "cpu", "grouped")).cast(torch.float32)
    assert all(
        relative_error(a, b) < 4e-6
        for a, b in zip(decode(p, "triton", p.users), specification(p.cast(torch.float64)), strict=True)
    )


def test_the_operator_is_registered_properly():
    p = problem(SMALL, sizes_of(SMALL, torch.float32, "cpu", "grouped")).cast(torch.float32)
    given = (
        p.q,
        p.k_arena.nan_to_num(),
        p.v_arena.nan_to_num(),
        None,
        None,
        p.table,
        list(p.tables),
        None,
        90,
        *vars(p.options).values(),
        "triton",
        p.users,
    )
    torch.library.opcheck(ops.attn_decode, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("change", ["float64", "no work"])
def test_the_backend_asked_for_by_name_does_not_fall_back(change):
    p = problem(SMALL, sizes_of(SMALL, torch.float32, "cpu", "grouped"))
    if change == "no work":
        p = changed(p.cast(torch.float32), work=p.tables.work[:0])
    with pytest.raises(ConfigError, match="backend 'triton': attn_decode does not serve"):
        decode(p, "triton", p.users)


def test_a_group_that_fits_no_tile_is_refused():
    with pytest.raises(ValueError, match="do not fit a decode tile"):
        tiles.decode_sizes(torch.device("cpu"), torch.float16, ((128, 64),), 1)
