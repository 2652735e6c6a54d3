"""Int32 tables that every kernel reads. The planner (`rust/core/src/batch/plan.rs`) fills them.

A segment is a run of query rows that see the same prefix blocks. Positions are relative to the segment's key 0, so
prefix rows have negative positions.
Shape letters: S segments, U uses of prefix blocks, C distinct blocks, E (query row, block) pairs, B length buckets,
N packed tokens, R decode rows, W work items, n partial sums.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockTables(NamedTuple):
    """Prefix blocks and the queries that see them, the first fields of both `PackedTables` and `DecodeTables`.

    Attributes:
        use_indptr: Offsets into ``use``, ``[S + 1]``. Segment s has ``use[use_indptr[s]:use_indptr[s + 1]]``.
        use: Uses of blocks, ``[U, 3]``: block, position of its first row relative to key 0 (-P for one plain prefix),
            1 if a sliding window slides over it.
        block: Blocks, ``[C, 2]``: first row in the prefix tensor, number of rows. Blocks are distinct and not empty.
        user_indptr: Offsets into the next three tables, ``[C + 1]``. Block c has
            ``[user_indptr[c]:user_indptr[c + 1]]``.
        user: Query rows that see the block, ``[E]``, ascending. A row that sees the block twice is there twice.
        user_pos: Position of the block's first row relative to that query, ``[E]``.
        user_slides: Window flag of the use, ``[E]``.
        span: Users of each block, ``[C, 3]``: first user, number of users, 1 if the users are consecutive rows.
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
    """Tables of one packed forward (training or prefill).

    Attributes:
        seg: Segments, ``[S, 4]``: first query row, query rows, first key row (or first entry of ``slots``), keys.
        seg_pos: Position of each segment's first query row, ``[S]``.
        bucket: Length buckets, ``[B, 2]``: sequences, padded length. The padded layouts of the buckets follow each
            other.
        gather: Token at each place of the padded layout, ``[sum of n * length]``. Padding repeats the sequence's last
            token.
        scatter: Place of each token in the padded layout, ``[N]``.
        tiles: Work of kernels over query tiles, ``[n, 2]``: segment, first query row.
        key_tiles: Work of kernels over key tiles, ``[n, 3]``: first segment, one past the last segment, first key
            relative to the segments' first key. The segments of an entry follow each other and start at the same key,
            and the last of them has all the keys.
        block_tiles: Work of kernels over tiles of prefix rows, ``[n, 2]``: block, first of its rows.
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
        """Prefix blocks and the queries that see them."""
        return BlockTables(*self[: len(BlockTables._fields)])


class DecodeTables(NamedTuple):
    """Tables of one decode step. Each segment is a row of one query.

    Attributes:
        row: Row of the slot table that each query reads, ``[R]``.
        lens: Own keys of each row, ``[R]``, the new key included. A row whose keys are all in blocks has 0, as in
            cross-attention.
        work: Work items of the Triton kernel, ``[W, 6]``, empty for other backends. Items with a count of 0
            (third column) do nothing.
            A group item reads rows of a block for some of its users: block, offset of the first user in ``user``,
            number of users, first row, one past the last row, first partial sum (one for each user).
            A row item reads the keys that a row reads by itself, its blocks that no group reads and then its own keys:
            -1, row, 1, first key, one past the last key, partial sum, or -1 if the item is the row's whole result.
        grouped: Whether groups read each block, ``[C]``, 1 or 0. Empty without ``work``, as are the next two tables.
        part_indptr: Offsets into ``part``, ``[R + 1]``. Row r has ``part[part_indptr[r]:part_indptr[r + 1]]``, which is
            empty if one work item gives the row's whole result.
        part: Numbers of partial sums, ``[n]``, in the order in which they are merged: those of blocks from left to
            right, then those of the keys that the row reads by itself.
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
        """Prefix blocks and the queries that see them."""
        return BlockTables(*self[: len(BlockTables._fields)])
