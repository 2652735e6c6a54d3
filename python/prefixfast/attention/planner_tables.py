"""The planner's buffers as tensors: the place of each table, and the rows of the prefixes.

Shape letters: P prefix rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prefixfast_kernels.tables import DecodeTables, PackedTables

Place = tuple[int, int, int]  # offset, rows and columns (0 for a vector) of a table in a buffer
Sections = Mapping[str, Place]  # place of each table by its name


class Layout(NamedTuple):
    """Places of the tables of one forward in the planner's buffer.

    Attributes:
        views: Places of the tables of each view, by name. A view is the set of layers in which the same prefixes lie.
        view_of: View of each layer; empty for a single view.
    """

    views: Sequence[Sections]
    view_of: Sequence[int] = ()

    @property
    def end(self) -> int:
        """Number of entries of the buffer up to the end of the last table."""
        return max(offset + rows * max(cols, 1) for view in self.views for offset, rows, cols in view.values())


FRONT, INFIX, FIXED_INFIX = 0, 1, 2  # places of a prefix, as `_rust.plan_packed` numbers them


class PlannedPrefix(NamedTuple):
    """Prefix as a plan sees it.

    Attributes:
        layers: Layers in which the prefix lies.
        length: Number of rows P.
        pos_start: Position of the first token after the prefix.
        slides: Whether sliding windows slide over the prefix.
        place: Place of the prefix in a sequence, `FRONT`, `INFIX` or `FIXED_INFIX`.
    """

    layers: Sequence[int]
    length: int
    pos_start: int
    slides: bool
    place: int = FRONT


class PrefixRows(NamedTuple):
    """Rows of prefixes in the tensor of each layer that holds all of them.

    Attributes:
        table: Rows of each prefix, int32 ``[views, prefixes, 5]``: first row, number of rows (0 if the prefix leaves
            the layer out), pos_start, 1 if sliding windows slide over the prefix, place of the prefix.
        view_of: View of each layer; empty for a single view.
    """

    table: NDArray[np.int32]
    view_of: Sequence[int] = ()

    def only(self, numbers: NDArray[np.int64]) -> tuple[PrefixRows, list[NDArray[np.int64]]]:
        """Rows of some prefixes, in tensors that hold no others.

        Args:
            numbers: Numbers of the prefixes, ascending.

        Returns:
            Rows in the smaller tensors, and for each view the place of each of them in the larger tensor.
        """
        table = self.table[:, numbers].copy()
        begin, count = table[:, :, 0].astype(np.int64), table[:, :, 1].astype(np.int64)
        table[:, :, 0] = first = count.cumsum(1) - count
        places = [np.repeat(b - f, c) + np.arange(c.sum()) for b, f, c in zip(begin, first, count, strict=True)]
        return PrefixRows(table, self.view_of), places


NO_PREFIXES = PrefixRows(np.zeros((1, 0, 5), np.int32))


def section(buffer: Tensor, place: Place) -> Tensor:
    """One table of a planner's buffer, as a view."""
    offset, rows, cols = place
    return buffer.narrow(0, offset, rows * cols).view(rows, cols) if cols else buffer.narrow(0, offset, rows)


def host_table(buffer: NDArray[np.int32], place: Place) -> NDArray[np.int32]:
    """One table of a planner's buffer in host memory, as a view."""
    offset, rows, cols = place
    return buffer[offset : offset + rows * cols].reshape(rows, cols) if cols else buffer[offset : offset + rows]


def packed_tables(buffer: Tensor, sections: Sections) -> PackedTables:
    """Packed tables of a planner's buffer, as views."""
    return PackedTables(*(section(buffer, sections[name]) for name in PackedTables._fields))


def decode_tables(buffer: Tensor, sections: Sections) -> DecodeTables:
    """Decode tables of a planner's buffer, as views."""
    return DecodeTables(*(section(buffer, sections[name]) for name in DecodeTables._fields))


def prefix_rows(prefixes: Sequence[PlannedPrefix], num_layers: int) -> PrefixRows:
    """Rows of prefixes that follow each other in every layer's tensor.

    Args:
        prefixes: Prefixes in the order of their rows.
        num_layers: Number of layers of the base model.
    """
    if not prefixes:
        return NO_PREFIXES
    has = np.array([np.isin(np.arange(num_layers), p.layers) for p in prefixes])
    kinds, view_of = np.unique(has, axis=1, return_inverse=True)
    rows = kinds.T * np.array([p.length for p in prefixes], np.int64)  # [views, prefixes]
    same = [
        np.broadcast_to(np.array(column, np.int64), rows.shape)
        for column in ([p.pos_start for p in prefixes], [p.slides for p in prefixes], [p.place for p in prefixes])
    ]
    table = np.stack([rows.cumsum(1) - rows, rows, *same], 2).astype(np.int32)
    return PrefixRows(table, () if len(table) == 1 else view_of.reshape(-1).tolist())
