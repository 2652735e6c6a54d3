"""Work tables of decode steps, built from plain lists by loops.

The loops are a counterpart of the planner (`rust/core/src/batch/decode.rs`) for its tests and need no Rust extension.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.tile_selection import DecodeSizes

GRAIN = 64  # splits of keys are multiples of this number


class _Step(NamedTuple):
    """Plain lists of a decode step.

    Attributes:
        lens: Number of keys of each row.
        uses: Blocks of each row.
        rows: Number of rows of each block.
        users: Rows that see each block.
        user_indptr: Offset of the first user of each block in the table ``user``.
    """

    lens: list[int]
    uses: list[list[int]]
    rows: list[int]
    users: list[list[int]]
    user_indptr: list[int]

    @classmethod
    def of(cls, t: DecodeTables) -> _Step:
        """Lists of the tables."""
        user, use, user_indptr = t.user.tolist(), t.use.tolist(), t.user_indptr.tolist()
        uses = [[u[0] for u in use[a:b]] for a, b in itertools.pairwise(t.use_indptr.tolist())]
        users = [user[a:b] for a, b in itertools.pairwise(user_indptr)]
        return cls(t.lens.tolist(), uses, t.block[:, 1].tolist(), users, user_indptr)

    def own_keys(self, grouped: list[bool]) -> list[int]:
        """Number of keys that each row reads by itself: its own and those of its blocks that no group reads."""
        return [
            n + sum(self.rows[b] for b in mine if not grouped[b]) for n, mine in zip(self.lens, self.uses, strict=True)
        ]


def _round_up(keys: int) -> int:
    return max(1, math.ceil(keys / GRAIN)) * GRAIN


def _split(keys: int, share: int) -> list[tuple[int, int]]:
    """Ranges of about ``share`` keys, or one empty range without keys."""
    length = _round_up(math.ceil(keys / max(1, keys // share)))
    return [(a, min(a + length, keys)) for a in range(0, keys, length)] or [(0, 0)]


def _share(keys: int, fill: int) -> int:
    """Number of keys of a split if ``fill`` work items read ``keys`` keys."""
    return max(2 * GRAIN, _round_up(math.ceil(keys / fill)))


def _is_grouped(step: _Step, sizes: DecodeSizes) -> list[bool]:
    """Whether groups read each block, by the planner's cost model (kernels/README.md)."""
    saved = []
    for block, members in enumerate(step.users):
        count = math.ceil(len(members) / sizes.users)
        saved.append(
            (len(members) - count) * step.rows[block] * sizes.key_bytes
            - 2 * len(members) * sizes.part_bytes
            - count * sizes.item_bytes
        )
    keys = step.own_keys([False] * len(step.rows))
    split = any(len(_split(n, _share(sum(keys), sizes.fill))) > 1 for n in keys)
    enough = sum(s for s in saved if s > 0) > (0 if split else sizes.launch_bytes)
    return [enough and s > 0 for s in saved]


def with_work(t: DecodeTables, sizes: DecodeSizes) -> DecodeTables:
    """Tables with the work that the planner makes for ``sizes``."""
    step = _Step.of(t)
    grouped = _is_grouped(step, sizes)
    blocks = [b for b, is_grouped in enumerate(grouped) if is_grouped]
    keys = step.own_keys(grouped)
    group_keys = sum(math.ceil(len(step.users[b]) / sizes.users) * step.rows[b] for b in blocks)
    share = _share(sum(keys) + group_keys, sizes.fill)
    work: list[tuple[int, ...]] = []
    parts: list[list[tuple[int, int]]] = [[] for _ in step.lens]  # place in the row's composition, number
    count = 0
    for b in blocks:
        for first in range(0, len(step.users[b]), sizes.users):
            tile = step.users[b][first : first + sizes.users]
            for lo, hi in _split(step.rows[b], share):
                work.append((b, step.user_indptr[b] + first, len(tile), lo, hi, count))
                for row in tile:
                    parts[row].append((step.uses[row].index(b), count))
                    count += 1
    for row, n in enumerate(keys):
        ranges = _split(n, share)
        whole = len(ranges) == 1 and not parts[row]
        for lo, hi in ranges:
            work.append((-1, row, 1, lo, hi, -1 if whole else count))
            if not whole:
                parts[row].append((len(step.uses[row]), count))
                count += 1
    return t._replace(
        work=torch.tensor(work, dtype=torch.int32).view(-1, 6),
        grouped=torch.tensor(grouped, dtype=torch.int32),
        part_indptr=torch.tensor([0, *map(len, parts)]).cumsum(0).int(),
        part=torch.tensor([p for mine in parts for _, p in sorted(mine)], dtype=torch.int32),
    )


class TableRoom(NamedTuple):
    """Sizes that tables are padded to.

    Attributes:
        rows: Number of rows.
        uses: Number of uses of blocks, and of blocks.
        items: Number of work items.
        parts: Number of partial sums.
    """

    rows: int
    uses: int
    items: int
    parts: int


def pad_tables(t: DecodeTables, room: TableRoom) -> DecodeTables:
    """Tables with room for more, padded as the planner does: with padding rows, empty blocks and empty work items.

    Padding rows read row 0 of the slot table and have no keys. The planner's own padding rows have one key, so that
    every backend supports them.
    """
    rows, uses, items, parts = (
        n - now for n, now in zip(room, (len(t.row), len(t.use), len(t.work), len(t.part)), strict=True)
    )
    blocks = uses + len(t.use) - len(t.block)

    def pad(x: Tensor, count: int, value: Tensor | int = 0) -> Tensor:
        return torch.cat([x, torch.as_tensor(value, dtype=torch.int32, device=x.device).expand(count, *x.shape[1:])])

    padding = torch.tensor(
        [(-1, len(t.row) + i, 1, 0, 0, -1) for i in range(rows)] + [(-1, 0, 0, 0, 0, -1)] * (items - rows),
        dtype=torch.int32,
    )
    longer = {name: pad(getattr(t, name), uses) for name in ("use", "user", "user_pos", "user_slides")}
    longer |= {name: pad(getattr(t, name), blocks) for name in ("block", "span", "grouped")}
    longer |= {name: pad(getattr(t, name), rows) for name in ("row", "lens")}
    offsets = {
        name: pad(getattr(t, name), n, getattr(t, name)[-1])
        for name, n in (("use_indptr", rows), ("part_indptr", rows), ("user_indptr", blocks))
    }
    return t._replace(**longer, **offsets, work=torch.cat([t.work, padding.to(t.work.device)]), part=pad(t.part, parts))
