"""Official counts: whole files, parts, other releases, and files of another split."""

from __future__ import annotations

from typing import Any

import pytest

from prefixfast import DataError
from prefixfast.data import TASKS, read_task
from prefixfast.data.corpora import CORPORA, count_warning, other_split
from prefixfast.data.files import FileRow

MOST = 20_000  # rows of a split that a test makes
WHOLE = [
    (name, split, counts)
    for name, corpus in CORPORA.items()
    for split, official in corpus.counts.items()
    for counts in official
    if counts.rows < MOST and counts.texts is not None
]


def rows_of(task: str, counts: Any, *, as_train: bool = False) -> list[dict[str, Any]]:
    """Rows with the numbers of a whole split, with distinct inputs; in training each text of E2E is a row."""
    key = "document" if TASKS[task].format == "document" else {"e2e": "mr", "totto": "table"}.get(task, "triples")
    share, more = divmod(counts.texts, counts.rows)
    sizes = [share + (i < more) for i in range(counts.rows)]
    lang = {"lang": counts.lang} if counts.lang and counts.texts else {}
    if as_train and key in ("mr", "document"):
        lone = "ref" if key == "mr" else "summary"
        return [{key: f"{i}", lone: "x"} for i, size in enumerate(sizes) for _ in range(size)]
    return [{key: f"{i}", **lang, **({"refs": ["x"] * size} if size else {})} for i, size in enumerate(sizes)]


@pytest.mark.parametrize(("task", "split", "counts"), WHOLE, ids=[f"{t} {s} {c.release}" for t, s, c in WHOLE])
def test_whole_files_and_parts(task, split, counts):
    rows = rows_of(task, counts, as_train=split == "train")
    assert count_warning(task, rows, split) is None
    assert other_split(task, rows, split) is None
    part = count_warning(task, rows[9:], split)
    assert f"the {split} split of {task} has " in part
    assert str(counts) in part, "all releases of the language are named"
    assert counts.texts == 0 or ("Russian" in part) == (counts.lang == "ru")
    wrong = "dev" if split == "train" else "train"
    read_wrong = rows_of(task, counts, as_train=wrong == "train")
    refused, warned = other_split(task, read_wrong, wrong), count_warning(task, read_wrong, wrong)
    if counts.texts == 0:
        assert refused is None
    elif split == "train" or counts.texts != counts.rows:
        assert f"got {counts.texts} text" in refused
    else:
        assert refused is None, "rows of training can be as many by chance"
        assert f"as many as its {split} split" in warned


def own(count: int, **columns: str) -> list[FileRow]:
    path = columns.pop("path", "own.jsonl")
    values = [
        {"document": f"d{i}", "summary": "s"} | {k: v.format(i) for k, v in columns.items()} for i in range(count)
    ]
    return [FileRow(row, path, i + 1) for i, row in enumerate(values)]


PARTS = {
    "500 of training": ("dialogsum", own(500), None),
    "1500 of training": ("dialogsum", own(1500), None),
    "training by its ids": ("dialogsum", own(500, id="train_{}"), None),
    "818": ("samsum", own(818, id="{}"), None),
    "dev by its ids": ("dialogsum", own(500, id="dev_{}"), "dev"),
    "dev by its names": ("dialogsum", own(500, fname="dev_{}", id="{}"), "dev"),
    "dev by its file": ("samsum", own(818, path="samsum/val.json"), "dev"),
    "test by its file": ("samsum", own(819, path="samsum/test.json.gz"), "test"),
    "test by its inputs": ("dialogsum", [r | {"document": f"d{i % 500}"} for i, r in enumerate(own(1500))], "test"),
    "another number": ("dialogsum", own(499, id="dev_{}"), None),
}


@pytest.mark.parametrize(("task", "rows", "split"), PARTS.values(), ids=PARTS)
def test_a_part_of_training_with_as_many_texts_as_another_split(task, rows, split):
    found = other_split(task, rows, "train")
    assert (found is None) == (split is None)
    assert split is None or f"which is its {split} split" in found
    assert ("as many as its" in count_warning(task, rows, "train")) == (
        len(rows) != 499 and rows[0].get("id") != "train_0"
    )


def test_texts_that_training_leaves_out_count_in_another_split():
    """Training leaves 77 texts of WebNLG 2017 out; as another split, the file has them too."""
    for texts in (18025, 18102):
        rows = [{"triples": [], "refs": ["x"] * texts}]
        assert other_split("webnlg", rows, "dev").endswith("which is its train split")
        assert other_split("webnlg", rows, "train") is None
    assert other_split("prompt", [{"prompt": "a"}], "train") is None


def test_a_part_of_training_is_read(tmp_path, caplog):
    path = tmp_path / "own.csv"
    path.write_text("dialogue,summary\n" + "".join(f"d{i},s\n" for i in range(500)))
    assert len(read_task("dialogsum", path, "train")) == 500
    assert "as many as its dev split; is it that split?" in caplog.text
    caplog.clear()
    assert len(read_task("dialogsum", path, "dev")) == 500
    assert not caplog.text
    path = path.rename(tmp_path / "dev.csv")
    with pytest.raises(
        DataError, match=r"dev\.csv: expected the train split of dialogsum, got 500 texts, which is its"
    ):
        read_task("dialogsum", path, "train")
