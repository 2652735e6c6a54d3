"""Small files whose content would fill the memory: rows, cells, repeated texts, XML elements and highlighted cells."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import table_corpora as fixtures
from prefixfast import DataError
from prefixfast.data import read_rows, read_task
from prefixfast.data.files import raw
from prefixfast.data.files.parquet import parquet_items

SMALL = 2**16  # bytes that a file may have in these tests, whatever its size
LEX, MILL = b"<lex/>", fixtures.WEBNLG_2017_INPUTS.text.encode()


@pytest.fixture(autouse=True)
def _small_limit(monkeypatch):
    monkeypatch.setattr(raw, "ALWAYS_READ", SMALL)


def parquet(columns: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def totto(highlighted: int, header_rows: int) -> bytes:
    header, cell = fixtures.cell("", header=True), fixtures.cell("", columns=header_rows)
    table = [[header] * header_rows] * header_rows + [[cell]]
    return fixtures.totto_line("A.", table=table, highlighted_cells=[[header_rows, 0]] * highlighted).encode()


TEXT = "x" * 10_000
CONTENTS: dict[str, tuple[str, str, bytes]] = {
    "one cell": ("xsum", "a.parquet", parquet({"document": ["x" * 2**24], "summary": ["s"]})),
    "one text in all rows": ("xsum", "a.parquet", parquet({"document": [TEXT] * 2_000, "summary": ["s"] * 2_000})),
    "one text in all messages": (
        "messages",
        "a.parquet",
        parquet({"messages": [[{"role": "user", "content": TEXT}]] * 2_000}),
    ),
    "one text in all maps": (
        "prompt",
        "a.parquet",
        parquet({"params": pa.array([[("a", TEXT)]] * 2_000, pa.map_(pa.string(), pa.string()))}),
    ),
    "one value of a fixed size": (
        "prompt",
        "a.parquet",
        parquet({"a": pa.array([b"x" * 9_999] * 2_000, pa.binary(9_999))}),
    ),
    "one number": ("prompt", "a.parquet", parquet({"input_ids": [[0] * 1_000] * 1_000})),
    "rows without a value": ("prompt", "a.parquet", parquet({"prompt": pa.array([None] * 100_000, pa.string())})),
    "rows of CSV": ("prompt", "a.csv.gz", gzip.compress(b"prompt\n" + b"a\n" * 100_000)),
    "rows of JSON": ("prompt", "a.jsonl.gz", gzip.compress(b"{}\n" * 100_000)),
    "elements": ("webnlg", "a.xml.gz", gzip.compress(MILL.replace(b"</entry>", LEX * 10_000 + b"</entry>"))),
    "attributes": (
        "webnlg",
        "a.xml.gz",
        gzip.compress(MILL.replace(b"</entry>", b'<lex a="" b="" c="" d=""/>' * 2_000 + b"</entry>")),
    ),
    "one cell highlighted often": ("totto", "a.jsonl.gz", gzip.compress(totto(2_000, 20))),
    "headers of a cell": ("totto", "a.jsonl.gz", gzip.compress(totto(1, 60) * 9)),
}


@pytest.mark.parametrize(("task", "name", "content"), CONTENTS.values(), ids=CONTENTS)
def test_a_bomb_is_refused(tmp_path, task, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert raw.MOST_EXPANDED * len(content) < 2**20, "the file is small"
    with pytest.raises(DataError) as caught:
        read_task(task, path, "test")
    assert str(caught.value).startswith(f"{path}: expected at most 100 bytes for each of ")
    assert caught.value.path == str(path)


def test_a_plain_file_may_have_rows_of_few_bytes(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt\n" + b"a\n" * 10_000)
    assert len(read_rows(path)) == 10_000


def test_a_table_of_headers_is_read(tmp_path):
    """Headers of each column and row, in the order of the authors' code."""
    rows = [
        [fixtures.cell(f"{r}{c}", header=r < 2 or c == 0, columns=1 + (r == 0)) for c in range(4)] for r in range(4)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(fixtures.totto_line("A.", table=rows, highlighted_cells=[[3, 2], [1, 3], [2, 0]]))
    (row,) = read_task("totto", path, "test")
    assert row["table"][2:] == [
        *[["cell", "32"], ["col_header", "01"], ["col_header", "12"], ["row_header", "30"]],
        *[["cell", "13"], ["col_header", "01"], ["row_header", "10"], ["row_header", "11"], ["row_header", "12"]],
        *[["cell", "20"], ["col_header", "00"], ["col_header", "10"]],
    ]


def test_values_of_all_types_are_those_of_pyarrow(monkeypatch):
    """Texts are read as a dictionary, also inside lists, structures and maps."""
    monkeypatch.setattr(raw, "ALWAYS_READ", 2**26)
    rows = [
        {
            "text": f"x{i % 7}",
            "list": ["y", None, "z"] if i % 3 else None,
            "struct": {"q": "w" * 3, "n": 1} if i % 2 else None,
            "messages": [{"from": "u", "value": f"v{i}"}] * (i % 4),
            "bytes": b"xx",
            "time": datetime.datetime(2026, 1, 2),
            "decimal": decimal.Decimal("1.5"),
        }
        for i in range(100)
    ]
    table = pa.Table.from_pylist(rows)
    more = {
        "map": pa.array([[("k", "v" * 20)] * (i % 3) for i in range(100)], pa.map_(pa.string(), pa.string())),
        "large": pa.array(["q"] * 100, pa.large_string()),
        "large list": pa.array([["q"]] * 100, pa.large_list(pa.large_string())),
        "fixed": pa.array([["q", "r"]] * 100, pa.list_(pa.string(), 2)),
        "category": pa.array(["a", "b"] * 50).dictionary_encode(),
        "numbers": pa.array([1, 2] * 50).dictionary_encode(),
    }
    for name, values in more.items():
        table = table.append_column(name, values)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=30, dictionary_pagesize_limit=20)
    found = [*parquet_items(sink.getvalue().to_pybytes(), "a.parquet")]
    assert found == table.to_pylist()


def test_a_file_of_many_short_rows_is_read_if_it_is_large_enough(tmp_path):
    path = Path(tmp_path / "a.jsonl.gz")
    content = "".join(json.dumps({"prompt": f"{i * 7919 % 65_537:x}"}) + "\n" for i in range(20_000)).encode()
    path.write_bytes(packed := gzip.compress(content))
    assert raw.MOST_EXPANDED * len(packed) > raw.ROW_BYTES * 20_000
    assert len(read_rows(path)) == 20_000
