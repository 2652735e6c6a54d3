"""Command ``try``: one batch of the base alone and each prefix, as JSON, lines, columns or below each other."""

from __future__ import annotations

import json

import pytest

from prefixfast import Engine, Prefix, PrefixStore, generate, load
from prefixfast.cli.output import printable_text
from prefixfast.data import TASKS

FAST = ("--dtype", "float32", "--max-new-tokens", 6, "--max-num-seqs", 4)
NEW = {"max_new_tokens": 6, "dtype": "float32"}


@pytest.fixture(scope="module")
def prefixes(folder, make_prefix, tmp_path_factory):
    """Folders of two prefixes of the tiny GPT-2, by name."""
    root = tmp_path_factory.mktemp("prefixes")
    with load(folder, dtype="float32") as base:
        fingerprint = base.fingerprint
    for seed, name in enumerate(("ann", "bob")):
        make_prefix(seed, base=fingerprint).save_pretrained(root / name)
    return {name: root / name for name in ("ann", "bob")}


def both(prefixes) -> list[Prefix]:
    return [Prefix.from_pretrained(path) for path in prefixes.values()]


def test_a_text_is_answered_by_the_base_alone_and_with_each_prefix_in_one_batch(cli, folder, prefixes, monkeypatch):
    batches = []
    real = Engine.generate
    monkeypatch.setattr(
        Engine, "generate", lambda self, batch, *a, **k: batches.append(batch) or real(self, batch, *a, **k)
    )
    names = [str(path) for path in prefixes.values()]
    flags = [part for name in names for part in ("--prefix", name)]
    done = cli("try", folder, "ab", *flags, *FAST, "--json")
    assert done.code == 0, done.err
    assert [len(batch) for batch in batches] == [3]
    expected = [str(g) for g in generate(["ab"] * 3, [None, *both(prefixes)], model=str(folder), **NEW)]
    records = json.loads(done.out)
    assert [r["text"] for r in records] == expected
    assert [r["prefix"] for r in records] == [None, *names]
    assert [r["usage"]["prefix_rows"] for r in records] == [0, 4, 4]
    lines = cli("try", folder, "ab", *flags, *FAST).out.splitlines()
    assert [line.split("\t")[:2] for line in lines] == [["input", "prefix"], *(["ab", n] for n in ("-", *names))]


def test_names_of_a_store(cli, folder, prefixes, tmp_path):
    store = PrefixStore(tmp_path / "store")
    for name, prefix in zip(prefixes, both(prefixes), strict=True):
        store.put(name, prefix)
    done = cli("try", folder, "ab", "--store", store.path, "--prefix", "bob", *FAST, "--json")
    expected = generate(["ab"], [both(prefixes)[1]], model=str(folder), **NEW)
    assert json.loads(done.out)[1]["text"] == str(expected[0])
    wrong = cli("try", folder, "ab", "--store", store.path, "--prefix", "bop", *FAST)
    assert (wrong.code, "did you mean 'bob'" in wrong.err) == (1, True)


def test_rows_of_a_small_file_keep_their_own_parameters(cli, folder, prefixes, tmp_path):
    rows = [{"prompt": "ab", "params": {"max_new_tokens": 2}}, {"prompt": "cd", "completion": "x", "prefix": "?"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    short = FAST[:2] + FAST[4:]
    done = cli("try", folder, path, "--prefix", prefixes["ann"], *short, "--json")
    ann = both(prefixes)[0]
    batch = [rows[0], rows[0], {"prompt": "cd"}, {"prompt": "cd"}]
    expected = generate(batch, [None, ann] * 2, model=str(folder), dtype="float32")
    records = json.loads(done.out)
    assert [r["text"] for r in records] == [str(g) for g in expected]
    assert [r["input"] for r in records] == ["ab", "ab", "cd", "cd"]
    path.write_bytes('{"prompt": "ab£"}\n'.encode("cp1252"))
    done = cli("try", folder, path, "--encoding", "cp1252", *FAST, "--json")
    assert [r["input"] for r in json.loads(done.out)] == ["ab£"]
    path.write_text('{"prompt": "a"}\n' * 21)
    many = cli("try", folder, path)
    assert (many.code, "at most 20 rows, got 21" in many.err) == (1, True)


def test_a_table_is_a_row_as_json_and_the_base_alone_reads_it_like_the_first_prefix(cli, folder, make_prefix, tmp_path):
    prefix = make_prefix(3, task=TASKS["table"].spec())
    prefix.save_pretrained(tmp_path / "p")
    row = {"table": {"a": "b", "c": "d"}}
    expected = [str(g) for g in generate(["a : b | c : d\n", row], [None, prefix], model=str(folder), **NEW)]
    for text in (row, row["table"]):
        done = cli("try", folder, json.dumps(text), "--prefix", tmp_path / "p", *FAST, "--json")
        assert [r["text"] for r in json.loads(done.out)] == expected
    for text in ("{broken", "no table", '{"a": 1}'):
        wrong = cli("try", folder, text, "--prefix", tmp_path / "p", *FAST)
        assert (wrong.code, "give a row as JSON" in wrong.err) == (1, True)


def test_a_terminal_shows_columns_where_they_fit_and_a_list_elsewhere(cli, folder, prefixes, monkeypatch):
    flags = [part for path in prefixes.values() for part in ("--prefix", path)]
    monkeypatch.setattr("prefixfast.cli.try_.sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "300")
    wide = cli("try", folder, "ab", *flags, *FAST).out
    heads = [line for line in wide.splitlines() if "the base alone" in line]
    assert len(heads) == 1, wide
    assert all(str(path) in heads[0] for path in prefixes.values())
    monkeypatch.setenv("COLUMNS", "70")
    lines = cli("try", folder, "ab", *flags, *FAST).out.splitlines()
    assert [line for line in lines if line.endswith(":")] == ["the base alone:", *(f"{p}:" for p in prefixes.values())]


def test_control_characters_of_an_answer_do_not_reach_the_terminal():
    assert printable_text("a\x1b[31m\r\tb\n\x9b é") == "a\\x1b[31m\\r\tb\n\\x9b é"


WRONG = {
    "no folder": (("m", "ab", "--prefix", "none"), "none: no such folder"),
    "no file": (("m", "none.csv"), "none.csv: cannot be read"),
    "no store": (("m", "ab", "--store", "none", "--prefix", "a"), "none"),
    "wrong range": (("m", "ab", "--top-p", 3), "GenerationParams.top_p"),
    "wrong engine": (("m", "ab", "--max-num-seqs", 0), "EngineConfig.max_num_seqs"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_one_message_before_the_base_is_loaded(cli, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("try", *arguments)
    assert done.code == 1
    assert message in done.err
    assert len(done.err.splitlines()) == 1


def test_a_misspelt_column_of_a_file_is_refused(cli, folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab", "prefx": "ann"}\n')
    done = cli("try", folder, tmp_path / "rows.jsonl", *FAST)
    assert done.code == 1
    assert "rows.jsonl:1: unknown column 'prefx': did you mean 'prefix'" in done.err


def test_a_column_without_a_meaning_is_not_part_of_the_input(cli, folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab", "shop": "mill"}\n')
    done = cli("try", folder, tmp_path / "rows.jsonl", *FAST, "--json")
    assert [record["input"] for record in json.loads(done.out)] == ["ab"]
