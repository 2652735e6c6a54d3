"""The command line with a user's own columns: a file is trained, new rows are read with nothing more said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefixfast import Prefix, generate
from prefixfast.cli.columns import column_arguments
from prefixfast.data import Task, column_task
from prefixfast.errors import ConfigError

FAST = ("--max-steps", 2, "--batch-size", 2, "--prefix-length", 3, "--dtype", "float32")
MAPPING = ("--prompt", r"{name}\n{price} ->", "--target", "text")
PRODUCTS = "Name,price,text\nMill,12.50,A mill.\nFan,30,A fan.\n"
NEW = "price,name,colour\n8,Pump,red\n9,Saw,blue\n"


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path]:
    products, new = tmp_path / "products.csv", tmp_path / "new.csv"
    products.write_text(PRODUCTS, encoding="utf8")
    new.write_text(NEW, encoding="utf8")
    return products, new


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf8").splitlines()]


def test_from_a_file_to_texts_for_new_rows(cli, folder, base, files, tmp_path):
    products, new = files
    out, store = tmp_path / "out.jsonl", tmp_path / "store"
    code, _, err = cli("train", folder, products, "-o", tmp_path / "mill", "--store", store, *MAPPING, *FAST)
    assert code == 0, err
    mill = Prefix.from_pretrained(tmp_path / "mill")
    assert Task.from_spec(mill.task) == column_task(prompt="{name}\n{price} ->", target="text")
    prompts = ["Pump\n8 ->", "Saw\n9 ->"]
    expected = [g.text for g in generate(prompts, mill, model=base, max_new_tokens=3)]
    code, _, err = cli("generate", new, "-o", out, "--prefix", tmp_path / "mill", "--max-new-tokens", 3)
    assert (code, texts(out)) == (0, expected), err
    named = tmp_path / "named.csv"
    named.write_text(NEW.replace("\n", ",prefix\n", 1).replace("red", "red,prefix").replace("blue", "blue,prefix"))
    code, _, err = cli("generate", named, "-o", out, "--store", store, "--max-new-tokens", 3)
    assert (code, texts(out)) == (0, expected), err
    code, _, err = cli("score", products, "-o", tmp_path / "scores.jsonl", "--prefix", tmp_path / "mill")
    assert code == 0, err
    code, _, err = cli("score", new, "-o", tmp_path / "scores.jsonl", "--prefix", tmp_path / "mill")
    assert code == 1
    assert "expected a column 'text'" in err


def test_a_table(cli, folder, files, tmp_path):
    code, _, err = cli(
        "train", folder, files[0], "-o", tmp_path / "t", "--table", "name, price,text", "--target", "text", *FAST
    )
    assert code == 0, err
    task = Task.from_spec(Prefix.from_pretrained(tmp_path / "t").task)
    assert task == column_task(table=["name", "price", "text"], target="text")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", "{name} ->"), "target: expected the column"),
        (("--target", "text"), "prompt and table: expected one of them"),
        ((*MAPPING, "--table", "name"), "prompt and table: expected one of them"),
        ((*MAPPING, "--task", "prompt"), "task: expected none beside prompt and target"),
        (("--prompt", "{nam} ->", "--target", "text"), "products.csv:2: prompt: expected a column 'nam'"),
    ],
)
def test_mistakes_are_one_message(cli, folder, files, tmp_path, arguments, message):
    code, _, err = cli("train", folder, files[0], "-o", tmp_path / "p", *FAST, *arguments)
    assert code == 1
    assert message in err
    assert "Traceback" not in err


def test_templates_and_names_from_a_shell():
    found = column_arguments(r"a\n\t\\n\x {b}", "{c}", 'a, "b, c",d ')
    assert found == {"prompt": "a\n\t\\n\\x {b}", "target": "{c}", "table": ["a", "b, c", "d"]}
    assert column_arguments(None, None, None) == {"prompt": None, "target": None, "table": None}
    for wrong in ('a,"b', "a\nb"):
        with pytest.raises(ConfigError, match="--table"):
            column_arguments(None, None, wrong)
