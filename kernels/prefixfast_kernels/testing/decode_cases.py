"""The cases that decode attention is held to, and the comparison: used by the tests in Triton's interpreter and by `make gpu` on a device.

The work tables are made by plain loops here, a twin of the planner (`rust/core/src/batch/decode.rs`) that needs no Rust extension.
Shape letters: R rows, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefixfast_kernels import reference
from prefixfast_kernels import tile_configs as tiles
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.testing.packed_cases import poisoned
from prefixfast_kernels.testing.tables import Request, decode_tables, relative_error
from prefixfast_kernels.tile_configs import DecodeSizes
from prefixfast_kernels.torch_sdpa_lse import Options

GRAIN = 64
STATIC = ("q", "k_arena", "v_arena", "table")  # what a captured graph reads beside the tables
NAMES = ("o", "lse")
# How a step is read: as the cost model says, always by groups, never by groups; and the last two with splits as short as they get.
MODES: dict[str, dict[str, int]] = {
    "chosen": {},
    "grouped": {"fill": 1, "part_bytes": 0, "item_bytes": 0, "launch_bytes": 0},
    "inline": {"fill": 1, "key_bytes": 0},
    "grouped, split": {"fill": 4096, "part_bytes": 0, "item_bytes": 0, "launch_bytes": 0},
    "inline, split": {"fill": 4096, "key_bytes": 0},
}


def _up(keys: int) -> int:
    return max(1, math.ceil(keys / GRAIN)) * GRAIN


def _pieces(keys: int, share: int) -> list[tuple[int, int]]:
    length = _up(math.ceil(keys / max(1, keys // share)))
    return [(a, min(a + length, keys)) for a in range(0, keys, length)] or [(0, 0)]


def _share(keys: int, fill: int) -> int:
    return max(2 * GRAIN, _up(math.ceil(keys / fill)))


def _grouped(
    lens: list[int], uses: list[list[int]], rows: list[int], users: list[list[int]], sizes: DecodeSizes
) -> list[bool]:
    """The planner's cost model: which blocks groups read."""
    saved = []
    for block, members in enumerate(users):
        count = math.ceil(len(members) / sizes.users)
        saved.append(
            (len(members) - count) * rows[block] * sizes.key_bytes
            - 2 * len(members) * sizes.part_bytes
            - count * sizes.item_bytes
        )
    keys = [n + sum(rows[b] for b in mine) for n, mine in zip(lens, uses, strict=True)]
    split = any(len(_pieces(n, _share(sum(keys), sizes.fill))) > 1 for n in keys)
    enough = sum(s for s in saved if s > 0) > (0 if split else sizes.launch_bytes)
    return [enough and s > 0 for s in saved]


def with_work(t: DecodeTables, sizes: DecodeSizes) -> DecodeTables:
    """The tables with the work that the planner makes from them."""
    lens, rows = t.lens.tolist(), t.block[:, 1].tolist()
    indptr, user_indptr, user, use = t.use_indptr.tolist(), t.user_indptr.tolist(), t.user.tolist(), t.use.tolist()
    uses = [[u[0] for u in use[a:b]] for a, b in itertools.pairwise(indptr)]
    users = [user[a:b] for a, b in itertools.pairwise(user_indptr)]
    grouped = _grouped(lens, uses, rows, users, sizes)
    keys = [n + sum(rows[b] for b in mine if not grouped[b]) for n, mine in zip(lens, uses, strict=True)]
    share = _share(
        sum(keys) + sum(math.ceil(len(users[b]) / sizes.users) * rows[b] for b in range(len(rows)) if grouped[b]),
        sizes.fill,
    )
    work: list[tuple[int, ...]] = []
    parts: list[list[int]] = [[] for _ in lens]
    count = 0
    for b in (b for b in range(len(rows)) if grouped[b]):
        for first in range(0, len(users[b]), sizes.users):
            tile = users[b][first : first + sizes.users]
            for lo, hi in _pieces(rows[b], share):
                work.append((b, user_indptr[b] + first, len(tile), lo, hi, count))
                for row in tile:
                    parts[row].append(count)
                    count += 1
    for row, n in enumerate(keys):
        pieces = _pieces(n, share)
        whole = len(pieces) == 1 and not parts[row]
        for lo, hi in pieces:
            work.append((-1, row, 1, lo, hi, -1 if whole else count))
            if not whole:
                parts[row].append(count)
                count += 1
    ends = torch.tensor([0, *map(len, parts)]).cumsum(0).int()
    tables = {
        "work": torch.tensor(work, dtype=torch.int32).view(-1, 6),
        "grouped": torch.tensor(grouped, dtype=torch.int32),
        "part_indptr": ends,
    }
    return t._replace(**tables, part=torch.tensor([p for mine in parts for p in mine], dtype=torch.int32))


def filled_up(t: DecodeTables, rows: int, uses: int, items: int, parts: int) -> DecodeTables:
    """The tables with room for more, as the planner pads them: dead rows read row 0 of the slot table up to no key, blocks and items without rows.

    The planner's own dead rows have one key, so that every backend serves them; these have none.
    """
    rows, uses, items, parts = (
        n - now for n, now in ((rows, len(t.row)), (uses, len(t.use)), (items, len(t.work)), (parts, len(t.part)))
    )
    blocks = uses + len(t.use) - len(t.block)

    def more(x: Tensor, count: int, value: Tensor | int = 0) -> Tensor:
        return torch.cat([x, torch.as_tensor(value, dtype=torch.int32, device=x.device).expand(count, *x.shape[1:])])

    dead = torch.tensor(
        [(-1, len(t.row) + i, 1, 0, 0, -1) for i in range(rows)] + [(-1, 0, 0, 0, 0, -1)] * (items - rows),
        dtype=torch.int32,
    )
    longer = {name: more(getattr(t, name), uses) for name in ("use", "user", "user_pos", "user_slides")}
    longer |= {name: more(getattr(t, name), blocks) for name in ("block", "span", "grouped")}
    longer |= {name: more(getattr(t, name), rows) for name in ("row", "lens")}
    last = {
        name: more(getattr(t, name), n, getattr(t, name)[-1])
        for name, n in (("use_indptr", rows), ("part_indptr", rows), ("user_indptr", blocks))
    }
    return t._replace(**longer, **last, work=torch.cat([t.work, dead.to(t.work.device)]), part=more(t.part, parts))


@dataclass(frozen=True)
class Case:
    """One step: keys of each row, the blocks it sees as (block, window slides over it), rows of each block, (query heads, kv heads, head dim), options.

    Attributes:
        separate: Prefix rows lie in a pair of their own, in fp32, instead of in the arena.
    """

    lens: tuple[int, ...]
    sees: tuple[tuple[tuple[int, bool], ...], ...]
    blocks: tuple[int, ...]
    heads: tuple[int, int, int]
    window: int = 0
    softcap: float = 0.0
    separate: bool = False


@dataclass(frozen=True)
class Problem:
    """A random step; tensors fp64. Arena rows that nothing names, and slots past a row's end, read NaN and a row far outside.

    Attributes:
        q: As in `reference.attn_decode`; so are the next six.
        options: Scale, window, soft cap.
        users: Rows of a tile that the tables were cut into.
    """

    q: Tensor
    k_arena: Tensor
    v_arena: Tensor
    prefix_k: Tensor | None
    prefix_v: Tensor | None
    table: Tensor
    tables: DecodeTables
    options: Options
    users: int

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same step in another dtype (a prefix of its own stays in at least fp32)."""
        own = torch.promote_types(dtype, torch.float32)
        q, k, v = (t.to(dtype) for t in (self.q, self.k_arena, self.v_arena))
        pk, pv = (None if t is None else t.to(dtype).to(own) for t in (self.prefix_k, self.prefix_v))
        return replace(self, q=q, k_arena=k, v_arena=v, prefix_k=pk, prefix_v=pv)

    def to(self, device: torch.device | str) -> Problem:
        """The same step on another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved, tables=DecodeTables(*(t.to(device) for t in self.tables)))


def problem(case: Case, sizes: DecodeSizes, *, seed: int = 0) -> Problem:
    """The case's random step, cut into ``sizes``."""
    g = torch.Generator().manual_seed(seed)
    hq, h, d = case.heads
    blocks, row = [], 2
    for length in case.blocks:
        blocks.append((row, length))
        row += length + 3
    count = sum(case.lens)
    room = (0 if case.separate else row) + torch.randperm(count + 70, generator=g)[:count]
    table = torch.full(
        (len(case.lens) + 1, max(case.lens, default=0) + 5), 10**6, dtype=torch.int32
    )  # entries past a row's end are never read
    order = torch.randperm(len(case.lens), generator=g)  # rows of the step lie anywhere in the table
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
    return Problem(
        q, k, v, own_k, own_v, table, with_work(plain, sizes), Options(d**-0.5, case.window, case.softcap), sizes.users
    )


def sizes_of(case: Case, dtype: torch.dtype, device: torch.device | str, mode: str) -> DecodeSizes:
    """What ships for the case's heads, with the costs of a mode."""
    hq, h, d = case.heads
    return tiles.decode_sizes(torch.device(device), dtype, ((hq // h, d),), h)._replace(**MODES[mode])


def _steps() -> dict[str, Case]:
    def one(*blocks: int, slides: bool = True) -> tuple[tuple[int, bool], ...]:
        return tuple((b, slides) for b in blocks)

    ragged = (1, 200, 17, 64, 65, 130, 3, 90)
    mixed = (one(0), one(0), one(1), (), one(2, 0), one(1, 0, slides=False), ((2, False), (1, True)), one(2))
    apart = tuple(one(i) for i in range(len(ragged)))
    many = tuple(1 + (37 * i) % 90 for i in range(40))
    return {
        "one for all": Case(ragged, (one(0),) * 8, (300,), (4, 2, 64)),
        "one for all, one head each": Case(ragged, (one(0),) * 8, (300,), (3, 3, 64)),
        "one each": Case(ragged, apart, (10, 64, 100, 1, 33, 128, 16, 65), (6, 2, 64)),
        "none": Case(ragged, ((),) * 8, (), (8, 1, 64)),
        "one row": Case((7,), (one(0),), (1,), (2, 2, 64)),
        "one long row": Case((1000,), (one(0),), (900,), (4, 2, 64)),
        "long rows": Case((1000, 5, 700), (one(0), one(0), one(1)), (1000, 400), (5, 1, 64)),
        "composed": Case(ragged, mixed, (40, 300, 7), (4, 1, 64)),
        "forty rows": Case(many, tuple(one(min(i // 13, 2)) for i in range(40)), (100, 65, 300), (4, 2, 64)),
        "forty rows of eight heads": Case(
            many, tuple(one(0, 1) if i % 3 else one(1) for i in range(40)), (20, 150), (8, 1, 64)
        ),
        "fifteen heads on three": Case(ragged, mixed, (40, 200, 7), (15, 3, 64)),
        "window": Case(ragged, (one(0),) * 8, (130,), (5, 5, 64), window=50),
        "window, some blocks stay": Case(ragged, mixed, (40, 300, 7), (7, 1, 64), window=70),
        "window of one": Case(ragged, (one(0),) * 8, (33,), (2, 1, 64), window=1),
        "window over long rows": Case((1000, 990), (one(0),) * 2, (300,), (2, 1, 64), window=1100),
        "cap": Case(ragged, (one(0),) * 8, (70,), (2, 1, 64), softcap=2.0),
        "window and cap": Case(ragged, mixed, (40, 130, 7), (4, 2, 128), window=33, softcap=3.0),
        "separate": Case(ragged, mixed, (40, 300, 7), (4, 2, 64), separate=True),
        "separate, window": Case(ragged, mixed, (40, 130, 7), (4, 2, 64), window=60, separate=True),
        "dim 16": Case(ragged, mixed, (40, 100, 7), (4, 2, 16)),
        "dim 32": Case(ragged, mixed, (40, 100, 7), (2, 2, 32)),
        "dim 80": Case(ragged, mixed, (40, 100, 7), (2, 2, 80)),
        "dim 96": Case(ragged, mixed, (40, 100, 7), (3, 1, 96)),
        "dim 128": Case(ragged, mixed, (40, 200, 7), (8, 2, 128)),
        "dim 256": Case(ragged, mixed, (40, 100, 7), (4, 1, 256)),
        "dim 256, window and cap": Case(ragged, mixed, (40, 100, 7), (2, 1, 256), window=33, softcap=5.0),
    }


CASES = _steps()
Run = Callable[[Problem], tuple[Tensor, Tensor]]


def specification(p: Problem) -> tuple[Tensor, Tensor]:
    """The specification in the dtype of ``p``."""
    return reference.attn_decode(
        p.q, p.k_arena, p.v_arena, p.prefix_k, p.prefix_v, p.table, p.tables, **vars(p.options)
    )


def triton(p: Problem) -> tuple[Tensor, Tensor]:
    """The Triton kernels; memory that they do not write reads NaN."""
    from prefixfast_kernels.prefix_decode import attn_decode  # triton is not everywhere

    with poisoned():
        return attn_decode(p.q, p.k_arena, p.v_arena, p.prefix_k, p.prefix_v, p.table, p.tables, p.users, p.options)


def errors(
    case: Case, dtype: torch.dtype, mode: str, run: Run, *, device: str = "cpu"
) -> tuple[list[float], list[float]]:
    """Relative errors of o and lse against the specification in fp64: of ``run`` and of the specification in ``dtype``."""
    p = problem(case, sizes_of(case, dtype, device, mode)).cast(dtype)
    exact, same, got = specification(p.cast(torch.float64)), specification(p), run(p.to(device))
    return [relative_error(a.cpu(), b) for a, b in zip(got, exact, strict=True)], [
        relative_error(a, b) for a, b in zip(same, exact, strict=True)
    ]


def steps() -> list[Problem]:
    """Steps of one bucket: 8, 8 and 6 rows with other keys, blocks, modes and slots, all tensors of the same shapes; queries of dead rows read NaN."""
    ragged = CASES["composed"]
    turned = replace(ragged, lens=ragged.lens[::-1], sees=ragged.sees[3:] + ragged.sees[:3])
    fewer = replace(ragged, lens=(*ragged.lens[:5], sum(ragged.lens[5:])), sees=(*ragged.sees[:5], ragged.sees[0]))
    made = []
    for seed, (case, mode) in enumerate(((ragged, "grouped, split"), (turned, "inline"), (fewer, "inline, split"))):
        p = problem(case, sizes_of(case, torch.float32, "cpu", mode), seed=seed)
        rows = 8 - len(case.lens)
        q = torch.cat([p.q, p.q.new_full((rows, *p.q.shape[1:]), torch.nan)])
        table = torch.full((9, 500), 10**6, dtype=torch.int32)
        table[: len(p.table), : p.table.shape[1]] = p.table
        made.append(replace(p, q=q, table=table, tables=filled_up(p.tables, 8, 24, 40, 60)))
    return made


def replayed(dtype: torch.dtype, *, device: str = "cpu", capture: bool = False) -> list[list[float]]:
    """Errors of o and lse of each of `steps` (dead rows: how far from 0 and -inf), all run on the same memory; ``capture``: as one CUDA graph."""
    given = [p.cast(dtype) for p in steps()]
    static = given[0].to(device)
    own: dict[str, Any] = {name: getattr(static, name).clone() for name in STATIC}
    static = replace(static, **own, tables=DecodeTables(*(t.clone() for t in static.tables)))
    graph = None
    if capture:
        triton(static)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = triton(static)
    found = []
    for p in given:
        for name in STATIC:
            getattr(static, name).copy_(getattr(p, name))
        for mine, t in zip(static.tables, p.tables, strict=True):
            mine.copy_(t)
        if graph is None:
            out = triton(static)
        else:
            graph.replay()
        live = p.tables.lens > 0
        exact = specification(replace(p.cast(torch.float64), q=p.q.nan_to_num().double()))
        error = [relative_error(a.cpu()[live], b[live]) for a, b in zip(out, exact, strict=True)]
        dead = out[0].cpu()[~live].abs().sum().item() + float((out[1].cpu()[~live] != -torch.inf).sum())
        found.append([*error, dead])
    return found
