"""Shapes of files as people have them: each is read right, or refused with the sentence that solves it.

The bytes are written by hand. Values of `READ` are the name of a file, its bytes, and its rows. Values of `REFUSED` are
the name of a file, its bytes, and parts of the error.
"""

from __future__ import annotations

import csv
import gzip
import io
import logging
import pickle
import tracemalloc
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixfast import ConfigError, DataError
from prefixfast.cli.records import Records, generated
from prefixfast.cli.result_formats import WRITERS
from prefixfast.data import Task, column_task, find_task, read_rows
from prefixfast.data.encode import check_examples

PAIR = {"prompt": "Grüße", "completion": "à bientôt"}
PAIRS = [PAIR]
MESSAGES = [{"role": "user", "content": 'say "hi"'}, {"role": "assistant", "content": "hi"}]


def row(**values):
    return [values]


def utf16(text: str) -> bytes:
    return b"\xff\xfe" + text.encode("utf-16-le")


READ = {
    # separators
    "commas": ("a.csv", "prompt,completion\nGrüße,à bientôt\n".encode(), PAIRS),
    "semicolons": ("a.csv", "prompt;completion\nGrüße;à bientôt\n".encode(), PAIRS),
    "tabs in a .tsv": ("a.tsv", "prompt\tcompletion\nGrüße\tà bientôt\n".encode(), PAIRS),
    "tabs in a .csv": ("a.csv", "prompt\tcompletion\nGrüße\tà bientôt\n".encode(), PAIRS),
    "bars": ("a.csv", "prompt|completion\nGrüße|à bientôt\n".encode(), PAIRS),
    "commas in a .tsv": ("a.tsv", "prompt,completion\nGrüße,à bientôt\n".encode(), PAIRS),
    "decimal commas": (
        "a.csv",
        b"name;price;text\nLamp;1,50;bright, warm\nDesk;2,00;oak\n",
        row(name="Lamp", price="1,50", text="bright, warm") + row(name="Desk", price="2,00", text="oak"),
    ),
    "semicolons in text": ("a.csv", b"prompt,completion\na; b; c,d; e\n", row(prompt="a; b; c", completion="d; e")),
    "quoted separators": (
        "a.csv",
        b'"prompt";"completion"\n"a; b, c";"d\te|f"\n',
        row(prompt="a; b, c", completion="d\te|f"),
    ),
    "a quoted name with other separators": (
        "a.csv",
        b'name,"size (h; w; d)",text\nLamp,1;2;3,bright\n',
        row(name="Lamp", text="bright", **{"size (h; w; d)": "1;2;3"}),
    ),
    "an unquoted name with other separators": (
        "a.csv",
        b"name,size (h; w),text\nLamp,1,bright\n",
        row(name="Lamp", text="bright", **{"size (h; w)": "1"}),
    ),
    "Excel's line for the separator": ("a.csv", "sep=;\r\nprompt;completion\r\nGrüße;à bientôt\r\n".encode(), PAIRS),
    "one column": (
        "a.csv",
        b'prompt\nHello, world; how are you?\n"quoted, too"\n',
        row(prompt="Hello, world; how are you?") + row(prompt="quoted, too"),
    ),
    # encodings
    "UTF-8 with BOM": ("a.csv", b"\xef\xbb\xbf" + "prompt,completion\r\nGrüße,à bientôt\r\n".encode(), PAIRS),
    "Excel's Unicode text": ("a.tsv", utf16("prompt\tcompletion\r\nGrüße\tà bientôt\r\n"), PAIRS),
    "UTF-16 of the other order": (
        "a.csv",
        b"\xfe\xff" + "prompt,completion\nGrüße,à bientôt\n".encode("utf-16-be"),
        PAIRS,
    ),
    "JSON lines of PowerShell": ("a.jsonl", utf16('{"prompt": "Grüße", "completion": "à bientôt"}\r\n'), PAIRS),
    "a list in UTF-16": ("a.json", utf16('[\r\n{"prompt": "Grüße", "completion": "à bientôt"}]'), PAIRS),
    # lines
    "line ends of Windows": (
        "a.csv",
        b"prompt,completion\r\na,b\r\nc,d\r\n",
        row(prompt="a", completion="b") + row(prompt="c", completion="d"),
    ),
    "line ends of the old Mac": (
        "a.csv",
        b"prompt,completion\ra,b\rc,d",
        row(prompt="a", completion="b") + row(prompt="c", completion="d"),
    ),
    "line breaks inside cells": (
        "a.csv",
        b'prompt,completion\r\n"a\nb\r\nc","d"\r\n',
        row(prompt="a\nb\r\nc", completion="d"),
    ),
    "blank lines": ("a.csv", b"\n \nprompt,completion\n\na,b\n  \n\n", row(prompt="a", completion="b")),
    "no line end": ("a.csv", b"prompt,completion\na,b", row(prompt="a", completion="b")),
    "empty records of Excel": ("a.csv", b"prompt;completion\na;b\n;\n;\n", row(prompt="a", completion="b")),
    # headers
    "case and spaces of the header": (
        "a.csv",
        b" Prompt , COMPLETION,Note\n a , b,c\n",
        row(prompt=" a ", completion=" b", Note="c"),
    ),
    "case of the keys of a JSON row": (
        "a.jsonl",
        b'{"Prompt": "a", "Completion ": "b"}',
        row(prompt="a", completion="b"),
    ),
    "the key itself beside another case": (
        "a.csv",
        b"prompt,Prompt,completion\na,x,b\n",
        row(prompt="a", Prompt="x", completion="b"),
    ),
    "index of pandas": (
        "a.csv",
        b",prompt,completion\n0,a,b\n1,c,d\n",
        row(prompt="a", completion="b") + row(prompt="c", completion="d"),
    ),
    "index of pandas, read and written again": (
        "a.csv",
        b"Unnamed: 0,prompt,completion\n0,a,b\n",
        row(prompt="a", completion="b"),
    ),
    "separators at the ends of lines": ("a.csv", b"prompt,completion,,\na,b,,\n", row(prompt="a", completion="b")),
    "separators at the ends of rows": (
        "a.csv",
        b"prompt,completion\na,b,\nc,d,,\n",
        row(prompt="a", completion="b") + row(prompt="c", completion="d"),
    ),
    # cells
    "missing values": (
        "a.csv",
        b"prompt,completion,note\na,b,\nc,d,x\n",
        row(prompt="a", completion="b", note=None) + row(prompt="c", completion="d", note="x"),
    ),
    "JSON cells": (
        "a.csv",
        b'messages,params\n"[{""role"": ""user"", ""content"": ""say \\""hi\\""""}, {""role"": ""assistant"", '
        b'""content"": ""hi""}]","{""max_new_tokens"": 5}"\n',
        row(messages=MESSAGES, params={"max_new_tokens": 5}),
    ),
    "JSON cells without quotes": (
        "a.tsv",
        b'table\trefs\n{"name": "Ada"}\t["x", "y"]\n[["name", "Bob"]]\t\n',
        row(table={"name": "Ada"}, refs=["x", "y"]) + row(table=[["name", "Bob"]], refs=None),
    ),
    "texts that look like JSON": ("a.csv", b"prompt,completion\n[1],{}\n", row(prompt="[1]", completion="{}")),
    "an own column with the name of a list": (
        "a.csv",
        b"table,price\n[sic] Oak,5\n",
        row(table="[sic] Oak", price="5"),
    ),
    "one row": ("a.csv", b"prompt\nWhat is 2+2?", row(prompt="What is 2+2?")),
    # suffixes and JSON
    "suffix in upper case": ("A.CSV", b"prompt,completion\na,b\n", row(prompt="a", completion="b")),
    "compressed": ("a.tsv.gz", gzip.compress(b"prompt\tcompletion\na\tb\n"), row(prompt="a", completion="b")),
    "NDJSON": ("a.ndjson", b'{"prompt": "a"}\n{"prompt": "b"}\n', row(prompt="a") + row(prompt="b")),
    "a list in a .jsonl": ("a.jsonl", b'[{"prompt": "a"},\n{"prompt": "b"}]', row(prompt="a") + row(prompt="b")),
    "JSON lines in a .json": ("a.json", b'{"prompt": "a"}\n{"prompt": "b"}\n', row(prompt="a") + row(prompt="b")),
    "objects over several lines": (
        "a.jsonl",
        b'{\n  "prompt": "a"\n}\n{\n  "prompt": "b"\n}\n',
        row(prompt="a") + row(prompt="b"),
    ),
    "one object": ("a.json", b'{\n "prompt": "a",\n "completion": "b"\n}\n', row(prompt="a", completion="b")),
    "one object of messages": (
        "a.json",
        b'{"messages": [{"role": "user", "content": "a"}]}',
        row(messages=[{"role": "user", "content": "a"}]),
    ),
    "a list under data": ("a.json", b'{"version": 1,\n "data": [\n {"prompt": "a"}],\n "n": 1}', row(prompt="a")),
    "a list under train, in one line": ("a.jsonl", b'{"train": [{"prompt": "a"}]}', row(prompt="a")),
}


@pytest.mark.parametrize(("name", "data", "rows"), READ.values(), ids=READ)
def test_a_file_is_read(tmp_path, name, data, rows):
    (tmp_path / name).write_bytes(data)
    assert read_rows(tmp_path / name) == rows


def office(*members: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for member in members:
            file.writestr(member, "")
    return out.getvalue()


RUSSIAN = "\u041f\u0440\u0438\u0432\u0435\u0442,\u0434\u043e\n"
HEAD = b"prompt,completion\n"
REFUSED = {
    # encodings
    "cp1252": ("a.csv", HEAD + "a,b\nGrüße,à bientôt\n".encode("cp1252"), ":3: ", "--encoding cp1252", "Grüße"),
    "cp1252 in JSON lines": ("a.jsonl", '{"prompt": "é"}\n'.encode("cp1252"), ":1: ", "--encoding cp1252", "é"),
    "cp1251": ("a.csv", HEAD + RUSSIAN.encode("cp1251"), ":2: ", "--encoding cp1251", RUSSIAN[:6]),
    "Shift JIS": ("a.csv", HEAD + "こんにちは,さようなら\n".encode("cp932"), "--encoding cp932", "こんにちは"),
    "GB 18030": ("a.csv", HEAD + "早上好今天,再见\n".encode("gb18030"), "--encoding gb18030", "早上好"),
    "UTF-16 without BOM": ("a.csv", "prompt,completion\na,é\n".encode("utf-16-le"), "--encoding utf-16-le"),
    "UTF-16 without BOM, of ASCII": ("a.csv", "prompt\na\n".encode("utf-16-be"), "--encoding utf-16-be"),
    "one damaged line": ("a.csv", HEAD + "é,ü\nß,ä\n\xff,x\n".encode()[:-5] + b"\xff,x\n", ":4: ", "repair"),
    "NUL bytes": ("a.csv", HEAD + b"a,b\nc,\0\0\0d\n", ":3: ", "NUL", "damaged"),
    # records
    "too few cells": ("a.csv", HEAD + b"a,b\nc\n", ":3: ", "expected 2 cells", "got 1", "missing"),
    "an unquoted separator": ("a.csv", HEAD + b"a,b\nHi, you,d\n", ":3: ", "got 3", "double quotes"),
    "an open quote": ("a.csv", HEAD + b'a,b\n"c,d\ne,f\n', ":3: ", "never closed"),
    "a quote inside a quoted cell": ("a.csv", HEAD + b'"a "b" c",d\n', ":2: ", "as two"),
    "a quote escaped by a backslash": ("a.csv", HEAD + b'"a \\"b\\" c",d\n', ":2: ", "as two"),
    "a space before a quote": ("a.csv", HEAD + b'"a", "b"\n', ":2: ", "no space before a double quote"),
    # headers
    "a column twice": ("a.csv", b"text,text\na,b\n", ":1: ", "'text'", "a line of names"),
    "two columns of one key": ("a.csv", b"Prompt,PROMPT,completion\na,b,c\n", ":1: ", "rename one"),
    "two keys of one key in JSON": ("a.jsonl", b'{"Prompt": "a", "PROMPT": "b"}', ":1: ", "rename one"),
    "a column without a name": ("a.csv", b"prompt,completion,\na,b,\nc,d,x\n", ":1: ", "column 3", "add the name"),
    "an index of names": ("a.csv", b",prompt,completion\nx,a,b\n", ":1: ", "column 1", "add the name"),
    "two separators fit": ("a.csv", b"a,b;c\n1,2;3\n", ":1: ", "commas and semicolons", "double quotes"),
    "a header alone": ("a.csv", HEAD, "at least one row"),
    # kinds of files by content
    "a workbook named .csv": ("a.csv", office("[Content_Types].xml", "xl/workbook.xml"), "save its sheet as CSV"),
    "an old workbook named .csv": ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "save its sheet as CSV"),
    "gzip named .csv": ("a.csv", gzip.compress(HEAD), "a.csv.gz"),
    "Parquet named .csv": ("a.csv", b"PAR1....PAR1", "name it .parquet"),
    "JSON named .csv": ("a.csv", b'[\n {"prompt": "a"}]', ".json"),
    "JSON lines named .csv": ("a.csv", b'{"prompt": "a"}\n', ".jsonl"),
    "CSV named .jsonl": ("a.jsonl", HEAD + b"a,b\n", ":1: ", ".csv"),
    "CSV named .json": ("a.json", HEAD + b"a,b\n", ":1: ", ".csv"),
    "a pointer of Git LFS": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a web page": ("a.csv", b"<!DOCTYPE html>\n<html></html>", "download the raw file"),
    # kinds of files by suffix
    "a workbook": ("a.xlsx", office("xl/workbook.xml"), "save its sheet as CSV"),
    "an old workbook": ("a.XLS", b"", "save its sheet as CSV"),
    "an open sheet": ("a.ods", b"", "save its sheet as CSV"),
    "plain text": ("a.txt", b"Hello\n", ".csv", ".jsonl"),
    "a document": ("a.docx", b"", ".jsonl"),
    "a PDF": ("a.pdf", b"", ".jsonl"),
    "Arrow": ("a.arrow", b"", "to_parquet"),
    "an archive": ("a.csv.zip", b"", "unpack"),
    "bzip2": ("a.csv.bz2", b"", "unpack"),
    "xz": ("a.jsonl.xz", b"", "unpack"),
    "a packed archive": ("a.tar.gz", b"", "unpack"),
    "another suffix": ("a.data", b"", ".csv"),
    # JSON
    "rows of Python": ("a.jsonl", b"{'prompt': 'a'}\n", ":1: ", "json.dumps"),
    "two lists": (
        "a.json",
        b'{"train": [{"prompt": "a"}],\n "test": [{"prompt": "b"}]}',
        "'train', 'test'",
        "each list",
    ),
    "columns of pandas": ("a.json", b'{"prompt": {"0": "a"}, "completion": {"0": "b"}}', "orient='records'"),
    "columns of lists": ("a.json", b'{"prompt": ["a", "b"],\n "completion": ["c", "d"]}', "orient='records'"),
}


@pytest.mark.parametrize("shape", REFUSED.values(), ids=REFUSED)
def test_a_file_is_refused_with_the_sentence_that_solves_it(tmp_path, shape):
    name, data, *parts = shape
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name))
    assert [p for p in parts if p not in message] == []


ENCODED = {
    "cp1252": ("a.csv", "prompt,completion\nGrüße,à bientôt\n", "cp1252"),
    "cp1252 in JSON": ("a.json", '[{"prompt": "Grüße", "completion": "à bientôt"}]', "cp1252"),
    "cp1252 compressed": ("a.jsonl.gz", '{"prompt": "Grüße", "completion": "à bientôt"}\n', "cp1252"),
    "UTF-16 without BOM": ("a.tsv", "prompt\tcompletion\nGrüße\tà bientôt\n", "utf-16-le"),
    "UTF-8 with its name": ("a.csv", "prompt,completion\nGrüße,à bientôt\n", "UTF8"),
    "UTF-8 with BOM": ("a.csv", "\ufeffprompt,completion\nGrüße,à bientôt\n", "utf-8"),
    "UTF-8 with BOM and its name": ("a.csv", "\ufeffprompt,completion\nGrüße,à bientôt\n", "utf-8-sig"),
    "UTF-16 with BOM": ("a.csv", "\ufeffprompt,completion\nGrüße,à bientôt\n", "utf-16-le"),
}


@pytest.mark.parametrize(("name", "text", "encoding"), ENCODED.values(), ids=ENCODED)
def test_a_given_encoding(tmp_path, name, text, encoding, caplog):
    data = text.encode(encoding.replace("-sig", ""))
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert read_rows(tmp_path / name, encoding=encoding) == PAIRS
    assert not caplog.records


def test_a_wrong_encoding(tmp_path, caplog):
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,completion\na,b\ní,ő\n".encode())
    with pytest.raises(DataError, match=r":3: .*UTF-8; leave"):
        read_rows(path, encoding="ascii")
    with caplog.at_level(logging.WARNING):
        assert read_rows(path, encoding="latin-1")[1]["prompt"] == "Ã\xad"
    assert "UTF-8" in caplog.text
    path.write_bytes(b"\xef\xbb\xbfprompt\na\n")
    with pytest.raises(DataError, match="byte order mark of utf-8; leave"):
        read_rows(path, encoding="cp1252")


@pytest.mark.parametrize("encoding", ["", "cp1252x", "hex", "a\0b", 5])
def test_an_encoding_that_does_not_exist(tmp_path, encoding):
    (tmp_path / "a.csv").write_bytes(HEAD + b"a,b\n")
    with pytest.raises(ConfigError, match="encoding: expected"):
        read_rows(tmp_path / "a.csv", encoding=encoding)


def test_a_hundred_thousand_rows(tmp_path):
    lines = (f"{i};What is {i}+1?, please;{i + 1};{i / 8:.2f}\r\n" for i in range(100_000))
    (tmp_path / "a.csv").write_bytes(("number;prompt;completion;price\r\n" + "".join(lines)).encode())
    rows = read_rows(tmp_path / "a.csv")
    assert len(rows) == 100_000
    assert all(r["prompt"] == f"What is {i}+1?, please" and r["completion"] == str(i + 1) for i, r in enumerate(rows))
    assert (rows[-1].line, rows[-1]["price"]) == (100_001, "12499.88")


def test_memory_of_reading_is_a_small_multiple_of_the_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\n" + (b"word " * 60 + b"," + b"text " * 60 + b"\n") * 5_000)
    tracemalloc.start()
    try:
        rows = read_rows(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(rows) == 5_000
    assert peak < 4 * path.stat().st_size


NAMES = st.text(" abé#", min_size=1, max_size=4).filter(str.strip)
HEADERS = st.lists(NAMES, min_size=1, max_size=4, unique_by=lambda n: n.strip().casefold())


@st.composite
def tables(draw):
    header = draw(HEADERS)
    cells = st.text(st.characters(codec="utf8", exclude_characters="\0"), max_size=6) | st.text(
        ',;\t|"\n\r a', max_size=6
    )
    record = st.lists(cells, min_size=len(header), max_size=len(header)).filter(any)
    return header, draw(st.lists(record, min_size=1, max_size=5))


@given(
    tables(),
    st.sampled_from(",;\t|"),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.booleans(),
    st.sampled_from(["", "-16"]),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_tables_of_any_text_are_read_back(tmp_path_factory, table, separator, line_end, quotes, wide):
    header, records = table
    out = io.StringIO(newline="")
    # QUOTE_MINIMAL of older Pythons leaves line breaks other than its own unquoted
    plain = csv.QUOTE_ALL if quotes or any(c in "".join(map("".join, records)) for c in "\r\n") else csv.QUOTE_MINIMAL
    csv.writer(out, delimiter=separator, lineterminator=line_end, quoting=plain).writerows([header, *records])
    path = tmp_path_factory.getbasetemp() / "table.csv"
    path.write_bytes(out.getvalue().encode("utf-16" if wide else "utf-8-sig"))
    assert [[row[name] or "" for name in header] for row in read_rows(path)] == records


@given(
    st.lists(
        st.lists(st.text(",;a b", min_size=1, max_size=4).filter(str.strip), min_size=2, max_size=2),
        min_size=2,
        max_size=4,
    )
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_names_with_separators_are_read_or_refused(tmp_path_factory, records):
    """The true separator always fits, so that another one is never taken in its place."""
    for separator in ",;":
        out = io.StringIO(newline="")
        csv.writer(out, delimiter=separator, lineterminator="\n").writerows(records)
        path = tmp_path_factory.getbasetemp() / "names.csv"
        path.write_text(out.getvalue(), encoding="utf8")
        try:
            rows = read_rows(path)
        except DataError:
            continue
        assert [[*row.values()] for row in rows] == records[1:]


def test_a_column_of_ones_own_is_read_as_it_stands_where_its_name_is_that_of_a_list(tmp_path):
    texts = ["[1.10, 2.0e3]", '{"k":"\\u00e9"}', "['a', 'b']", "[ ]"]
    lines = "".join('"' + t.replace('"', '""') + '",x\n' for t in texts)
    (tmp_path / "a.csv").write_text(f"Labels,note\n{lines}")
    rows = read_rows(tmp_path / "a.csv")
    task = column_task(prompt="{labels} ->", target="note")
    assert task.prompts(rows, None) == [f"{t} ->" for t in texts]
    assert rows[0]["labels"] == [1.1, 2000.0]
    assert pickle.loads(pickle.dumps(rows))[0]["labels"].text == texts[0]
    records = Records(rows, generated(logprobs=False, errors=False, details=False))
    written = WRITERS[".csv"](records, [{**row, "text": "y"} for row in rows]).decode()
    assert [r["labels"] for r in csv.DictReader(io.StringIO(written))] == texts


LISTS_OF_PYTHON = {
    "messages": "messages\n\"[{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]\"\n",
    "conversations": "conversations\n\"[{'from': 'human', 'value': 'a'}]\"\n",
    "references": "mr,refs\nname[A],\"['a', 'b']\"\n",
    "table": "table,ref\n\"{'name': 'A'}\",x\n",
    "token ids": 'input_ids,labels\n"[1 2]","[1, 2]"\n',
    "labels": 'input_ids,labels\n"[1, 2]","[1 2]"\n',
    "mask": 'input_ids,labels,attention_mask\n"[1, 2]","[1, 2]","[1 1]"\n',
}


@pytest.mark.parametrize("content", LISTS_OF_PYTHON.values(), ids=LISTS_OF_PYTHON)
def test_a_list_as_python_writes_it_is_refused_with_the_form_to_write(tmp_path, content):
    (tmp_path / "a.csv").write_text(content)
    rows = read_rows(tmp_path / "a.csv")
    task = Task("input_ids") if "input_ids" in rows[0] else find_task(None, rows[0])
    with pytest.raises(DataError, match=r"json\.dumps"):
        check_examples(rows, task)
