"""Cases that every backend of decode attention must pass, and the comparison with the specification.

Tests run the cases in Triton's interpreter, and `make gpu` runs them on a device.
Shape letters: R rows, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefixfast_kernels import reference
from prefixfast_kernels.inputs import AttnOptions, DecodeInputs
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.testing.decode_work import TableRoom, pad_tables, with_work
from prefixfast_kernels.testing.packed_cases import nan_filled_empty
from prefixfast_kernels.testing.tables import Request, decode_tables
from prefixfast_kernels.testing.tolerance import relative_errors
from prefixfast_kernels.tile_selection import DecodeSizes, decode_sizes

STATIC_INPUTS = ("q", "k_arena", "v_arena", "slot_table")  # what a captured graph reads beside the tables
OUTPUT_NAMES = ("o", "lse")
# Costs that make the planner group blocks as its cost model says ("chosen"), always, or never ("inline"). The last two
# also split keys into the shortest ranges.
MODES: dict[str, dict[str, int]] = {
    "chosen": {},
    "grouped": {"fill": 1, "part_bytes": 0, "item_bytes": 0, "launch_bytes": 0},
    "inline": {"fill": 1, "key_bytes": 0},
    "grouped, split": {"fill": 4096, "part_bytes": 0, "item_bytes": 0, "launch_bytes": 0},
    "inline, split": {"fill": 4096, "key_bytes": 0},
}
UNREAD_SLOT = 10**6  # slot table entries past a row's end, a row outside the arena


@dataclass(frozen=True)
class Case:
    """One decode step.

    Attributes:
        lens: Number of keys of each row.
        sees: Blocks of each row from left to right, as (block number, whether sliding windows slide over it).
        blocks: Number of rows of each block.
        heads: Query heads, kv heads and head dim.
        window: Sliding window in tokens, 0 for none.
        softcap: Cap of the scores, 0 for none.
        separate: Whether the prefix rows lie in tensors of their own, in fp32, instead of in the arena.
        max_distance: Largest distance of the position bias, 0 for no bias.
    """

    lens: tuple[int, ...]
    sees: tuple[tuple[tuple[int, bool], ...], ...]
    blocks: tuple[int, ...]
    heads: tuple[int, int, int]
    window: int = 0
    softcap: float = 0.0
    separate: bool = False
    max_distance: int = 0


@dataclass(frozen=True)
class DecodeProblem:
    """Inputs of a decode step, made in fp64.

    Rows of the arena that no slot and no block names hold NaN. Slots past a row's end name a row outside the arena.

    Attributes:
        q: Queries ``[R, HQ, D]``.
        k_arena: Keys ``[arena rows, H, D]``.
        v_arena: Values ``[arena rows, H, D]``.
        slot_table: Arena row of each token of each row, int32 ``[rows, Tmax]``.
        prefix_k: Prefix keys ``[rows, H, D]``, or None if they lie in the arena.
        prefix_v: Prefix values ``[rows, H, D]``, or None if they lie in the arena.
        tables: Tables of the step.
        options: Scale, window, soft cap.
        users: Largest number of rows in a group's tile that the tables were made for.
        bias: Position bias ``[HQ, 2 * maxd + 1]``, or None.
    """

    q: Tensor
    k_arena: Tensor
    v_arena: Tensor
    slot_table: Tensor
    prefix_k: Tensor | None
    prefix_v: Tensor | None
    tables: DecodeTables
    options: AttnOptions
    users: int
    bias: Tensor | None = None

    @property
    def inputs(self) -> DecodeInputs:
        """Inputs of the attention."""
        return DecodeInputs(self.q, self.k_arena, self.v_arena, self.slot_table, self.prefix_k, self.prefix_v)

    def cast(self, dtype: torch.dtype) -> DecodeProblem:
        """The same step in another dtype. Separate prefix rows and the bias stay in at least fp32."""
        own = torch.promote_types(dtype, torch.float32)
        q, k, v = (t.to(dtype) for t in (self.q, self.k_arena, self.v_arena))
        pk, pv = (None if t is None else t.to(dtype).to(own) for t in (self.prefix_k, self.prefix_v))
        bias = None if self.bias is None else self.bias.to(own)
        return replace(self, q=q, k_arena=k, v_arena=v, prefix_k=pk, prefix_v=pv, bias=bias)

    def to(self, device: torch.device | str) -> DecodeProblem:
        """The same step on another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved, tables=DecodeTables(*(t.to(device) for t in self.tables)))


def make_problem(case: Case, sizes: DecodeSizes, *, seed: int = 0) -> DecodeProblem:
    """Random step of a case, with work cut into ``sizes``."""
    g = torch.Generator().manual_seed(seed)
    hq, h, d = case.heads
    blocks, row = [], 2
    for length in case.blocks:
        blocks.append((row, length))
        row += length + 3
    count = sum(case.lens)
    room = (0 if case.separate else row) + torch.randperm(count + 70, generator=g)[:count]
    table = torch.full((len(case.lens) + 1, max(case.lens, default=0) + 5), UNREAD_SLOT, dtype=torch.int32)
    order = torch.randperm(len(case.lens), generator=g)  # rows of the step lie anywhere in the slot table
    for i, part in enumerate(room.split(list(case.lens))):
        table[order[i], : len(part)] = part.int()
    shapes = [(len(case.lens), hq, d), *[((0 if case.separate else row) + count + 70, h, d)] * 2, *[(row, h, d)] * 2]
    q, k, v, pk, pv = (torch.randn(*s, generator=g, dtype=torch.float64) for s in shapes)
    named = torch.zeros(len(k), dtype=torch.bool).index_fill_(0, room, value=True)
    inside = torch.zeros(row, dtype=torch.bool)
    for start, length in blocks:
        inside[start : start + length] = True
    if not case.separate:
        named[:row] = inside
    for t, used in ((k, named), (v, named), (pk, inside), (pv, inside)):
        t[~used] = torch.nan
    plain = decode_tables(list(case.lens), [Request(0, sees) for sees in case.sees], blocks)._replace(row=order.int())
    own_k, own_v = (pk, pv) if case.separate else (None, None)
    options = AttnOptions(d**-0.5, case.window, case.softcap)
    bias = None
    if case.max_distance:
        bias = torch.randn(hq, 2 * case.max_distance + 1, generator=g, dtype=torch.float64)
    return DecodeProblem(q, k, v, table, own_k, own_v, with_work(plain, sizes), options, sizes.users, bias)


def case_sizes(case: Case, dtype: torch.dtype, device: torch.device | str, mode: str) -> DecodeSizes:
    """Shipped sizes for the heads of a case, with the costs of a mode of `MODES`."""
    hq, h, d = case.heads
    return decode_sizes(torch.device(device), dtype, ((hq // h, d),), h)._replace(**MODES[mode])


def _cases() -> dict[str, Case]:
    def see(*blocks: int, slides: bool = True) -> tuple[tuple[int, bool], ...]:
        return tuple((b, slides) for b in blocks)

    ragged = (1, 200, 17, 64, 65, 130, 3, 90)
    mixed = (see(0), see(0), see(1), (), see(2, 0), see(1, 0, slides=False), ((2, False), (1, True)), see(2))
    apart = tuple(see(i) for i in range(len(ragged)))
    # Beams of three requests, without own keys: prefix blocks, then the encoder rows of the request.
    beams = (*(see(0, 1),) * 3, *(see(0, 2),) * 2, *(see(3),) * 3)
    many = tuple(1 + (37 * i) % 90 for i in range(40))
    return {
        "one for all": Case(ragged, (see(0),) * 8, (300,), (4, 2, 64)),
        "one for all, one head each": Case(ragged, (see(0),) * 8, (300,), (3, 3, 64)),
        "one each": Case(ragged, apart, (10, 64, 100, 1, 33, 128, 16, 65), (6, 2, 64)),
        "none": Case(ragged, ((),) * 8, (), (8, 1, 64)),
        "one row": Case((7,), (see(0),), (1,), (2, 2, 64)),
        "one long row": Case((1000,), (see(0),), (900,), (4, 2, 64)),
        "long rows": Case((1000, 5, 700), (see(0), see(0), see(1)), (1000, 400), (5, 1, 64)),
        "composed": Case(ragged, mixed, (40, 300, 7), (4, 1, 64)),
        "forty rows": Case(many, tuple(see(min(i // 13, 2)) for i in range(40)), (100, 65, 300), (4, 2, 64)),
        "forty rows of eight heads": Case(
            many, tuple(see(0, 1) if i % 3 else see(1) for i in range(40)), (20, 150), (8, 1, 64)
        ),
        "fifteen heads on three": Case(ragged, mixed, (40, 200, 7), (15, 3, 64)),
        "window": Case(ragged, (see(0),) * 8, (130,), (5, 5, 64), window=50),
        "window, some blocks stay": Case(ragged, mixed, (40, 300, 7), (7, 1, 64), window=70),
        "window of one": Case(ragged, (see(0),) * 8, (33,), (2, 1, 64), window=1),
        "window over long rows": Case((1000, 990), (see(0),) * 2, (300,), (2, 1, 64), window=1100),
        "cap": Case(ragged, (see(0),) * 8, (70,), (2, 1, 64), softcap=2.0),
        "window and cap": Case(ragged, mixed, (40, 130, 7), (4, 2, 128), window=33, softcap=3.0),
        "separate": Case(ragged, mixed, (40, 300, 7), (4, 2, 64), separate=True),
        "separate, window": Case(ragged, mixed, (40, 130, 7), (4, 2, 64), window=60, separate=True),
        "cross": Case((0,) * 8, beams, (40, 300, 7, 130), (4, 4, 64)),
        "cross, some rows have keys": Case((0, 70, 0, 1, 0, 0, 5, 0), beams, (40, 130, 7, 65), (4, 2, 80)),
        "bias": Case(ragged, mixed, (40, 300, 7), (3, 3, 64), max_distance=128),
        "bias, window": Case(ragged, mixed, (40, 130, 7), (4, 2, 64), window=60, max_distance=20),
        "dim 16": Case(ragged, mixed, (40, 100, 7), (4, 2, 16)),
        "dim 32": Case(ragged, mixed, (40, 100, 7), (2, 2, 32)),
        "dim 80": Case(ragged, mixed, (40, 100, 7), (2, 2, 80)),
        "dim 96": Case(ragged, mixed, (40, 100, 7), (3, 1, 96)),
        "dim 128": Case(ragged, mixed, (40, 200, 7), (8, 2, 128)),
        "dim 256": Case(ragged, mixed, (40, 100, 7), (4, 1, 256)),
        "dim 256, window and cap": Case(ragged, mixed, (40, 100, 7), (2, 1, 256), window=33, softcap=5.0),
    }


CASES = _cases()
Run = Callable[[DecodeProblem], tuple[Tensor, Tensor]]


def run_reference(p: DecodeProblem) -> tuple[Tensor, Tensor]:
    """Outputs of the specification in the dtype of ``p``."""
    return reference.attn_decode(p.inputs, p.tables, p.options, p.bias)


def run_triton(p: DecodeProblem) -> tuple[Tensor, Tensor]:
    """Outputs of the Triton kernels, with NaN in memory that they do not write."""
    from prefixfast_kernels.prefix_decode import attn_decode  # triton is not installed everywhere

    with nan_filled_empty():
        return attn_decode(p.inputs, p.tables, p.options, p.users, p.bias)


def output_errors(
    case: Case, dtype: torch.dtype, mode: str, run: Run, *, device: str = "cpu"
) -> tuple[list[float], list[float]]:
    """Relative errors of o and lse against the specification in fp64.

    Args:
        case: Case to run.
        dtype: Dtype of queries and arena.
        mode: Name of the costs, a key of `MODES`.
        run: Backend under test.
        device: Device of the backend.

    Returns:
        Errors of ``run`` and errors of the specification in ``dtype``.
    """
    p = make_problem(case, case_sizes(case, dtype, device, mode)).cast(dtype)
    exact, same_dtype = run_reference(p.cast(torch.float64)), run_reference(p)
    return relative_errors(run(p.to(device)), exact), relative_errors(same_dtype, exact)


def steps_of_one_bucket() -> list[DecodeProblem]:
    """Steps of 8, 8 and 6 rows, padded to tensors of the same shapes.

    Keys, blocks, modes and slots differ between the steps. Queries of padding rows are NaN.
    """
    ragged = CASES["composed"]
    turned = replace(ragged, lens=ragged.lens[::-1], sees=ragged.sees[3:] + ragged.sees[:3])
    fewer = replace(ragged, lens=(*ragged.lens[:5], sum(ragged.lens[5:])), sees=(*ragged.sees[:5], ragged.sees[0]))
    made = []
    for seed, (case, mode) in enumerate(((ragged, "grouped, split"), (turned, "inline"), (fewer, "inline, split"))):
        p = make_problem(case, case_sizes(case, torch.float32, "cpu", mode), seed=seed)
        rows = 8 - len(case.lens)
        q = torch.cat([p.q, p.q.new_full((rows, *p.q.shape[1:]), torch.nan)])
        table = torch.full((9, 500), UNREAD_SLOT, dtype=torch.int32)
        table[: len(p.slot_table), : p.slot_table.shape[1]] = p.slot_table
        tables = pad_tables(p.tables, TableRoom(rows=8, uses=24, items=40, parts=60))
        made.append(replace(p, q=q, slot_table=table, tables=tables))
    return made


def replay_errors(dtype: torch.dtype, *, device: str = "cpu", capture: bool = False) -> list[list[float]]:
    """Errors of the Triton kernels on `steps_of_one_bucket`, all run in the same memory.

    Args:
        dtype: Dtype of queries and arena.
        device: Device of the kernels.
        capture: Whether one captured CUDA graph runs all steps.

    Returns:
        Relative errors of o and lse of each step, and the deviation of its padding rows from 0 and -inf.
    """
    steps = [p.cast(dtype) for p in steps_of_one_bucket()]
    static = steps[0].to(device)
    own: dict[str, Any] = {name: getattr(static, name).clone() for name in STATIC_INPUTS}
    static = replace(static, **own, tables=DecodeTables(*(t.clone() for t in static.tables)))
    graph = None
    if capture:
        run_triton(static)  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run_triton(static)
    found = []
    for p in steps:
        for name in STATIC_INPUTS:
            getattr(static, name).copy_(getattr(p, name))
        for mine, t in zip(static.tables, p.tables, strict=True):
            mine.copy_(t)
        if graph is None:
            out = run_triton(static)
        else:
            graph.replay()
        live = p.tables.lens > 0
        exact = run_reference(replace(p.cast(torch.float64), q=p.q.nan_to_num().double()))
        o, lse = (t.cpu() for t in out)
        error = relative_errors((o[live], lse[live]), (t[live] for t in exact))
        padding = o[~live].abs().sum().item() + float((lse[~live] != -torch.inf).sum())
        found.append([*error, padding])
    return found
