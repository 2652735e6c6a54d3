"""The files of ToTTo: JSON lines with a Wikipedia table, its highlighted cells, and sentences on them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from prefixfast.config.json_types import JSON
from prefixfast.data.corpora.corpus import Corpus, Counts
from prefixfast.data.corpora.split_files import split_file
from prefixfast.data.corpora.split_rows import own_row, row_items, with_texts
from prefixfast.data.files import SUFFIXES, FileRow, Item, parse_item
from prefixfast.data.files.raw import Expansion
from prefixfast.data.row_values import check_text
from prefixfast.data.rows import row_error
from prefixfast.errors import shown

ENTRY_KEYS = ("highlighted_cells", "sentence_annotations", "table_page_title", "example_id")
TITLES = ("page_title", "section_title")
WIDEST = 10_000  # columns that one cell may span
PAIR_BYTES = 64  # of a pair in memory, at least
Cells = list[list[dict[str, Any]]]


def totto_items(path: Path, split: str) -> Iterator[Item]:
    """Yield the rows of a ToTTo file, or of a folder of such files by split.

    Rows have ``table``, ``refs``, ``id`` and ``subset``. The table is pairs: the titles, then each highlighted cell and
    the headers of its columns and row, by the rules of Parikh et al. 2020. The subset is ``"overlap"`` or
    ``"non-overlap"`` in the files that mark it.
    """
    for file in split_file(path, split, SUFFIXES):
        items = _file_items(file, split)
        yield from with_texts(items, file) if split == "train" else items


def _file_items(path: Path, split: str) -> Iterator[Item]:
    pairs = Expansion.of_file(path)
    for item in row_items(path, "table"):
        is_entry = any(key in item for key in ENTRY_KEYS) if isinstance(item, FileRow) else False
        parse = partial(_parse_entry, expansion=pairs)
        yield parse_item(parse, item) if isinstance(item, FileRow) and is_entry else own_row(item, split)


def _parse_entry(item: FileRow, expansion: Expansion) -> FileRow:
    titles = {name: check_text(item, 0, f"table_{name}", item.get(f"table_{name}")) for name in TITLES}
    pairs: list[JSON] = [[name, title] for name, title in titles.items() if title]
    table = _checked_table(item)
    starts = [_column_starts(row) for row in table]
    header_rows = [r for r, row in enumerate(table) if any(cell["is_header"] for cell in row)]
    for r, c in _checked_places(item, table):
        above = header_rows[: bisect_left(header_rows, r)]
        found: list[JSON] = [["cell", table[r][c]["value"]]]
        found += [["col_header", text] for text in _column_headers(table, starts, above, r, c)]
        found += [["row_header", cell["value"]] for cell in table[r][:c] if cell["is_header"]]
        expansion.add(PAIR_BYTES * len(found) + len(above))  # each cell can have all headers, or search all rows
        pairs += found
    row: dict[str, JSON] = {"table": pairs}
    notes: Any = item.get("sentence_annotations", [])
    if not isinstance(notes, list) or not all(isinstance(n, dict) for n in notes):
        raise row_error(item, 0, f"sentence_annotations: expected a list of objects, got {shown(notes)}")
    if notes:
        row["refs"] = texts = [check_text(item, 0, "final_sentence", n.get("final_sentence")) for n in notes]
        if not all(map(str.strip, texts)):
            raise row_error(item, 0, "final_sentence: expected a text, got an empty one")
    if (number := item.get("example_id")) is not None:
        if type(number) is not int:
            raise row_error(item, 0, f"example_id: expected a whole number, got {shown(number)}")
        row["id"] = str(number)
    if (overlap := item.get("overlap_subset")) is not None:
        if not isinstance(overlap, bool):
            raise row_error(item, 0, f"overlap_subset: expected true or false, got {shown(overlap)}")
        row["subset"] = "overlap" if overlap else "non-overlap"
    return FileRow(row, item.path, item.line)


def _checked_table(item: FileRow) -> Cells:
    table: Any = item.get("table")
    if not isinstance(table, list) or not all(isinstance(row, list) for row in table):
        raise row_error(item, 0, f"table: expected a list of lists of cells, got {shown(table)}")
    for r, row in enumerate(table):
        for c, cell in enumerate(row):
            if not _is_cell(cell):
                expected = f"value, is_header and column_span (0 to {WIDEST})"
                raise row_error(item, 0, f"table[{r}][{c}]: expected a cell with {expected}, got {shown(cell)}")
            check_text(item, 0, f"table[{r}][{c}]", cell["value"])
    return table


def _is_cell(cell: Any) -> bool:
    if not isinstance(cell, dict) or not isinstance(cell.get("value"), str):
        return False
    span = cell.get("column_span")
    return isinstance(cell.get("is_header"), bool) and type(span) is int and 0 <= span <= WIDEST


def _checked_places(item: FileRow, table: Cells) -> list[list[int]]:
    places: Any = item.get("highlighted_cells")
    if not isinstance(places, list) or not places:
        raise row_error(item, 0, f"highlighted_cells: expected at least one [row, column], got {shown(places)}")
    for place in places:
        fits = isinstance(place, list) and len(place) == 2 and all(type(n) is int and n >= 0 for n in place)
        if not fits or place[0] >= len(table) or place[1] >= len(table[place[0]]):
            raise row_error(item, 0, f"highlighted_cells: expected [row, column] of a cell, got {shown(place)}")
    return places


def _column_starts(row: list[dict[str, Any]]) -> list[int]:
    """First column of each cell, and the column after the last one."""
    starts = [0]
    for cell in row:
        starts.append(starts[-1] + cell["column_span"])
    return starts


def _column_headers(table: Cells, starts: list[list[int]], header_rows: list[int], row: int, column: int) -> list[str]:
    """Texts of the header cells above a cell that share a column with it; rows that a cell spans do not count.

    Args:
        table: Table.
        starts: First column of each cell of a row, and the column after the last one, for each row.
        header_rows: Rows above the cell with a header.
        row: Row of the cell.
        column: Place of the cell in its row.
    """
    first, end = starts[row][column : column + 2]
    found = []
    for above in header_rows:
        own, begins = table[above], starts[above]
        cells = own[bisect_right(begins, first) - 1 : bisect_left(begins, end, hi=len(own))]
        found += [cell["value"] for cell in cells if cell["is_header"]]
    return found


TOTTO = Corpus(
    "totto",
    "the repository google-research-datasets/ToTTo",
    totto_items,
    {
        "train": (Counts(120761, 120761),),
        "dev": (Counts(7700, None),),
        "test": (Counts(7700, 0),),
    },
)
