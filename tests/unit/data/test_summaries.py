"""Corpora of summaries in the layouts in which they are public: rows, counts, and damaged files."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from damaged_files import damaged, damaged_bytes
from prefixfast import ConfigError, DataError
from prefixfast.data import TASKS, find_task, read_task
from prefixfast.engine.make_requests import unknown_keys

D1, D2, S1, S2 = "The mill closed. It was old.", 'A "fan" spins, fast.', "The mill closed.", "Fans spin."
ROWS: list[dict[str, Any]] = [{"document": D1, "summary": S1}, {"document": D2, "summary": S2}]


@dataclass(frozen=True)
class Layout:
    """Files of a corpus, by their path in a folder.

    Attributes:
        task: Name of the corpus.
        files: Content by path.
        path: File or folder that is read, ``"."`` for the whole folder.
        rows: Rows that the test split gives.
        main: File that is damaged.
    """

    task: str
    files: dict[str, bytes]
    path: str
    rows: list[dict[str, Any]]
    main: str


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]]) -> bytes:
    cells = [[str(v).replace('"', '""') for v in row.values()] for row in rows]
    return "".join(",".join(f'"{c}"' for c in line) + "\n" for line in [list(rows[0]), *cells]).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def pair(name: str) -> dict[str, bytes]:
    return {f"{name}.source": f"{D1}\n{D2}\n".encode(), f"{name}.target": f"{S1}\n{S2}\n".encode()}


def with_ids(rows: list[dict[str, Any]], ids: list[str]) -> list[dict[str, Any]]:
    return [{**row, "id": i} for row, i in zip(rows, ids, strict=True)]


# Names of XiangLi1999/PrefixTuning, seq2seq/utils.py: xsum/{train,val,test}.{source,target}, read line by line. BART's
# README (facebookresearch/fairseq, examples/bart/README.summarization.md) has the same names for both corpora.
XSUM_PAIR = Layout("xsum", pair("xsum/test"), "xsum/test.source", ROWS, "xsum/test.source")
CNN_PAIR = Layout("cnn_dailymail", pair("cnn_dm/test"), "cnn_dm", ROWS, "cnn_dm/test.target")
# Features of the loader of XSum in huggingface/datasets, datasets/xsum/xsum.py: document, summary, id. The names of
# parquet files are those of exports, such as test-00000-of-00001.parquet.
XSUM_ROWS = with_ids(ROWS, ["1", "2"])
# Files of EdinburghNLP/XSum: XSum-Dataset/scripts/parse-bbc-html-data.py writes BBCID.data, and the archive that the
# loader above reads has BBCID.summary. Both are split by XSum-Dataset/XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json.
SPLITS = json.dumps({"test": ["11", "12"], "validation": ["13"], "train": ["14"]}).encode()
DATA = "[XSUM]URL[XSUM]\nhttp\n\n[XSUM]INTRODUCTION[XSUM]\n{}\n\n[XSUM]RESTBODY[XSUM]\nShare this with\n{}\n{}\n"
SUMMARY = (
    "[SN]URL[SN]\nhttp\n\n[SN]TITLE[SN]\nA title\n\n[SN]FIRST-SENTENCE[SN]\n{}\n\n[SN]RESTBODY[SN]\n{}\n\nEmail\n{}\n"
)
ARTICLES = [(S1, "The mill closed.", "It was old."), (S2, 'A "fan" spins,', "fast.")]
TEXTS = with_ids([{"document": f"{a}\n{b}", "summary": s} for s, a, b in ARTICLES], ["11", "12"])
SPLIT_NAME = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
EXTRACTED = {f"bbc/{i}.data": DATA.format(*a).encode() for i, a in zip((11, 12), ARTICLES, strict=True)}
ARCHIVE = {
    f"bbc-summary-data/{i}.summary": SUMMARY.format(*a).encode() for i, a in zip((11, 12), ARTICLES, strict=True)
}
# Loader of CNN/DailyMail in huggingface/datasets, datasets/cnn_dailymail/cnn_dailymail.py, after make_datafiles.py of
# abisee/cnn-dailymail: article, highlights and id of rows; stories, and url_lists/all_test.txt with their addresses.
CNN_ROWS = [{"article": r["document"], "highlights": r["summary"], "id": i} for r, i in zip(ROWS, "ab", strict=True)]
STORY = "{}\n\nA caption\n\n{}\n\n@highlight\n\n{}\n\n@highlight\n\nMore.\n"
ADDRESSES = ("http://a/1", "http://a/2")
HASHES = [hashlib.sha1(a.encode()).hexdigest() for a in ADDRESSES]
STORIES = {
    "cnn/url_lists/all_test.txt": "".join(f"{a}\n" for a in ADDRESSES).encode(),
    **{f"cnn/stories/{h}.story": STORY.format(D1, D2, s).encode() for h, s in zip(HASHES, ("One", S2), strict=True)},
}
STORY_ROWS = with_ids([{"document": f"{D1} A caption . {D2}", "summary": f"{s}\nMore."} for s in ("One .", S2)], HASHES)
# The list in faiazrahman/Multimodal-Content-Moderation, data/SAMSum/README.txt: id, summary and dialogue, with "\r\n".
TALK = "Ann: Tea?\r\nBob: Yes :-)"
SAMSUM_ROWS = [{"id": "13", "summary": S1, "dialogue": TALK}, {"id": "14", "summary": S2, "dialogue": D2}]
SAMSUM_READ = [
    {"document": TALK, "summary": S1, "id": "13"},
    {"document": D2, "summary": S2, "id": "14"},
]
# cylnlp/dialogsum, DialogSum_Data/dialogsum.{train,dev,test}.jsonl, and tables with one summary a row.
DIALOGUES = [
    {"fname": f"test_{i}", "dialogue": d} | {f"{k}{n}": f"{k} {i}{n}" for n in (1, 2, 3) for k in ("summary", "topic")}
    for i, d in enumerate((TALK, D2))
]
DIALOGUE_ROWS = [
    {
        "document": d,
        "refs": [f"summary {i}{n}" for n in (1, 2, 3)],
        "id": f"test_{i}",
        "fname": f"test_{i}",
        **{f"topic{n}": f"topic {i}{n}" for n in (1, 2, 3)},
    }
    for i, d in enumerate((TALK, D2))
]
FLAT = [
    {"id": f"test_{i}_{n}", "dialogue": d, "summary": f"summary {i}{n}", "topic": "tea"}
    for i, d in enumerate((TALK, D2))
    for n in (1, 2, 3)
]
FLAT_ROWS = [
    {"document": d, "id": f"test_{i}_1", "topic": "tea", "refs": [f"summary {i}{n}" for n in (1, 2, 3)]}
    for i, d in enumerate((TALK, D2))
]
LAYOUTS = {
    "xsum pair": XSUM_PAIR,
    "xsum jsonl": Layout("xsum", {"x.jsonl": lines(XSUM_ROWS)}, "x.jsonl", XSUM_ROWS, "x.jsonl"),
    "xsum csv": Layout("xsum", {"x.csv": table(XSUM_ROWS)}, "x.csv", XSUM_ROWS, "x.csv"),
    "xsum parquet": Layout(
        "xsum",
        {f"data/{n}-00000-of-00001.parquet": parquet(XSUM_ROWS) for n in ("train", "validation", "test")},
        ".",
        XSUM_ROWS,
        "data/test-00000-of-00001.parquet",
    ),
    "xsum articles": Layout("xsum", {**EXTRACTED, SPLIT_NAME: SPLITS}, "bbc", TEXTS, "bbc/12.data"),
    "xsum archive": Layout("xsum", {**ARCHIVE, SPLIT_NAME: SPLITS}, ".", TEXTS, SPLIT_NAME),
    "cnn_dailymail pair": CNN_PAIR,
    "cnn_dailymail csv": Layout(
        "cnn_dailymail", {"test.csv": table(CNN_ROWS)}, ".", with_ids(ROWS, ["a", "b"]), "test.csv"
    ),
    "cnn_dailymail jsonl": Layout(
        "cnn_dailymail", {"c.jsonl": lines(CNN_ROWS)}, "c.jsonl", with_ids(ROWS, ["a", "b"]), "c.jsonl"
    ),
    "cnn_dailymail stories": Layout("cnn_dailymail", STORIES, "cnn", STORY_ROWS, f"cnn/stories/{HASHES[1]}.story"),
    "cnn_dailymail list": Layout("cnn_dailymail", STORIES, "cnn/stories", STORY_ROWS, "cnn/url_lists/all_test.txt"),
    "samsum": Layout(
        "samsum", {"test.json": json.dumps(SAMSUM_ROWS, indent=2).encode()}, ".", SAMSUM_READ, "test.json"
    ),
    "dialogsum": Layout(
        "dialogsum",
        {"dialogsum.test.jsonl": lines(DIALOGUES), "dialogsum.hiddentest.dialogue.jsonl": b""},
        ".",
        DIALOGUE_ROWS,
        "dialogsum.test.jsonl",
    ),
    "dialogsum csv": Layout("dialogsum", {"test.csv": table(FLAT)}, "test.csv", FLAT_ROWS, "test.csv"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_rows_of_a_layout(layout, tmp_path):
    path = write_all(tmp_path / "c", layout.files) / layout.path
    found = read_task(layout.task, path, "test")
    assert found == layout.rows
    assert all(Path(row.path).is_file() and row.line > 0 for row in found)
    assert not [key for row in found for key in unknown_keys(row, TASKS[layout.task])], "rows are requests"
    task = TASKS[layout.task]
    (prompt, targets), *_ = task.pairs(found, "</s>")
    assert prompt == layout.rows[0]["document"] + ("</s>" if "eos" in task.prompt else "\n")
    assert targets == layout.rows[0].get("refs", [layout.rows[0].get("summary")])


def write_all(folder: Path, files: dict[str, bytes]) -> Path:
    for name, raw in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    return folder


def rows_or_place(layout: Layout, folder: Path, split: str) -> list[Any] | None:
    """The rows of damaged files, which the task reads; None for an error, which names its place."""
    error = None
    try:
        found = read_task(layout.task, folder / layout.path, split)
    except DataError as e:
        error = e
    if error is not None:
        assert str(error.path).startswith(str(folder)), error
        assert str(error).startswith(str(error.path)), error
        assert error.line is None or str(error).startswith(f"{error.path}:{error.line}: "), error
        return None
    for row in found:
        texts = [row["document"], *row.get("refs", [row.get("summary")])]
        assert all(isinstance(text, str) for text in texts), row
        assert isinstance(row.get("id"), str | int | None), row
    return found


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_damaged_files_give_their_place_or_rows(layout, tmp_path):
    folder, main = write_all(tmp_path / "c", layout.files), layout.main
    raw = layout.files[main]
    found = damaged_bytes(raw) if main.endswith(".parquet") else damaged(main, raw.decode())
    assert len(found) >= 50
    refused = 0
    for what, changed in found.items():
        (folder / main).write_bytes(changed)
        for split in ("test", "train") if layout.path == main else ("test",):
            try:
                refused += rows_or_place(layout, folder, split) is None
            except BaseException as e:
                raise AssertionError(what) from e
    assert refused >= 25, "most damage shows"
    (folder / main).unlink()
    left = rows_or_place(layout, folder, "test")
    assert left is None or left == [r for r in layout.rows if r["id"] != Path(main).stem], "a crawl may miss documents"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_other_forms_of_the_same_text(layout, tmp_path):
    folder, main = write_all(tmp_path / "c", layout.files), layout.main
    if main.endswith(".parquet"):
        return
    text = layout.files[main].decode()
    for form in (
        codecs.BOM_UTF8 + text.encode(),
        text.encode("utf-16"),
        codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    ):
        (folder / main).write_bytes(form)
        assert read_task(layout.task, folder / layout.path, "test") == layout.rows


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
LOOKS_LIKE_ROWS = {
    "pointers": ("xsum", {"test.source": POINTER, "test.target": POINTER}, "test.source: .*a pointer of Git LFS"),
    "a null": ("xsum", {"a.jsonl": b'{"document": "d", "summary": null}'}, "a.jsonl:1: summary: .* got None"),
    "a header again": ("samsum", {"a.csv": table(SAMSUM_ROWS) * 2}, "a.csv:5: .* names of the columns again"),
    "a null id": ("samsum", {"a.json": b'[{"id": [1], "dialogue": "d", "summary": "s"}]'}, "a.json:1: id: expected a"),
    "twice": ("dialogsum", {"a.jsonl": lines(DIALOGUES[:1] * 2)}, "a.jsonl:2: id: .* got 'test_0' again"),
    "two articles": (
        "xsum",
        {"11.data": EXTRACTED["bbc/11.data"] * 2, SPLIT_NAME: SPLITS},
        "11.data:1: expected each section once, got URL again",
    ),
    "another corpus": ("samsum", {"a.csv": table(CNN_ROWS)}, "a.csv:2: .* of which dialogue is missing; got 'article'"),
}


@pytest.mark.parametrize(("task", "files", "message"), LOOKS_LIKE_ROWS.values(), ids=LOOKS_LIKE_ROWS)
def test_damage_that_looks_like_rows_is_refused(task, files, message, tmp_path):
    write_all(tmp_path / "c", files)
    name = next(iter(files))
    with pytest.raises(DataError, match=message):
        read_task(task, tmp_path / "c" / ("" if name.endswith(".data") else name), "test")


def test_a_document_that_is_listed_twice_is_read_once(tmp_path):
    twice = {k: raw * 2 if k.endswith(".txt") else raw for k, raw in STORIES.items()}
    assert read_task("cnn_dailymail", write_all(tmp_path / "c", twice) / "cnn", "test") == STORY_ROWS


def test_training_leaves_out_empty_texts_and_keeps_references_apart(tmp_path, caplog):
    (tmp_path / "train.source").write_text(f"{D1}\n\n{D2}\n")
    (tmp_path / "train.target").write_text(f"{S1}\n{S1}\n{S2}\n")
    with caplog.at_level("INFO"):
        assert read_task("cnn_dailymail", tmp_path, "train") == ROWS
    assert "1 rows whose document or summary is empty are left out" in caplog.text
    (tmp_path / "flat.csv").write_bytes(table(FLAT))
    assert [r["summary"] for r in read_task("dialogsum", tmp_path / "flat.csv")] == [r["summary"] for r in FLAT]
    (tmp_path / "samsum.csv").write_text('id,dialogue,summary\n1,"",s\n2,d,s\n')
    assert [r["id"] for r in read_task("samsum", tmp_path / "samsum.csv")] == ["2"]
    exported = [{"id": "1", "dialogue": None, "summary": "s"}, *SAMSUM_ROWS]  # as one row of the public export is
    (tmp_path / "train.parquet").write_bytes(parquet(exported))
    (tmp_path / "samsum.jsonl").write_bytes(lines(exported))
    for name in ("train.parquet", "samsum.jsonl"):
        assert read_task("samsum", tmp_path / name) == SAMSUM_READ
        with pytest.raises(DataError, match=":1: dialogue: expected a string, got None"):
            read_task("samsum", tmp_path / name, "test")
    assert [r["document"] for r in read_task("samsum", tmp_path / "samsum.csv", "dev")] == ["", "d"]


@pytest.mark.parametrize("task", ["xsum", "cnn_dailymail", "samsum", "dialogsum"])
def test_files_of_rows(task, tmp_path):
    rows = [*ROWS, {"document": TALK, "refs": [S1, S2]}]
    (tmp_path / "r.jsonl").write_bytes(lines(rows))
    assert read_task(task, tmp_path / "r.jsonl", "train") == read_task(task, tmp_path / "r.jsonl", "test") == rows
    for wrong in ({"document": TALK, "refs": []}, {"document": 5, "refs": [S1]}, {"document": TALK, "text": S1}):
        (tmp_path / "w.jsonl").write_bytes(lines([*ROWS, wrong]))
        with pytest.raises(DataError, match=r"w\.jsonl:3: "):
            read_task(task, tmp_path / "w.jsonl", "test")


def test_parts_of_a_split_and_compressed_pairs(tmp_path):
    for i, row in enumerate(XSUM_ROWS):
        (tmp_path / f"validation-0000{i}-of-00002.parquet").write_bytes(parquet([row]))
    assert read_task("xsum", tmp_path, "dev") == XSUM_ROWS
    for name, raw in pair("val").items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
    assert read_task("xsum", tmp_path / "val.target.gz", "dev") == ROWS
    with pytest.raises(DataError, match="expected one file of the dev split"):
        read_task("xsum", tmp_path, "dev")


def test_pairs_end_lines_as_python_does(tmp_path):
    (tmp_path / "val.source").write_bytes("a\u2028b\r\n\x0cc\x1d".encode())
    (tmp_path / "val.target").write_bytes(b"d\ne\n")
    found = read_task("xsum", tmp_path, "dev")
    assert found == [{"document": "a\u2028b", "summary": "d"}, {"document": "\x0cc\x1d", "summary": "e"}]
    (tmp_path / "val.target").write_bytes(b"d\n")
    with pytest.raises(DataError, match=r"got 2 lines, val\.target has 1") as caught:
        read_task("xsum", tmp_path, "dev")
    assert caught.value.line == 2


def test_articles_without_a_list_and_without_files(tmp_path, caplog):
    write_all(tmp_path / "x", EXTRACTED)
    with pytest.raises(DataError, match=f"expected {SPLIT_NAME}"):
        read_task("xsum", tmp_path / "x", "test")
    (tmp_path / "x" / SPLIT_NAME).write_bytes(SPLITS)
    with pytest.raises(DataError, match="expected files of the 1 documents that the split lists, got none"):
        read_task("xsum", tmp_path / "x", "dev")
    (tmp_path / "x" / "bbc" / "11.data").unlink()
    assert read_task("xsum", tmp_path / "x", "test") == TEXTS[1:]
    assert "1 documents that the split lists have no file" in caplog.text
    assert read_task("xsum", tmp_path / "x" / "bbc" / "12.data", "test") == TEXTS[1:]
    write_all(tmp_path / "s", {k: v for k, v in STORIES.items() if k.endswith(".story")})
    with pytest.raises(DataError, match=r"url_lists/all_train\.txt of abisee/cnn-dailymail"):
        read_task("cnn_dailymail", tmp_path / "s", "train")
    assert (
        read_task("cnn_dailymail", tmp_path / "s" / "cnn" / "stories" / f"{HASHES[0]}.story", "dev") == STORY_ROWS[:1]
    )


def test_the_hidden_test_of_dialogsum_has_no_summaries(tmp_path):
    (tmp_path / "h.jsonl").write_bytes(lines([{"fname": "hiddentest_0", "dialogue": TALK}]))
    assert read_task("dialogsum", tmp_path / "h.jsonl", "test") == [
        {"document": TALK, "fname": "hiddentest_0", "id": "hiddentest_0"}
    ]
    (tmp_path / "h.jsonl").write_bytes(lines([{"fname": "test_0", "dialogue": TALK}]))
    with pytest.raises(DataError, match=r"h\.jsonl:1: .*summary is missing"):
        read_task("dialogsum", tmp_path / "h.jsonl", "test")


def test_documents_with_several_summaries():
    row = {"document": "d", "refs": ["a", "b"]}
    assert find_task(None, row).targets(row, 0) == ["a", "b"]
    with pytest.raises(DataError, match="got summary and refs; remove all but one"):
        find_task(None, row).targets({**row, "summary": "c"}, 0)
    with pytest.raises(DataError, match="refs: expected a list of strings"):
        find_task(None, row).targets({"document": "d", "refs": []}, 0)
    with pytest.raises(ConfigError, match="split: expected one of train, dev, test"):
        read_task("xsum", "none", "validation")  # type: ignore[arg-type]
