"""The int32 tables that every kernel reads, and their packing; the planner (`rust/core/src/batch/plan.rs`) fills them.

Shape letters: S segments, U uses of prefix blocks, C distinct blocks, E (query row, block) pairs, B length buckets, N packed tokens, R decode rows, W work
items, n partial sums.
A segment is a run of query rows that see the same prefix blocks; positions are relative to the segment's key 0, so prefix rows sit at negative ones.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockTables(NamedTuple):
    """Which prefix blocks exist and who sees them; the first fields of both tables below.

    Attributes:
        use_indptr: ``[S + 1]``; uses of segment s are ``use[use_indptr[s]:use_indptr[s + 1]]``.
        use: ``[U, 3]``: block, position of its first row relative to key 0 (-P for one plain prefix), 1 if a sliding window slides over it.
        block: ``[C, 2]``: first row in the prefix tensor, rows. Distinct and never empty.
        user_indptr: ``[C + 1]``; the fields below of block c are at ``[user_indptr[c]:user_indptr[c + 1]]``.
        user: ``[E]``: query rows that see the block, ascending.
        user_pos: ``[E]``: position of the block's first row relative to that query.
        user_slides: ``[E]``: the use's window flag.
        span: ``[C, 3]``: first user, number of users, 1 if they are consecutive rows.
    """

    use_indptr: Tensor
    use: Tensor
    block: Tensor
    user_indptr: Tensor
    user: Tensor
    user_pos: Tensor
    user_slides: Tensor
    span: Tensor


class PackedTables(NamedTuple):
    """Tables of one packed forward (training, prefill).

    Attributes:
        seg: ``[S, 4]``: first query row, query rows, first key row (or first entry of ``slots``), keys.
        seg_pos: ``[S]``: position of the first query row.
        bucket: ``[B, 2]``: sequences, padded length; the padded layouts of all buckets follow each other.
        gather: ``[sum of n * length]``: token at each place of the padded layout (padding repeats the sequence's last token).
        scatter: ``[N]``: place of each token in the padded layout.
        tiles: ``[n, 2]``: segment, first query row: the work of kernels that go over query tiles.
        key_tiles: ``[n, 3]``: first segment, one past the last, first key relative to theirs: the work of kernels that go over key tiles. The segments
            of an entry follow each other, start at the same key, and the last one has all the keys.
        block_tiles: ``[n, 2]``: block, first of its rows: the work of kernels that go over tiles of prefix rows.
    """

    use_indptr: Tensor
    use: Tensor
    block: Tensor
    user_indptr: Tensor
    user: Tensor
    user_pos: Tensor
    user_slides: Tensor
    span: Tensor
    seg: Tensor
    seg_pos: Tensor
    bucket: Tensor
    gather: Tensor
    scatter: Tensor
    tiles: Tensor
    key_tiles: Tensor
    block_tiles: Tensor

    @property
    def blocks(self) -> BlockTables:
        """The part that says who sees which prefix block."""
        return BlockTables(*self[: len(BlockTables._fields)])


class DecodeTables(NamedTuple):
    """Tables of one decode step; its segments are rows of one query each.

    Attributes:
        row: ``[R]``: row of the slot table that each query reads.
        lens: ``[R]``: keys of the row, the new one included.
        work: ``[W, 6]``, the work of the kernel; items without rows do nothing. Rows of a block for some of its users: block, first of them in ``user``,
            how many, first and one past the last row of the block, first partial sum (one each). Keys that a row reads by itself: -1, row, 1, first and
            one past the last key of (its blocks that no group reads, then its own), partial sum or -1: it is the whole result. Empty without a kernel.
        grouped: ``[C]``: 1 if groups read the block. Empty without ``work``, as are the next two.
        part_indptr: ``[R + 1]``; the partial sums of row r are ``part[part_indptr[r]:part_indptr[r + 1]]``, none where ``work`` gives its result.
        part: ``[n]``: numbers of partial sums, in the order in which they are merged.
    """

    use_indptr: Tensor
    use: Tensor
    block: Tensor
    user_indptr: Tensor
    user: Tensor
    user_pos: Tensor
    user_slides: Tensor
    span: Tensor
    row: Tensor
    lens: Tensor
    work: Tensor
    grouped: Tensor
    part_indptr: Tensor
    part: Tensor

    @property
    def blocks(self) -> BlockTables:
        """The part that says who sees which prefix block."""
        return BlockTables(*self[: len(BlockTables._fields)])
