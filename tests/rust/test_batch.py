"""`plan_packed` and `Scheduler` against slow reference implementations, and hostile input."""

import itertools
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from oracles import int32
from prefixfast._rust import Scheduler, StepHeader, plan_packed
from prefixfast.attention.plan import section
from prefixfast.errors import CapacityError, ConfigError, PrefixFastError, RequestError, UnknownPrefixError
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.testing.decode_work import with_work
from prefixfast_kernels.tile_selection import NO_WORK, DecodeSizes

PREFIX_ROWS = [
    [0, 3, 3, 1, 0],
    [16, 0, 7, 0, 0],
    [32, 5, 0, 0, 0],
    [48, 20, 20, 1, 0],
    [80, 6, 6, 1, 1],
    [96, 2, 9, 1, 2],
]
seeded = settings(derandomize=True, deadline=None, max_examples=100)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 29)), max_size=12),
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)),
    st.integers(1, 5),
)
@seeded
def test_plan_packed(sequences: list[tuple[int, list[int], int]], tiles: tuple[int, int, int], buckets: int) -> None:
    lengths, prefixes = [n for n, *_ in sequences], [used for _, used, _ in sequences]
    splits = [split % n for n, _, split in sequences]
    indptr = np.cumsum([0, *map(len, prefixes)])
    flat = int32([p for used in prefixes for p in used])
    sizes = {"tiles": tiles, "buckets": buckets, "last_prompt_token": int32(splits)}
    plan = plan_packed(int32(lengths), int32(indptr), flat, int32(PREFIX_ROWS, 5), **sizes)
    assert plan.buffer is plan.buffer
    assert plan.buffer.dtype == np.int32
    assert plan.buffer.flags.c_contiguous
    found = oracles.tables(plan.buffer, plan.sections)
    for name, expected in oracles.plan_packed(lengths, prefixes, PREFIX_ROWS, tiles, splits=splits).items():
        assert found.pop(name) == expected, name
    check_padded(lengths, buckets, found)
    assert not found
    assert plan.reach == max((n + sum(PREFIX_ROWS[p][1] for p in used) for n, used, _ in sequences), default=0)


def check_padded(lengths: list[int], buckets: int, found: dict[str, list]) -> None:
    layout, gather, scatter = found.pop("bucket"), found.pop("gather"), found.pop("scatter")
    assert len(gather) == sum(n * size for n, size in layout) == oracles.least_padding(lengths, buckets)
    assert [gather[place] for place in scatter] == list(range(sum(lengths)))
    firsts = np.cumsum([0, *lengths])
    order = sorted(range(len(lengths)), key=lambda s: (lengths[s], s))
    padded = [size for n, size in layout for _ in range(n)]
    assert gather == [
        firsts[s] + min(t, lengths[s] - 1) for s, size in zip(order, padded, strict=True) for t in range(size)
    ]


def test_plan_packed_refuses() -> None:
    good = {
        "lengths": int32([3]),
        "prefix_indptr": int32([0, 1]),
        "prefix": int32([0]),
        "prefix_rows": int32(PREFIX_ROWS, 5),
        "tiles": (4, 4, 4),
    }
    wrong: list[tuple[type[Exception], dict[str, object]]] = [
        (ConfigError, {"lengths": int32([0])}),
        (ConfigError, {"lengths": int32([-3])}),
        (CapacityError, {"lengths": int32([2**31 - 1])}),
        (ConfigError, {"lengths": int32([])}),
        (ConfigError, {"prefix_indptr": int32([])}),
        (ConfigError, {"prefix_indptr": int32([0, 2])}),
        (ConfigError, {"prefix_indptr": int32([1, 1])}),
        (ConfigError, {"prefix_rows": int32([[0, -1, 0, 0, 0]], 5)}),
        (ConfigError, {"prefix_rows": int32([[0, 1, 2**31 - 1, 0, 0]], 5)}),
        (ConfigError, {"prefix_rows": int32([[0, 1, 0, 2, 0]], 5)}),
        (ConfigError, {"prefix_rows": int32([[0, 1, 0, 1, 3]], 5)}),
        (ConfigError, {"last_prompt_token": int32([3])}),
        (ConfigError, {"last_prompt_token": int32([-1])}),
        (ConfigError, {"last_prompt_token": int32([0, 0])}),
        (ConfigError, {"prefix_rows": int32([0, 1, 2, 3], 4)}),
        (ConfigError, {"prefix_rows": int32(PREFIX_ROWS, 5)[:, ::-1]}),
        (ConfigError, {"tiles": (1, -1, 1)}),
        (ConfigError, {"buckets": 0}),
        (ConfigError, {"buckets": -1}),
        (UnknownPrefixError, {"prefix": int32([6])}),
        (UnknownPrefixError, {"prefix": int32([-1])}),
        (UnknownPrefixError, {"prefix_rows": np.zeros((0, 5), np.int32)}),
        (ConfigError, {"key_lengths": int32([0])}),
        (ConfigError, {"key_lengths": int32([3, 3])}),
        (ConfigError, {"key_lengths": int32([3]), "prefix_rows": int32([[0, 1, 0, 1, 1]], 5)}),
        (TypeError, {"prefix_rows": int32(PREFIX_ROWS)}),
        (TypeError, {"lengths": np.array([3])}),
        (TypeError, {"tiles": (1.5, 1, 1)}),
    ]
    assert plan_packed(**good).reach == 6
    for error, change in wrong:
        with pytest.raises(error):
            plan_packed(**{**good, **change})
    with pytest.raises(UnknownPrefixError) as caught:
        plan_packed(**{**good, "prefix": int32([9])})
    assert str(caught.value).startswith("prefix 9 is not known")
    many = {**good, "lengths": int32([2**26, 1, 1]), "prefix_indptr": int32([0, 1, 1, 1]), "buckets": 1}
    with pytest.raises(CapacityError, match="padded tokens") as too_many:
        plan_packed(**many)
    assert (too_many.value.limit, too_many.value.needed) == ("padded_tokens", 3 * 2**26)


ROWS = [20, 0, 5, 33]  # number of rows of each prefix
PLACES = [0, 0, 1, 2]  # place of each prefix, where drive is given no other
LAYERS = 3
SETS = st.lists(
    st.none() | st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS), min_size=4, max_size=4
)  # whether each layer has the prefix, for each of four prefixes


def drive(
    work: list[tuple[int, list[int], int, int, int]],
    decode: DecodeSizes = NO_WORK,
    layers: Sequence[list[bool] | None] = (None,) * 4,
    places: Sequence[int] = PLACES,
) -> None:
    """Serve requests and compare the prefix tables and decode work of each step with the references, in every layer."""
    scheduler = Scheduler(64 + 16 * 30, 8, 60, tile_rows=4, decode=decode)
    for prefix, n in enumerate(ROWS):
        scheduler.register_prefix(prefix, n, 2 * n, prefix % 2 == 0, place=places[prefix], layers=layers[prefix])
    known: dict[int, tuple[list[int], int, int, int]] = {}
    for id, (priority, prefixes, prompt_len, beams, max_new) in enumerate(work):
        scheduler.add(id, prefixes, prompt_len, beams, max_new, priority=priority, tenant=id)
        known[id] = (prefixes, prompt_len, beams, max_new)
    steps: dict[int, int] = {}
    first: dict[int, int] = {}
    filled: dict[int, list[int]] = {}
    while scheduler.num_waiting + scheduler.num_running:
        out = np.full(scheduler.buffer_len, -1, np.int32)
        header = scheduler.plan_step(out)
        for prefix, row in header.loads:
            first[prefix] = row
            scheduler.prefix_ready(prefix)
        blocks = {p: (first.get(p, 0), n, int(p % 2 == 0)) for p, n in enumerate(ROWS)}
        has = [layers[p] or [True] * LAYERS for p in blocks]
        here = [
            {p: (row, n * has[p][layer], slides) for p, (row, n, slides) in blocks.items()} for layer in range(LAYERS)
        ]
        check_views(header, blocks, here, {id: known[id][0] for id in known})
        check_prefill(header, out, known, here, filled, places)
        check_decode(header, out, known, here, steps, places)
        check_work(header, out, decode)
        steps |= {id: 0 for id in header.prefill_ids if len(filled[id]) == known[id][1]}
        scheduler.commit([id for id in header.decode_ids if steps[id] == known[id][3]])
    assert set(steps) == set(known)
    for prefix in range(4):
        scheduler.forget_prefix(prefix)
    assert scheduler.free_rows == 16 * 30


def view_of(layout: tuple[list[dict], list[int]], layer: int) -> dict[str, tuple[int, int, int]]:
    views, of_layer = layout
    return views[of_layer[layer] if of_layer else 0]


def check_views(header: StepHeader, blocks: dict, here: list[dict], used: dict[int, list[int]]) -> None:
    """Layers with the same prefixes of the step share a view; several views need a prefix that omits a layer."""
    for layout, ids in ((header.prefill, header.prefill_ids), (header.decode, header.decode_ids)):
        if layout is not None:
            seen = {p for id in ids for p in used[id] if blocks[p][1]}
            kinds = [[p for p in seen if layer[p][1]] for layer in here]
            partial = any(len(kind) < len(seen) for kind in kinds)
            assert layout[1] == (
                [[k for i, k in enumerate(kinds) if k not in kinds[:i]].index(kind) for kind in kinds]
                if partial
                else []
            )
            assert len(layout[0]) == max(layout[1], default=0) + 1


def check_prefill(
    header: StepHeader, out: np.ndarray, known: dict, here: list[dict], filled: dict[int, list[int]], places: list[int]
) -> None:
    if header.prefill is None:
        assert (header.prefill_ids, header.prefill_reach) == ([], 0)
        return
    before = {id: len(filled.get(id, [])) for id in header.prefill_ids}
    for layer, blocks in enumerate(here):
        found = oracles.tables(out, view_of(header.prefill, layer))
        used, lengths = [known[id][0] for id in header.prefill_ids], [tokens for _, _, _, tokens in found["chunk"]]
        contexts = list(before.values())
        assert [start for _, _, start, _ in found["chunk"]] == contexts
        groups = list(itertools.groupby(used))
        assert len(groups) == len({tuple(own) for own in used}), "equal prefixes are neighbours"
        slots = iter(found["slots"])
        for id, n in zip(header.prefill_ids, lengths, strict=True):
            filled[id] = filled.get(id, [])[: before[id]] + list(itertools.islice(slots, n))
        assert found.pop("key_slots") == [slot for id in header.prefill_ids for slot in filled[id] if any(contexts)]
        table = [[*blocks[p][:2], 2 * ROWS[p], blocks[p][2], places[p]] for p in blocks]
        splits = [known[id][1] - 1 for id in header.prefill_ids]
        for name, expected in oracles.plan_packed(lengths, used, table, (4, 0, 0), contexts, splits).items():
            assert found.pop(name) == expected, name
        check_padded(lengths, 4, found)
        ended = [len(filled[id]) == known[id][1] for id in header.prefill_ids]
        assert found["logits_idx"] == (np.cumsum(lengths) - 1)[ended].tolist()
        assert set(found) == {"chunk", "slots", "fill", "logits_idx"}
    reach = [len(filled[id]) + sum(blocks[p][1] for p in known[id][0]) for id in header.prefill_ids for blocks in here]
    assert header.prefill_reach == max(reach)


def check_decode(
    header: StepHeader, out: np.ndarray, known: dict, here: list[dict], steps: dict[int, int], places: list[int]
) -> None:
    if header.decode is None:
        assert (header.decode_ids, header.decode_reach) == ([], 0)
        return
    rows: list[tuple[int, int, list[int]]] = []
    positions = []
    for id in header.decode_ids:
        steps[id] += 1
        prefixes, prompt_len, beams, _ = known[id]
        for _ in range(beams):
            rows.append((len(rows), prompt_len + steps[id] - 1, prefixes))
            own = oracles.positions([(places[p], 2 * ROWS[p]) for p in prefixes], prompt_len - 1)
            positions.append(rows[-1][1] + sum(own))
    for layer, blocks in enumerate(here):
        found = oracles.tables(out, view_of(header.decode, layer))
        expected = {
            **oracles.segment_uses([prefixes for _, _, prefixes in rows], blocks),
            **oracles.uses(rows, blocks),
            "lens": [position + 1 for _, position, _ in rows],
            "position_ids": positions,
        }
        for name, values in expected.items():
            assert found.pop(name) == values, name
        assert set(found) == {"row", "slot", "work", "grouped", "part_indptr", "part"}
        assert len(set(found["slot"])) == len(set(found["row"])) == len(rows)
    assert header.decode_reach == max(
        position + 1 + sum(blocks[p][1] for p in used) for _, position, used in rows for blocks in here
    )


def check_work(header: StepHeader, out: np.ndarray, decode: DecodeSizes) -> None:
    made = ("work", "grouped", "part_indptr", "part")
    for view in () if header.decode is None else header.decode[0]:
        found = DecodeTables(*(section(torch.from_numpy(out), view[name]) for name in DecodeTables._fields))
        if not decode.users:
            assert sum(getattr(found, name).numel() for name in made) == 0
            continue
        expected = with_work(found, decode)
        for name in made:
            assert getattr(found, name).tolist() == getattr(expected, name).tolist(), name


WORK = st.tuples(
    st.integers(0, 2),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(1, 150),
    st.integers(1, 3),
    st.integers(1, 6),
)


@given(st.lists(WORK, max_size=12), SETS)
@seeded
def test_scheduler(work: list[tuple[int, list[int], int, int, int]], layers: list[list[bool] | None]) -> None:
    drive(work, layers=layers)


COST = st.sampled_from([0, 100, 4000, 10**6])
DECODE = st.builds(DecodeSizes, st.integers(1, 4), st.integers(1, 40), st.sampled_from([0, 512]), COST, COST, COST)


@given(
    st.lists(
        st.tuples(
            st.just(0),
            st.lists(st.integers(0, 3), max_size=3),
            st.integers(1, 200),
            st.integers(1, 3),
            st.integers(1, 3),
        ),
        max_size=12,
    ),
    DECODE,
    SETS,
)
@seeded
def test_the_work_of_a_decode_step_is_that_of_the_reference(
    work: list[tuple[int, list[int], int, int, int]], decode: DecodeSizes, layers: list
) -> None:
    drive(work, decode, layers)


def test_decode_limits_are_checked() -> None:
    for wrong in ((4, 0, 1, 1, 1, 1), (-1, 1, 1, 1, 1, 1), (4, 1, 1, 1, 1, -1)):
        with pytest.raises(ConfigError, match="decode"):
            Scheduler(1000, 4, 100, decode=wrong)
    with pytest.raises((TypeError, ValueError)):
        Scheduler(1000, 4, 100, decode=(1, 2))


def test_padded_steps_end_in_padding_rows() -> None:
    scheduler = Scheduler(1000, 6, 100, decode=(4, 3, 512, 0, 0, 0), pad_decode=True)
    scheduler.register_prefix(0, 20, 20, True)
    for id in range(3):
        scheduler.add(id, [0] if id else [], 5, 1, 4)
    out = np.zeros(scheduler.buffer_len, np.int32)
    for prefix, _ in scheduler.plan_step(out).loads:
        scheduler.prefix_ready(prefix)
    scheduler.commit([])
    scheduler.plan_step(out)
    scheduler.commit([])
    layout = scheduler.plan_step(out).decode
    assert layout is not None
    found = oracles.tables(out, layout[0][0])
    assert found["row"][3:] == [6]
    assert found["slot"][3:] == [999]
    assert found["lens"][3:] == [1]
    assert found["use_indptr"][2:] == [1, 2, 2]
    assert [item for item in found["work"] if item[2]][-1] == [-1, 3, 1, 0, 1, -1]
    assert len(found["work"]) == 4 + 3 + 3


def test_scheduler_refuses() -> None:
    for wrong in [(79, 1, 1), (2**31, 1, 1), (100, 0, 1), (100, 1, 0), (-1, 1, 1)]:
        with pytest.raises(ConfigError):
            Scheduler(*wrong)
    with pytest.raises(ConfigError):
        Scheduler(100, 1, 1, buckets=0)
    scheduler = Scheduler(1000, 4, 100)
    scheduler.register_prefix(5, 10, 10, True)
    for rows, pos_start in [(-1, 0), (0, -1), (2**31, 0), (0, 2**31)]:
        with pytest.raises(ConfigError):
            scheduler.register_prefix(6, rows, pos_start, True)
    scheduler.register_prefix(7, 4, 4, True, layers=[True, False])
    with pytest.raises(ConfigError, match="layers has 3 entries: expected 2"):
        scheduler.register_prefix(6, 4, 4, True, layers=[True] * 3)
    for change in [
        {"prompt_len": 0},
        {"prompt_len": -2},
        {"beams": 0},
        {"max_new": -1},
        {"encoder_len": -3},
    ]:
        with pytest.raises(RequestError, match="1"):
            scheduler.add(**{"id": 1, "prefixes": [5], "prompt_len": 3, "beams": 1, "max_new": 2, **change})
    with pytest.raises(RequestError, match="encoder_len of request 1 is 3: expected 0"):
        scheduler.add(1, [5], 3, 1, 2, encoder_len=3)
    for change, limit, needed, available in [
        ({"prompt_len": 10_000}, "arena_rows", 10_032, 928),
        ({"beams": 5}, "decode_rows", 5, 4),
        ({"max_new": 2**62}, "arena_rows", 2**62 + 32, 928),
    ]:
        with pytest.raises(CapacityError) as caught:
            scheduler.add(**{"id": 1, "prefixes": [5], "prompt_len": 3, "beams": 1, "max_new": 2, **change})
        assert (caught.value.limit, caught.value.needed, caught.value.available) == (limit, needed, available)
        assert pickle.loads(pickle.dumps(caught.value)).needed == needed
    with pytest.raises(UnknownPrefixError, match="prefix 6 is not known"):
        scheduler.add(1, [5, 6], 3, 1, 2)
    with pytest.raises(OverflowError):
        scheduler.add(2**70, [], 3, 1, 2)
    assert scheduler.num_waiting == 0
    scheduler.forget_prefix(5)


def test_scheduler_checks_the_buffer() -> None:
    scheduler = Scheduler(1000, 4, 100)
    scheduler.add(1, [], 3, 1, 2)
    good = np.zeros(scheduler.buffer_len, np.int32)
    with pytest.raises(CapacityError, match=str(scheduler.buffer_len)):
        scheduler.plan_step(good[1:])
    locked = good.copy()
    locked.flags.writeable = False
    for wrong in (locked, np.zeros(2 * len(good), np.int32)[::2]):
        with pytest.raises(ConfigError, match="out is not"):
            scheduler.plan_step(wrong)
    for wrong in (good.astype(np.int64), good.reshape(1, -1), None):
        with pytest.raises(TypeError):
            scheduler.plan_step(wrong)
    assert scheduler.num_waiting == 1
    assert scheduler.plan_step(good).prefill_ids == [1]
    with pytest.raises(PrefixFastError, match="commit"):
        scheduler.plan_step(good)


def test_scheduler_cancels() -> None:
    scheduler = Scheduler(1000, 1, 100)
    scheduler.register_prefix(0, 16, 16, True)
    scheduler.add(1, [0], 3, 1, 2)
    scheduler.add(2, [0], 3, 1, 2)
    out = np.zeros(scheduler.buffer_len, np.int32)
    assert scheduler.plan_step(out).loads == [(0, 0)]
    assert [scheduler.cancel(id) for id in (2, 2, 3, 1)] == [True, False, False, True]
    assert scheduler.plan_step(out).cancelled == [1, 2]
    with pytest.raises(PrefixFastError, match="being loaded"):
        scheduler.forget_prefix(0)
    scheduler.prefix_ready(0)
    scheduler.forget_prefix(0)
    with pytest.raises(RequestError, match="not running"):
        scheduler.commit([1])
