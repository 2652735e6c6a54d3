"""Folders of corpora: the file of each split, numbered parts, hidden files, and entries without texts in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import table_corpora as fixtures
from prefixfast import DataError
from prefixfast.data import read_task
from prefixfast.data.corpora.split_files import split_file, splits_in

ROW = {"document": "d", "summary": "s"}
ENDINGS = (".jsonl", ".csv", ".json")


def write(folder: Path, *names: str, text: str = "") -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return folder


def found(folder: Path, split: str) -> list[str]:
    return [str(f.relative_to(folder)) for f in split_file(folder, split, ENDINGS, (".xml",))]


# Names of the official files by the split that they hold.
NAMES = {
    "trainset.csv": {"train"},
    "devset.csv": {"dev"},
    "testset_w_refs.csv": {"test"},
    "src1_valid.txt": {"dev"},
    "dart-v1.1.1-full-dev.json": {"dev"},
    "totto_train_data.jsonl": {"train"},
    "1triples_Airport_dev_v2.1_constrained.xml": {"dev"},
    "testdata_with_lex.xml": {"test"},
    "dialogsum.hiddentest.dialogue.jsonl": set(),
    "validation-00000-of-00001.parquet": {"dev"},
    "val.source": {"dev"},
    "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json": {"train", "dev", "test"},
    "latest.csv": set(),
    "trainer.csv": set(),
}


@pytest.mark.parametrize(("name", "splits"), NAMES.items(), ids=NAMES)
def test_names_tell_their_splits(name, splits):
    assert splits_in(name) == splits_in(name.upper()) == splits


def test_the_nearest_file_of_the_split_is_read(tmp_path):
    write(tmp_path, "trainset.csv", "devset.csv", "old/trainset.csv", "._trainset.csv", ".git/train.csv", "train.md")
    write(tmp_path, "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json")
    assert found(tmp_path, "train") == ["trainset.csv"]
    assert found(tmp_path, "dev") == ["devset.csv"]
    assert found(write(tmp_path / "b", "data/train/rows.jsonl", "data/dev/rows.jsonl"), "dev") == [
        "data/dev/rows.jsonl"
    ]
    assert found(write(tmp_path / "c", "full-dev.json", "full-dev.xml"), "dev") == ["full-dev.json"], (
        "the first endings"
    )
    assert found(write(tmp_path / "d", "test.xml"), "test") == ["test.xml"]
    assert found(write(tmp_path / "e", "testset.csv", "testset_w_refs.csv"), "test") == ["testset_w_refs.csv"]
    assert split_file(tmp_path / "none.csv", "dev", ENDINGS) == [tmp_path / "none.csv"], "a file is read as it is"


SEVERAL = {
    "several": (("a_train.csv", "b_train.csv"), r"got a_train\.csv, b_train\.csv|got 'a_train"),
    "no file of the split": (("dev.csv", "rows.csv"), "expected one file of the train split"),
    "nothing": ((), "no file with such an ending"),
    "a part is missing": (("train-00000-of-00003.csv", "train-00002-of-00003.csv"), "all parts of one"),
    "the last part is missing": (("train-00000-of-00002.csv",), "all parts of one"),
    "two numbers of parts": (("train-00000-of-00002.csv", "train-00001-of-00003.csv"), "all parts of one"),
    "the whole beside its parts": (("train.csv", "train-00000-of-00001.csv"), "all parts of one"),
}


@pytest.mark.parametrize(("names", "message"), SEVERAL.values(), ids=SEVERAL)
def test_a_folder_without_one_file_of_the_split_is_refused(tmp_path, names, message):
    with pytest.raises(DataError, match=message) as caught:
        found(write(tmp_path, *names), "train")
    assert caught.value.path == str(tmp_path)


@pytest.mark.parametrize("layout", fixtures.LAYOUTS.values(), ids=fixtures.LAYOUTS)
def test_each_corpus_of_tables_reads_a_folder(tmp_path, layout):
    """A clone has files of each split, other files, and hidden files of macOS."""
    suffix = "".join(Path(layout.name).suffixes[-1:])
    write(tmp_path, *(f"{n}{suffix}" for n in ("train", "dev", "test") if n != layout.split), text=layout.text)
    write(tmp_path, f"._{layout.split}{suffix}", f".{layout.split}{suffix}", text="\0")
    write(tmp_path, "README.md", "LICENSE", f"{layout.split}{suffix}", text=layout.text)
    assert read_task(layout.task, tmp_path, layout.split) == layout.rows


def test_a_folder_of_webnlg_with_both_languages_is_read_by_the_folder_of_the_split(tmp_path):
    for split in ("train", "dev"):
        write(tmp_path, f"challenge2020_train_dev/en/{split}/Artist.xml", text=fixtures.WEBNLG_2020.text)
    assert len(read_task("webnlg", tmp_path, "dev")) == 2


def test_hidden_files_of_articles_are_left_out(tmp_path):
    """Archives that macOS has packed hold ``._11.data`` beside ``11.data``."""
    text = "[SN]FIRST-SENTENCE[SN]\ns\n[SN]RESTBODY[SN]\nd\n"
    write(tmp_path, "bbc/11.data", text=text)
    write(tmp_path, "bbc/._11.data", "__MACOSX/bbc/._11.data", text="\0")
    write(tmp_path, "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json", text=json.dumps({"test": ["11"]}))
    assert read_task("xsum", tmp_path, "test") == [{**ROW, "id": "11"}]


def test_the_list_beside_a_relative_folder_is_found(tmp_path, monkeypatch):
    write(tmp_path, "bbc/11.DATA", text="[SN]FIRST-SENTENCE[SN]\ns\n[SN]RESTBODY[SN]\nd\n")
    write(tmp_path, "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json", text=json.dumps({"test": ["11"]}))
    monkeypatch.chdir(tmp_path / "bbc")
    for path in (".", "../bbc", str(tmp_path / "bbc")):
        assert read_task("xsum", path, "test") == [{**ROW, "id": "11"}]
    write(tmp_path, "cnn/stories/a.story", text="d\n@highlight\ns\n")
    monkeypatch.chdir(tmp_path / "cnn" / "stories")
    with pytest.raises(DataError, match="url_lists/all_test"):
        read_task("cnn_dailymail", ".", "test")


def test_two_files_of_one_document_are_refused(tmp_path):
    write(tmp_path, "a/11.data", "b/11.summary", text="[SN]FIRST-SENTENCE[SN]\ns\n[SN]RESTBODY[SN]\nd\n")
    write(tmp_path, "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json", text=json.dumps({"test": ["11"]}))
    with pytest.raises(DataError, match=r"11\.summary: expected one file of each document, got a/11\.data too"):
        read_task("xsum", tmp_path, "test")


@pytest.mark.parametrize(
    "names", [("P2.SOURCE", "P2.TARGET"), ("val.source", "val.target.gz"), ("a.source.gz", "a.Target")]
)
def test_a_pair_is_found_in_capitals_and_compressed(tmp_path, names):
    import gzip

    for name, text in zip(names, (b"d\n", b"s\n"), strict=True):
        (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    for name in names:
        assert read_task("xsum", tmp_path / name, "dev") == [ROW]


WITHOUT_TEXTS = {
    "dart": ("dart", fixtures.DART_JSON, "train.json"),
    "dart xml": ("dart", fixtures.DART_XML, "train.xml"),
    "webnlg": ("webnlg", fixtures.WEBNLG_2017, "train.xml"),
    "totto": ("totto", fixtures.TOTTO_TRAIN, "train.jsonl"),
}


@pytest.mark.parametrize(("task", "layout", "name"), WITHOUT_TEXTS.values(), ids=WITHOUT_TEXTS)
def test_entries_without_texts_are_left_out_of_training(tmp_path, caplog, task, layout, name):
    text = layout.text + (fixtures.totto_line() if task == "totto" else "")
    write(tmp_path, name, text=text)
    with caplog.at_level("INFO"):
        rows = read_task(task, tmp_path / name, "train")
    assert all(row["refs"] for row in rows)
    assert len(rows) == len(read_task(task, tmp_path / name, "test")) - 1
    assert "1 entry without texts is left out" in caplog.text
    write(
        tmp_path, name, text={"totto": fixtures.totto_line(), "webnlg": fixtures.WEBNLG_2017_INPUTS.text}.get(task, "")
    )
    if task in ("totto", "webnlg"):
        with pytest.raises(DataError, match="expected texts in the train split, got 1 entry without texts"):
            read_task(task, tmp_path / name, "train")


@pytest.mark.parametrize("task", ["dart", "totto"])
def test_a_row_of_ones_own_without_a_text_is_named(tmp_path, task):
    key = "triples" if task == "dart" else "table"
    rows = [{key: [["a", "b", "c"]], "refs": ["x"]}, {key: [["a", "b", "c"]], "reff": "x"}]
    write(tmp_path, "a.jsonl", text="".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=r"a\.jsonl:2: expected one of the keys ref, refs"):
        read_task(task, tmp_path / "a.jsonl", "train")
