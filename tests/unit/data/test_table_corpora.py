"""Layouts of E2E, WebNLG, DART and ToTTo: rows, prompts, folders, counts, and ``prefixfast data check``."""

from __future__ import annotations

import gzip
import json
import logging
import sys
import zlib

import pytest

import table_corpora as fixtures
from oracles import SHARED
from prefixfast import DataError
from prefixfast.cli import main
from prefixfast.data import TASKS, read_task
from prefixfast.data.corpora import CORPORA
from prefixfast.data.corpora.corpus import Counts
from prefixfast.data.files.raw import ALWAYS_READ
from prefixfast.engine.make_requests import unknown_keys
from table_corpora import LAYOUTS


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout(tmp_path, layout, suffix):
    path = layout.write(tmp_path)
    if suffix:
        path = path.with_name(path.name + suffix)
        path.write_bytes(gzip.compress(layout.text.encode()))
    rows = read_task(layout.task, path, layout.split)
    assert rows == layout.rows
    lines = layout.text.split("\n")
    for row in rows:
        near = lines[row.line - 1]
        assert any(word in near for word in ("mr", "name", "<entry", "{", '"1"')), "the row names its line"


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_are_requests(layout):
    assert not [key for row in layout.rows for key in unknown_keys(row, TASKS[layout.task])]


EOS = "<|endoftext|>"
PROMPTS = {
    "E2E_DEV": " name : The Mill | Type : pub | price : £ 20 - 25 <|endoftext|>",
    "WEBNLG_2017": '  | Old_Mill : location : "Leeds, West" | Old_Mill : height_(m) : 25.0 <|endoftext|>',
    "DART_XML": " Old Mill : place : Leeds | Old Mill : é :  <|endoftext|>",
    # language/totto/baseline_preprocessing of google-research/language writes this for the same entry
    "TOTTO_DEV": (
        " <page_title> Ann Lee </page_title> <section_title> Career </section_title> <table> "
        "<cell> é3 <col_header> Cup </col_header> <col_header> Goals </col_header> <row_header> 1999 </row_header> "
        "</cell> <cell> 12 <col_header> Cup </col_header> <col_header> Games </col_header> "
        "<row_header> 1999 </row_header> </cell> <cell> 1999 <col_header>  </col_header> <col_header> Year "
        "</col_header> </cell> </table> <|endoftext|>"
    ),
}


@pytest.mark.parametrize(("name", "prompt"), PROMPTS.items(), ids=PROMPTS)
def test_prompts_are_those_of_the_authors(name, prompt):
    layout = LAYOUTS[name]
    assert TASKS[layout.task].prompts(layout.rows[:1], EOS) == [prompt]


def test_the_texts_of_li_and_liang_have_the_prompts_of_the_official_file(tmp_path):
    official = read_task("e2e", fixtures.E2E_INPUTS.write(tmp_path), "test")
    source = read_task("e2e", fixtures.E2E_SOURCE.write(tmp_path), "test")
    prompts = [TASKS["e2e"].prompts(rows, EOS) for rows in (official, source)]
    lines = fixtures.E2E_SOURCE.text.split("\n")
    assert prompts[0] == prompts[1] == [f" {lines[i].partition('||')[0]} {EOS}" for i in (0, 2)]
    training = read_task("e2e", fixtures.E2E_SOURCE.write(tmp_path), "train")
    assert [r["ref"] for r in training] == ["A pub , The Mill . ", "£ 20 or more . ", "It 's Café Inn . "]
    assert TASKS["e2e"].targets(training[0], 0) == [" A pub , The Mill .  "], "both spaces, as in the authors' code"


OTHER_TEXTS = {
    "prose": ("A line of prose.\n", "one source and one text"),
    "two texts": ("name : A||a||b\n", "one source and one text"),
    "no text": ("name : A|| \n", "one source and one text"),
    "triples": (" | a : b : c||text\n", "expected a source like"),
    "unknown slot": ("name : A | stars : 5||text\n", 'slot "stars" is not known'),
    "other order": ("Type : pub | name : A||text\n", "instead of 'name : A | Type : pub'"),
    "official price": ("name : A | price : £20-25||text\n", "instead of 'name : A | price : £ 20 - 25'"),
}


@pytest.mark.parametrize(("text", "message"), OTHER_TEXTS.values(), ids=OTHER_TEXTS)
def test_other_text_files_are_refused(tmp_path, text, message):
    path = tmp_path / "a.txt"
    path.write_text(f"name : The Mill||Good .\n\n{text}", encoding="utf8")
    with pytest.raises(DataError) as caught:
        read_task("e2e", path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}:3: ")


def webnlg_folder(folder, *, split="train"):
    """A release: two splits, several sizes; README and JSON files stand beside the XML."""
    for size, name in ((1, "Food"), (1, "Airport"), (2, "Food")):
        for kind in ("train", "dev"):
            path = folder / kind / f"{size}triples" / f"{name}_{kind}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            text = f'      <lex comment="good" lid="Id1">{kind} {size} {name}</lex>\n'
            entry = fixtures.webnlg_entry(f'category="{name}" eid="Id1" size="{size}"', "a | b | c", text)
            path.write_text(fixtures.benchmark(entry), encoding="utf8")
    (folder / "README.md").write_text("x", encoding="utf8")
    return folder


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    folder = webnlg_folder(tmp_path)
    for split in ("train", "dev"):
        expected = [[f"{split} 1 Airport"], [f"{split} 1 Food"], [f"{split} 2 Food"]]
        assert [r["refs"] for r in read_task("webnlg", folder, split)] == expected
        assert [r["refs"] for r in read_task("webnlg", folder / split, split)] == expected
    with pytest.raises(DataError, match=r"expected files of the split test.*got 6 files of other splits"):
        read_task("webnlg", folder, "test")
    with pytest.raises(DataError, match=r"ending in \.xml, got none"):
        read_task("webnlg", (tmp_path / "empty", (tmp_path / "empty").mkdir())[0], "test")


def test_a_flat_folder_is_read_by_the_names_of_its_files(tmp_path):
    """znculee/webnlg2020, release_v2.1_constrained/1triples_Airport_dev_v2.1_constrained.xml is such a file."""
    text = fixtures.WEBNLG_2020.text
    for kind in ("train", "dev", "test"):
        path = tmp_path / f"1triples_Artist_{kind}_v2.1_constrained.xml"
        path.write_text(text.replace("A mill.", kind), encoding="utf8")
    for split in ("train", "dev", "test"):
        assert read_task("webnlg", tmp_path, split)[0]["refs"][0] == split


def test_one_test_given_twice_in_a_folder_is_refused(tmp_path):
    """The folder test of 2017 holds each entry with its texts, without them, and the unseen ones again."""
    for layout in (fixtures.WEBNLG_2017_TEST, fixtures.WEBNLG_2017_INPUTS):
        layout.write(tmp_path)
    with pytest.raises(
        DataError, match=r"testdata_with_lex\.xml:4: expected each entry once.*testdata_no_lex\.xml too"
    ):
        read_task("webnlg", tmp_path, "test")


def test_all_texts_outside_of_training(tmp_path):
    for layout in (fixtures.WEBNLG_2017, fixtures.WEBNLG_JSON):
        rows = read_task("webnlg", layout.write(tmp_path), "dev")
        assert [len(r["refs"]) for r in rows] == [2, 1][: len(rows)]


def test_two_languages_beside_english_are_refused(tmp_path):
    text = fixtures.WEBNLG_RUSSIAN.text.replace('lang="ru" lid="Id2"', 'lang="br" lid="Id2"')
    path = tmp_path / "a.xml"
    path.write_text(text, encoding="utf8")
    with pytest.raises(DataError, match=r"a\.xml:4: lang: expected texts in one language beside English, got br, ru"):
        read_task("webnlg", path)


def test_counts_of_whole_files_and_of_parts(tmp_path, caplog):
    corpus = CORPORA["e2e"]
    whole = [{"mr": "name[A]", "refs": ["x"] * 8}] * 546 + [{"mr": "name[A]", "refs": ["x"] * 304}]
    assert corpus.count_warning(whole, "dev") is None
    assert "547 rows with 4672 texts; got 546 rows with 4368 texts" in corpus.count_warning(whole[:-1], "dev")
    assert CORPORA["totto"].count_warning([{"table": [], "refs": ["x"] * i} for i in range(7700)], "dev") is None
    with caplog.at_level(logging.WARNING):
        read_task("e2e", fixtures.E2E_DEV.write(tmp_path), "dev")
    assert "547 rows with 4672 texts; got 2 rows with 3 texts" in caplog.text


PLACES = {"e2e": "e2e/e2e_{}.jsonl.gz", "dart": "dart/dart_{}.jsonl.gz"}
WHOLE = [("e2e", "train", "train"), ("e2e", "dev", "dev"), ("e2e", "test", "test_mr_only"), ("dart", "dev", "dev")]


@pytest.mark.parametrize(("task", "split", "name"), WHOLE)
def test_counts_of_the_official_files(task, split, name, caplog):
    path = SHARED / "data" / PLACES[task].format(name)
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with caplog.at_level(logging.WARNING):
        rows = read_task(task, path, split)
    assert not caplog.records
    assert len(rows) in [c.rows for c in CORPORA[task].counts[split]]


def test_every_corpus_has_a_task_a_place_and_counts():
    for name, corpus in CORPORA.items():
        assert name in TASKS
        assert corpus.where
        assert all(isinstance(c, Counts) and c.rows > 0 for split in corpus.counts.values() for c in split)


HEAD = '<?xml version="1.0"?>\n<!DOCTYPE benchmark [\n'
LAUGHS = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">\n' for i in range(1, 10))
HOSTILE = {
    "billion laughs": f'{HEAD}<!ENTITY a0 "ha">\n{LAUGHS}]>\n<benchmark>&a9;</benchmark>',
    "quadratic blowup": f'{HEAD}<!ENTITY a "{"x" * 50_000}">]><benchmark>{"&a;" * 5000}</benchmark>',
    "a file of the machine": f'{HEAD}<!ENTITY a SYSTEM "file:///etc/passwd">]><benchmark>&a;</benchmark>',
    "an external definition": '<!DOCTYPE benchmark SYSTEM "file:///etc/passwd"><benchmark/>',
    "a parameter entity": f'{HEAD}<!ENTITY % a SYSTEM "file:///etc/passwd">%a;]><benchmark/>',
}


@pytest.mark.parametrize("task", ["webnlg", "dart"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_entities_are_refused(tmp_path, task, text):
    path = tmp_path / "a.xml"
    path.write_text(text, encoding="utf8")
    with pytest.raises(DataError, match=r"a\.xml:\d: .*DOCTYPE"):
        read_task(task, path)


def bomb(head: bytes, tail: bytes) -> bytes:
    """Compressed content that begins and ends like a file, with 512 MiB of spaces between."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    spaces = packer.compress(b" " * 2**20) + packer.flush(zlib.Z_FULL_FLUSH)
    return block + spaces * 512 + packer.compress(tail) + packer.flush()


@pytest.mark.parametrize(
    "name",
    ["webnlg a.xml.gz", "webnlg a.json.gz", "dart a.json.gz", "e2e a.csv.gz", "e2e a.txt.gz", "totto a.jsonl.gz"],
)
def test_a_decompression_bomb_is_refused(tmp_path, name):
    task, _, name = name.partition(" ")
    path = tmp_path / name
    path.write_bytes(bomb(b"<benchmark>", b"</benchmark>"))
    with pytest.raises(DataError, match=r"gz: expected at most 100 bytes for each of"):
        read_task(task, path)


def test_texts_that_repeat_and_compress_well_are_read(tmp_path):
    path = tmp_path / "a.csv.gz"
    text = b"mr,ref\n" + b'"name[A]",x\n' * 30_000
    path.write_bytes(packed := gzip.compress(text))
    assert len(text) > 100 * len(packed)
    assert len(text) < ALWAYS_READ
    assert len(read_task("e2e", path)) == 30_000


def test_xml_needs_defusedxml(tmp_path, monkeypatch):
    path = fixtures.DART_XML.write(tmp_path)
    monkeypatch.setitem(sys.modules, "defusedxml.ElementTree", None)
    with pytest.raises(DataError, match=r"needs defusedxml: pip install 'prefixfast\[data\]'"):
        read_task("dart", path)


DECLARED = {"latin-1": "latin-1", "cp1251": "cp1251", "no such encoding": "nonsense"}


@pytest.mark.parametrize("name", DECLARED.values(), ids=DECLARED)
def test_another_declared_encoding_is_refused(tmp_path, name):
    path = tmp_path / "a.xml"
    path.write_text(fixtures.DART_XML.text.replace("utf-8", name, 1), encoding="utf8")
    with pytest.raises(DataError, match=r"a\.xml:1: expected a file in UTF-8, got the declared encoding"):
        read_task("dart", path)


@pytest.fixture
def check(monkeypatch, capfd):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prefixfast", "data", "check", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as caught:
            main()
        return (caught.value.code or 0), json.loads(capfd.readouterr().out)

    return run


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_data_check(tmp_path, check, layout):
    """The command reads what `read_task` reads; rows without texts of dev and test are inputs, as a warning says."""
    code, report = check(layout.task, layout.write(tmp_path), "--split", layout.split)
    without = [i for i, row in enumerate(layout.rows) if not {"ref", "refs"} & set(row)]
    assert (report["task"], report["rows"], report["num_problems"]) == (layout.task, len(layout.rows), 0)
    assert code == 0
    assert report["examples"] == sum(len(row.get("refs", ["ref"] * ("ref" in row))) for row in layout.rows)
    assert report["shown"]
    assert ("rows have no texts; generate reads them" in " ".join(report["warnings"])) == bool(without)
    assert any("part of the file or another release" in w for w in report["warnings"])


def test_data_check_of_a_folder(tmp_path, check):
    code, report = check("webnlg", webnlg_folder(tmp_path), "--split", "train")
    assert (code, report["rows"], report["examples"]) == (0, 3, 3)
    names = {f"{tmp_path}/train/1triples/{name}_train.xml" for name in ("Airport", "Food")}
    assert names <= {row["path"] for row in report["shown"]}
    code, report = check("webnlg", webnlg_folder(tmp_path), "--split", "test")
    assert (code, report["num_problems"]) == (1, 1)
