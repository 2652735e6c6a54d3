"""Triton's decode attention in Triton's interpreter, with the shipped tile sizes, against the specification.

`make gpu` runs the same cases on a device.
"""

import dataclasses

import pytest
import torch

from prefixfast.attention import ops
from prefixfast.errors import ConfigError
from prefixfast_kernels import launch, tile_selection
from prefixfast_kernels.testing.decode_cases import (
    CASES,
    MODES,
    OUTPUT_NAMES,
    Case,
    case_sizes,
    make_problem,
    output_errors,
    replay_errors,
    run_reference,
    run_triton,
    steps_of_one_bucket,
)
from prefixfast_kernels.testing.decode_work import with_work
from prefixfast_kernels.testing.tables import Request, decode_tables
from prefixfast_kernels.testing.tolerance import FLOOR, relative_errors, within_tolerance

pytest.importorskip("triton")
# The interpreter truncates to bf16 where a device rounds to nearest: one unit in the last place instead of a half.
INTERPRETER_FLOOR = FLOOR | {torch.bfloat16: 8e-3}
QUICK = ("composed", "forty rows", "window, some blocks stay", "separate, window")
COMMON_MODES = ("grouped", "inline, split")
OTHER_DTYPES = [torch.float32, torch.bfloat16]


def assert_equals_the_specification(name, dtype, mode):
    got, same_dtype = output_errors(CASES[name], dtype, mode, run_triton)
    assert within_tolerance(got, same_dtype, INTERPRETER_FLOOR[dtype]), dict(zip(OUTPUT_NAMES, got, strict=True))


@pytest.mark.parametrize(
    ("name", "mode"), [(name, mode) for name in CASES for mode in COMMON_MODES if mode == "grouped" or name in QUICK]
)
def test_equals_the_specification(name, mode):
    assert_equals_the_specification(name, torch.float16, mode)


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
@pytest.mark.parametrize("name", QUICK)
def test_equals_the_specification_in_other_dtypes(name, dtype):
    assert_equals_the_specification(name, dtype, "grouped, split")


@pytest.mark.parametrize("name", QUICK[:2])
def test_equals_the_specification_with_the_grouping_of_the_cost_model(name):
    assert_equals_the_specification(name, torch.float16, "chosen")


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, *OTHER_DTYPES], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_specification_in_all_modes_and_dtypes(name, dtype, mode):
    assert_equals_the_specification(name, dtype, mode)


def test_cases_repeat_every_loop_and_merge():
    """At the shipped sizes, each loop runs at least three times and each merge has at least two partial sums."""
    case = CASES["one for all"]
    q, k = torch.empty(1, 4, 64, dtype=torch.float16), torch.empty(1, 2, 64, dtype=torch.float16)
    problems = {mode: make_problem(case, case_sizes(case, torch.float16, "cpu", mode)) for mode in MODES}
    keys = launch.decode_tile_args(q, k, problems["grouped"].users)["BN"]
    assert min(case.blocks[0], max(case.lens)) // keys >= 3
    assert len(problems["inline"].tables.work) == len(case.lens), "whole rows"
    assert len(problems["inline"].tables.part) == 0, "one launch"
    for mode in ("grouped, split", "inline, split"):
        assert int(problems[mode].tables.part_indptr.diff().min()) >= 2
    assert int((problems["grouped, split"].tables.work[:, 0] >= 0).sum()) >= 2, "the block is split"
    many = CASES["forty rows of eight heads"]
    sizes = case_sizes(many, torch.float16, "cpu", "grouped")
    assert int(make_problem(many, sizes).tables.user_indptr.diff().max()) > 3 * sizes.users, "a group of several tiles"


# ---- wrong tables ----

SMALL = Case(
    (40, 85, 90, 7),
    (((0, True),), ((0, True), (1, False)), ((1, True),), ((0, True),)),
    (6, 33),
    (6, 2, 16),
    window=100,
)


def changed(p, **tables):
    """The problem with some tables replaced."""
    return dataclasses.replace(p, tables=p.tables._replace(**tables))


def add_to_work(p, column, number, *, group):
    """The problem with a number added to a column of the work, in group items or in row items."""
    work = p.tables.work.clone()
    work[(work[:, 0] >= 0) == group, column] += number
    return changed(p, work=work)


def swap_first_two(t):
    """The table with its first two entries swapped."""
    return torch.cat([t[:2].flip(0), t[2:]])


MISTAKES = {
    "prefix row off by one": lambda p: changed(p, block=p.tables.block + torch.tensor([1, 0], dtype=torch.int32)),
    "blocks exchanged": lambda p: changed(p, block=p.tables.block.flip(0)),
    "a group item missing": lambda p: changed(p, work=p.tables.work[1:]),
    "a row item missing": lambda p: changed(p, work=p.tables.work[:-1]),
    "last row of a group item missing": lambda p: add_to_work(p, 4, -1, group=True),
    "last key of a row item missing": lambda p: add_to_work(p, 4, -1, group=False),
    "first row of a group item missing": lambda p: add_to_work(p, 3, 1, group=True),
    "one user missing in a group": lambda p: add_to_work(p, 2, -1, group=True),
    "two users swapped": lambda p: changed(p, user=swap_first_two(p.tables.user)),
    "window position off by 30": lambda p: changed(p, user_pos=p.tables.user_pos + 30),
    "window slides over all": lambda p: changed(
        p, user_slides=p.tables.user_slides * 0 + 1, use=p.tables.use.clone().index_fill_(1, torch.tensor([2]), 1)
    ),
    "grouped blocks read by the rows too": lambda p: changed(p, grouped=p.tables.grouped * 0),
    "partial sums of another row": lambda p: changed(p, part=p.tables.part.roll(1)),
    "a partial sum missing": lambda p: changed(
        p, part_indptr=p.tables.part_indptr - (torch.arange(len(p.tables.part_indptr)) == 4).int()
    ),
    "two rows of the slot table swapped": lambda p: changed(p, row=swap_first_two(p.tables.row)),
    "one key missing": lambda p: changed(p, lens=p.tables.lens - 1),
    "log to base 2": lambda p: p,
}


def test_right_tables_are_within_tolerance():
    assert within_tolerance(*output_errors(SMALL, torch.float32, "grouped", run_triton), FLOOR[torch.float32])


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_tables_are_out_of_tolerance(mistake):
    def run(p):
        p = MISTAKES[mistake](p)
        # Wrong slots must not read outside the arena.
        o, lse = run_triton(dataclasses.replace(p, slot_table=p.slot_table.clamp(max=len(p.k_arena) - 1)))
        return o, lse / (0.6931 if mistake == "log to base 2" else 1)

    assert not within_tolerance(*output_errors(SMALL, torch.float32, "grouped", run), FLOOR[torch.float32])


@pytest.mark.parametrize("mode", ["grouped", "inline"])
def test_a_wrong_bias_is_out_of_tolerance(mode):
    case = dataclasses.replace(SMALL, window=0, max_distance=60)
    for change in (lambda b: b.roll(1, 1), lambda b: b.roll(1, 0), lambda b: b.flip(1), lambda _: None):

        def run(p, change=change):
            return run_triton(dataclasses.replace(p, bias=change(p.bias)))

        bad, _ = output_errors(case, torch.float32, mode, run)
        assert min(bad) > 0.01


# ---- other tables of the same shapes ----


def test_equal_inputs_give_equal_bits():
    p = make_problem(SMALL, case_sizes(SMALL, torch.float16, "cpu", "grouped, split")).cast(torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(run_triton(p), run_triton(p), strict=True))


@pytest.mark.parametrize("mode", ["grouped", "grouped, split"])
def test_the_numbers_of_blocks_do_not_affect_a_bit(mode):
    sees = tuple(tuple((b, True) for b in own) for own in ((0, 1), (1, 0), (0, 1), (1, 2, 1), (2, 0), (0, 1)))
    case = Case((40, 85, 90, 7, 12, 30), sees, (36, 33, 40), (6, 2, 16))
    p = make_problem(case, case_sizes(case, torch.float32, "cpu", mode)).cast(torch.float32)
    requests = [Request(0, tuple((2 - b, slides) for b, slides in own)) for own in sees]
    tables = decode_tables(list(case.lens), requests, p.tables.block.flip(0).tolist())
    other = with_work(tables._replace(row=p.tables.row), case_sizes(case, torch.float32, "cpu", mode))
    assert int(other.part_indptr.diff().max()) > 2
    renumbered = dataclasses.replace(p, tables=other)
    assert all(torch.equal(a, b) for a, b in zip(run_triton(p), run_triton(renumbered), strict=True))


def test_other_tables_in_the_same_memory_and_padding_rows():
    for o, lse, padding in replay_errors(torch.float32):
        assert max(o, lse) < 2e-6
        assert padding == 0


class Recorder:
    """A kernel that records the grid and the numbers of its launches."""

    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda **args: self.launched.append((grid, {n: v for n, v in args.items() if not torch.is_tensor(v)}))


def record_launches(monkeypatch, p):
    """Launches of a call with all tensors on `meta`, where reading a tensor is an error."""
    from prefixfast_kernels import prefix_decode

    kernels = Recorder(), Recorder()
    monkeypatch.setattr(prefix_decode, "prefix_decode", kernels[0])
    monkeypatch.setattr(prefix_decode, "decode_combine", kernels[1])
    monkeypatch.setattr(tile_selection, "chip_of", lambda _: "sm90")
    p = p.cast(torch.float16).to("meta")
    prefix_decode.attn_decode(p.inputs, p.tables, p.options, p.users)
    return [k.launched for k in kernels]


def test_the_launcher_reads_no_table(monkeypatch):
    first, second, third = (record_launches(monkeypatch, p) for p in steps_of_one_bucket())
    assert first == second == third
    assert [len(kernel) for kernel in first] == [1, 1]
    plain = launch.decode_tile_args

    def reads_a_table(q, *rest, **options):
        return plain(q, *rest, **options) | {"longest": int(q.sum())}

    monkeypatch.setattr(launch, "decode_tile_args", reads_a_table)
    with pytest.raises(RuntimeError, match="meta"):
        record_launches(monkeypatch, steps_of_one_bucket()[0])


def test_one_launch_without_partial_sums(monkeypatch):
    case = CASES["one each"]
    p = make_problem(case, case_sizes(case, torch.float16, "cpu", "inline"))
    assert [len(kernel) for kernel in record_launches(monkeypatch, p)] == [1, 0]


# ---- the operator ----


def operator_args(p, backend):
    """Arguments of `ops.attn_decode`."""
    scale, window, softcap, _ = p.options
    q, k, v, slot_table, pk, pv = p.inputs
    max_len = int(p.tables.lens.max())
    return q, k, v, pk, pv, slot_table, list(p.tables), None, max_len, scale, window, softcap, backend, p.users


@pytest.mark.parametrize("case", ["composed", "separate"])
def test_the_operator_runs_the_kernels(case):
    p = make_problem(CASES[case], case_sizes(CASES[case], torch.float32, "cpu", "grouped")).cast(torch.float32)
    got = ops.attn_decode(*operator_args(p, "triton"))
    assert max(relative_errors(got, run_reference(p.cast(torch.float64)))) < 4e-6


def test_the_operator_is_registered_properly():
    p = make_problem(SMALL, case_sizes(SMALL, torch.float32, "cpu", "grouped")).cast(torch.float32)
    p = dataclasses.replace(p, k_arena=p.k_arena.nan_to_num(), v_arena=p.v_arena.nan_to_num())
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.attn_decode.custom_op, operator_args(p, "triton"), test_utils=tests)


@pytest.mark.parametrize("change", ["float64", "no work"])
def test_a_backend_requested_by_name_does_not_fall_back(change):
    p = make_problem(SMALL, case_sizes(SMALL, torch.float32, "cpu", "grouped"))
    if change == "no work":
        p = changed(p.cast(torch.float32), work=p.tables.work[:0])
    with pytest.raises(ConfigError, match="backend 'triton': attn_decode does not support"):
        ops.attn_decode(*operator_args(p, "triton"))


def test_too_many_query_heads_for_a_tile_are_refused():
    with pytest.raises(ValueError, match="do not fit a decode tile"):
        tile_selection.decode_sizes(torch.device("cpu"), torch.float16, ((128, 64),), 1)
