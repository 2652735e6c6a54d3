"""`check_data` and ``prefixfast data check``: problems with lines, lengths, shown rows, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import BartConfig, LEDConfig, T5Config

import tiny
from oracles import ROOT
from prefixfast import ConfigError, DataError
from prefixfast.cli import main
from prefixfast.data import column_task
from prefixfast.data.check_data import BaseVocabulary, check_data
from prefixfast.data.rows import read_rows
from prefixfast.model.tokenizer import Tokenizer

GOOD = [{"prompt": "2+2=", "completion": "4", "source": "x"}, {"prompt": "a" * 20, "completion": "b" * 9}]
LINES = [
    json.dumps(GOOD[0]),
    "",
    json.dumps(GOOD[1]),
    '{"prompt": ',
    '{"prompt": 5, "completion": "a"}',
    "[]",
    json.dumps(GOOD[0]),
    '{"prompt": "a"}',
    '{"prompt": "", "completion": "a"}',
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(LINES), encoding="utf8")
    return path


@pytest.fixture
def cli(monkeypatch, capfd):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prefixfast", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        out = capfd.readouterr().out
        return (caught.value.code or 0), out

    return run


def test_every_problem_is_listed_with_its_line(file, tokenizer):
    report = check_data("prompt", file)
    assert [(p["line"], report.num_problems) for p in report.problems] == [(line, 4) for line in (4, 5, 6, 8)]
    assert all(str(p["message"]).startswith(f"{file}:{p['line']}: ") for p in report.problems)
    assert (report.rows, report.examples, report.unread, report.tokens) == (8, 4, ["source"], {})
    report = check_data("prompt", file, base=BaseVocabulary(Tokenizer.from_hf(tokenizer)))
    assert [p["line"] for p in report.problems] == [4, 5, 6, 8, 9], (
        "a prompt without tokens shows only with a tokenizer"
    )
    assert report.examples == 3


def test_the_first_problem_is_the_error_of_training(file):
    with pytest.raises(DataError) as caught:
        read_rows(file)
    assert str(caught.value) == check_data(None, file).problems[0]["message"]


def test_lengths_and_limits(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "p" * n, "completion": "c" * (n % 7)}) + "\n" for n in range(1, 101)),
        encoding="utf8",
    )
    report = check_data("prompt", path, base=BaseVocabulary(Tokenizer.from_hf(tokenizer), max_length=60))
    assert report.characters["prompt"] == {"50": 50, "90": 90, "99": 99, "100": 100}
    totals = sorted(n + n % 7 + 1 for n in range(1, 101))  # with the end token
    assert report.tokens["example"] == {"50": totals[49], "90": totals[89], "99": totals[98], "100": totals[99]}
    assert report.too_long == sum(t > 60 for t in totals)
    first, longest, median = report.shown
    assert first == {"which": "first", "path": str(path), "line": 1, "prompt": "p", "target": "c</s>"}
    assert (longest["line"], longest["prompt"], longest["which"]) == (97, "p" * 97, "longest")
    assert (median["which"], len(median["prompt"]) + median["line"] % 7 + 1) == ("median", totals[49])


def test_files_of_several_chunks(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = {300, 301, 999}
    path.write_text(
        "".join(json.dumps({"prompt": "a"} | ({} if n in bad else {"completion": "b"})) + "\n" for n in range(1, 1001)),
        encoding="utf8",
    )
    report = check_data(None, path, max_errors=2)
    assert (report.num_problems, [p["line"] for p in report.problems], report.examples, report.task) == (
        3,
        [300, 301],
        997,
        "prompt",
    )


FORMATS = {
    "refs": (
        "auto",
        {"triples": [["a", "B", "c"]], "refs": ["x", "yy"]},
        2,
        {"prompt": " a : b : c </s>", "target": " x </s>"},
    ),
    "messages": (
        "auto",
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        1,
        {"prompt": "[hi]", "target": "ho</s>"},
    ),
    "text": ("text", {"text": "once"}, 1, {"prompt": "o", "target": "nce</s>"}),
    "document": ("xsum", {"document": "long", "summary": "s"}, 1, {"prompt": "long</s>", "target": "s</s>"}),
    "ids": ("auto", {"input_ids": [39, 40, 41], "labels": [-100, -100, 41]}, 1, {"prompt": "DE", "target": "F"}),
}


@pytest.mark.parametrize(("task", "row", "examples", "shown"), FORMATS.values(), ids=FORMATS)
def test_the_example_is_the_text_that_the_model_sees(tmp_path, tokenizer, monkeypatch, task, row, examples, shown):
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content }}{% endfor %}",
    )
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row), encoding="utf8")
    for own in (None, Tokenizer.from_hf(tokenizer)):
        report = check_data(None if task == "auto" else task, path, base=BaseVocabulary(own, tiny.VOCAB))
        assert (report.num_problems, report.examples) == (0, examples)
    assert {k: report.shown[0][k] for k in shown} == shown


def test_an_official_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps([{"tripleset": [["a", "B", "c"]], "annotations": [{"text": "x", "source": "s"}]}, {"tripleset": 5}]),
        encoding="utf8",
    )
    report = check_data("dart", path, split="train")
    assert (report.rows, report.examples, report.num_problems) == (2, 1, 1)
    assert report.shown[0]["prompt"] == " a : b : c {eos}"


@pytest.mark.parametrize("name", ["none.jsonl", "empty.jsonl", "rows.txt"])
def test_a_file_without_rows_is_a_problem(tmp_path, name):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "rows.txt").write_bytes(b"x")
    report = check_data("prompt", tmp_path / name)
    assert (report.num_problems, report.rows, report.examples) == (1, 0, 0)


def test_an_unknown_task_is_an_error(file):
    with pytest.raises(ConfigError, match="task: expected one of e2e, webnlg"):
        check_data("e3e", file)


def test_the_command(cli, file, folder, tmp_path):
    code, out = cli("data", "check", "prompt", file)
    assert code == 1
    assert f"{file}:4: expected one JSON object a line" in out
    assert "8 rows, 4 examples, 4 problems" in out
    code, out = cli(
        "data", "check", "prompt", file, "--model", folder, "--max-length", "10", "--max-errors", "2", "--json"
    )
    report = json.loads(out)
    assert (code, report["num_problems"], len(report["problems"]), report["too_long"], report["max_length"]) == (
        1,
        5,
        2,
        1,
        10,
    )
    fine = tmp_path / "fine.jsonl"
    fine.write_text(json.dumps(GOOD[0]), encoding="utf8")
    code, out = cli("data", "check", "auto", fine, "--model", folder)
    assert code == 0
    assert "task prompt, 1 row, 1 example, 0 problems" in out
    assert "tokens of the example: 6 at 50 %" in out
    assert "    '2+2=' + '4</s>'" in out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prompt", "{file}", "--max-length", "10"), "--max-length: expected together with --model"),
        (("prompt", "{file}", "--model", "{file}/none"), "cannot be loaded"),
        (("e3e", "{file}"), "task: expected one of e2e"),
        (("{file}", "prompt"), "got {file} prompt; write --task prompt"),
        (("prompt", "{file}", "--task", "prompt"), "--task: expected none beside TASK PATH, got 'prompt'"),
        (("prompt", "{file}", "--prompt", "{{x}}", "--target", "y"), "task: expected none beside prompt and target"),
        (("{file}", "--prompt", "{{x}}"), "target: expected the column"),
        (("{file}", "--target", "y"), "prompt and table: expected one of them"),
        (("{file}", "--prompt", "{{x", "--target", "y"), "prompt: expected columns in braces"),
        (("{file}", "--table", 'a,"b', "--target", "y"), "--table: expected names of columns with commas"),
        (("e2e", "{file}", "--split", "eval"), "split: expected one of train, dev, test, got 'eval'"),
    ],
)
def test_wrong_arguments_of_the_command(cli, file, arguments, message):
    code, _ = cli("data", "check", *(a.format(file=file) for a in arguments))
    assert message.format(file=file) in str(code)


@pytest.mark.parametrize(("config", "too_long"), [(BartConfig, 1), (T5Config, None)])
def test_texts_of_encoder_decoder_bases_are_counted_apart(cli, tmp_path, tokenizer, config, too_long):
    config(vocab_size=tiny.VOCAB, max_position_embeddings=9).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"document": "d" * n, "summary": "s" * m} for n, m in ((10, 3), (4, 9), (3, 1))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"document": "d"}])), encoding="utf8")
    code, out = cli("data", "check", tmp_path / "a.jsonl", "--model", tmp_path / "base", "--json")
    report = json.loads(out)
    assert (code, report["num_problems"], report["examples"]) == (1, 1, 3)
    assert report["tokens"]["source"] == {"50": 4, "90": 10, "99": 10, "100": 10}
    assert report["tokens"]["target"] == {"50": 4, "90": 10, "99": 10, "100": 10}
    assert report["max_length"] == (too_long and 9)
    assert report["too_long"] == (too_long or 0)
    assert (report["shown"][0]["prompt"], report["shown"][0]["target"]) == ("d" * 10, "sss</s>")


def test_data_of_bases_that_are_not_computed_is_refused(cli, tmp_path, tokenizer, file):
    LEDConfig(vocab_size=tiny.VOCAB).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    code, _ = cli("data", "check", file, "--model", tmp_path / "base")
    assert "among bart" in str(code)


def test_torch_and_transformers_are_not_imported_without_a_base_model(file):
    call = f"from prefixfast.data.check_data import check_data; check_data('prompt', {str(file)!r})"
    code = f"import sys; {call}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT / "python"), "PATH": ""})


PRODUCTS = """Name,price,text,id
Mill,12,A {red} mill.,1
Fan," ","A ""blue"" fan.",2
Pump,7,,3
Pump station,7,A pump.,4
"""
MAPPING = {"prompt": "{name}, {price} ->", "target": "text"}


@pytest.fixture
def products(tmp_path):
    path = tmp_path / "products.csv"
    path.write_text(PRODUCTS, encoding="utf8")
    return path


def test_rows_of_columns(products, tokenizer):
    for own in (None, Tokenizer.from_hf(tokenizer)):
        report = check_data(column_task(**MAPPING), products, base=BaseVocabulary(own))
        end = "</s>" if own else ""
        assert (report.task, report.rows, report.examples, [p["line"] for p in report.problems]) == (
            "columns",
            4,
            3,
            [4],
        )
        assert [(row["line"], row["prompt"], row["target"]) for row in report.shown] == [
            (2, "Mill, 12 ->", f" A {{red}} mill.{end}"),
            (5, "Pump station, 7 ->", f" A pump.{end}"),
            (3, "Fan,   ->", f' A "blue" fan.{end}'),
        ]
        (warning,) = report.warnings
        assert "'price' is empty in 1 of 4 rows" in warning
        assert ["'text'" in note or "'id'" in note for note in report.notes] == [True, True]
        assert report.unread == []
    table = check_data(column_task(table=["name"], target="{text}").spec(), products)
    assert (table.unread, table.warnings, table.shown[0]["prompt"]) == (["price"], [], "name : Mill\n")
    missing = check_data(column_task(table=["name", "color"], target="text"), products)
    assert (missing.num_problems, missing.examples) == (1, 0)
    assert f"{products}:2: table: expected a column 'color'" in missing.problems[0]["message"]


JOINS = {
    "a template": (
        MAPPING | {"prompt": "{price} {name}", "target": "{text}"},
        "in 3 of 3 rows, as '12 Mill' and 'A {red} mill.'",
    ),
    "a column": (MAPPING | {"prompt": "{price} {name}"}, None),
    "a separator": (MAPPING, None),
}


@pytest.mark.parametrize(("mapping", "message"), JOINS.values(), ids=JOINS)
def test_prompt_and_target_that_run_together(products, mapping, message):
    warnings = [w for w in check_data(column_task(**mapping), products).warnings if "run together" in w]
    assert [message in w for w in warnings] == ([True] if message else [])


def test_plain_rows_that_run_together(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": p, "completion": c} for p, c in (("2+2=", "4"), ("Q: a", "b"), ("Q: a ", "b"), ("Q", " b"))]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    (warning,) = check_data(None, path).warnings
    assert "in 1 of 4 rows, as 'Q: a' and 'b'" in warning


def test_a_row_is_shown_once(tmp_path):
    path = tmp_path / "a.jsonl"
    for count in (1, 2, 3, 9):
        path.write_text('{"prompt": "ab", "completion": "c"}\n' * count, encoding="utf8")
        shown = check_data(None, path).shown
        assert len({row["line"] for row in shown}) == len({row["which"] for row in shown}) == min(3, count)
        assert shown[0]["line"] == 1


COMMANDS = {
    "a path": ("{file}",),
    "a task and a path": ("auto", "{file}"),
    "a path and an option": ("{file}", "--task", "prompt"),
    "an option and a path": ("--task", "auto", "{file}"),
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_forms_of_the_command(cli, tmp_path, arguments):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps(GOOD[0]), encoding="utf8")
    code, out = cli("data", "check", *(a.format(file=path) for a in arguments))
    assert (code, "task prompt, 1 row, 1 example, 0 problems" in out) == (0, True)


def test_the_command_with_columns(cli, products):
    code, out = cli("data", "check", products, "--prompt", r"Name: {name}\n\\n", "--target", "text", "--max-errors", 0)
    assert code == 1, "a row has no text"
    assert r"    'Name: Mill\n\\n' + ' A {red} mill.'" in out.splitlines()
    assert "warning" not in out
    code, out = cli("data", "check", products, "--table", 'name,"price", id', "--target", "{text}", "--json")
    report = json.loads(out)
    assert report["shown"][0]["prompt"] == "Name : Mill | price : 12 | id : 1\n".replace("Name", "name")
    assert [note.split("'")[1] for note in report["notes"]] == ["id", "text"]
