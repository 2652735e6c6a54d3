"""Training on rows with a user's own columns: `train(prompt=, target=, table=)`, its errors, and what it logs."""

from __future__ import annotations

import csv
import logging

import pytest

import prefixfast
from prefixfast import ConfigError, DataError, Prefix, generate, score, train
from prefixfast.data import Task, column_task
from token_rows import distance

ROWS = [{"name": f"item {a}", "price": i + 0.5, "text": f"A {a * 3}."} for i, a in enumerate("abcd")]
PAIRS = [{"prompt": f"{r['name']}, {r['price']} ->", "completion": f" {r['text']}"} for r in ROWS]
OWN = {"prompt": "{name}, {price} ->", "target": "text"}
FEW = {"max_steps": 3, "prefix_length": 3, "batch_size": 2, "seed": 1, "init_text": "Write:"}


@pytest.fixture(autouse=True)
def _messages(caplog):
    caplog.set_level(logging.INFO, logger="prefixfast")


def test_a_mapping_trains_as_its_texts_do_and_is_kept_in_the_prefix(base, tmp_path):
    expected = train(base, PAIRS, **FEW)
    mill = train(base, ROWS, **OWN, **FEW, eval_data=ROWS[:2], output_dir=tmp_path / "mill")
    assert distance(mill, expected) == 0
    assert Task.from_spec(mill.task) == column_task(**OWN)
    assert distance(train(base, ROWS, task=column_task(**OWN), **FEW), expected) == 0
    loaded = Prefix.from_pretrained(tmp_path / "mill")
    new = {"price": "9", "NAME": "x", "colour": "red"}
    texts = [generate([r], loaded, model=base, max_new_tokens=4)[0].text for r in (new, "x, 9 ->")]
    assert texts[0] == texts[1]
    found, same = (score([r], loaded, model=base)[0] for r in (ROWS[0], PAIRS[0]))
    assert found.token_ids == same.token_ids


def test_a_table_trains_as_the_built_in_linearization(base):
    rows = [{"table": {"name": r["name"], "price": str(r["price"])}, "ref": r["text"]} for r in ROWS]
    expected = train(base, rows, **FEW)
    assert distance(train(base, ROWS, table=["name", "price"], target="text", **FEW), expected) == 0


def test_a_file_of_columns(base, tmp_path):
    path = tmp_path / "products.csv"
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, ["text", "name", "price"])
        writer.writeheader()
        writer.writerows(ROWS)
    assert distance(train(base, path, **OWN, **FEW), train(base, PAIRS, **FEW)) == 0


def test_prefixes_of_several_names_and_of_a_column(base):
    lone = train(base, ROWS[:2], **OWN, **FEW)
    run = train(base, {"a": ROWS[:2], "b": [{"name": "x"}], "c": [ROWS[0] | {"price": None}]}, **OWN, **FEW)
    assert distance(run["a"], lone) < 1e-5
    assert "prompt: expected a column 'price'" in run.failed["b"]
    assert "prompt: expected a value in column 'price'" in run.failed["c"]
    rows = [r | {"prefix": "ab"[i % 2]} for i, r in enumerate(ROWS)]
    named = {"prompt": "{prefix}: {name} ->", "target": "text", "prefix_column": "Prefix"}
    run = train(base, rows, **named, **FEW)
    pairs = [{"prompt": f"{r['prefix']}: {r['name']} ->", "completion": f" {r['text']}"} for r in rows]
    assert list(run) == ["a", "b"]
    assert distance(run["b"], train(base, pairs[1::2], **FEW)) < 1e-5


WRONG = {
    "a task too": ({"task": "prompt", **OWN}, "task: expected none beside prompt and target.*got 'prompt'"),
    "a Task too": ({"task": column_task(**OWN), "target": "text"}, "task: expected none beside target.*got 'columns'"),
    "no target": ({"prompt": "{name}"}, "target: expected the column"),
    "only a target": ({"target": "text"}, "prompt and table: expected one of them"),
    "both": ({**OWN, "table": ["name"]}, "prompt and table: expected one of them"),
    "a lone brace": ({**OWN, "prompt": "{name"}, "prompt: expected columns in braces"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_arguments_that_do_not_fit_are_refused_before_rows_are_read(arguments, message):
    with pytest.raises(ConfigError, match=message):
        train("no-such-base", "no-such-file.csv", **arguments)


MISSING = {
    "of the prompt": ({**OWN, "prompt": "{nam} ->"}, "prompt: expected a column 'nam', .*did you mean 'name'"),
    "of the target": (
        {**OWN, "target": "description"},
        "target: expected a column 'description', got the col",
    ),
    "of the table": ({"table": ["name", "colour"], "target": "text"}, "table: expected a column 'colour'"),
}


@pytest.mark.parametrize(("arguments", "message"), MISSING.values(), ids=MISSING)
def test_a_missing_column_is_an_error_before_the_base_is_loaded(arguments, message):
    with pytest.raises(DataError, match=f"^row 0: {message}"):
        train("no-such-base", ROWS, **arguments)


def test_a_row_without_a_value_is_named(base):
    with pytest.raises(DataError, match="row 2: prompt: expected a value in column 'price', got none"):
        train(base, [*ROWS[:2], ROWS[2] | {"price": None}], **OWN, **FEW)


def test_reserved_columns_are_named_in_one_line(base, caplog):
    rows = [r | {"id": i, "prompt": "x"} for i, r in enumerate(ROWS)]
    train(base, rows, prompt="{name} {id} ->", target="text", **FEW)
    (line,) = [m for m in caplog.messages if "mapping" in m]
    assert all(name in line for name in ("'id'", "'text'", "'prompt'"))
    caplog.clear()
    train(
        base,
        [{k: v for k, v in r.items() if k != "text"} | {"y": "z"} for r in ROWS],
        prompt="{name} ->",
        target="y",
        **FEW,
    )
    assert not [m for m in caplog.messages if "mapping" in m]


JOINS = {
    "a template": (ROWS, {"prompt": "{price} {name}", "target": "{text}"}, 4),
    "a prompt and a completion": ([{"prompt": "ab", "completion": "cd"}, {"prompt": "a ", "completion": "c"}], {}, 1),
    "a document": ([{"document": "ab", "summary": "cd"}], {"task": Task("own", input="document")}, 1),
    "a column": (ROWS, {"prompt": "{name}", "target": "text"}, 0),
    "a separator": ([{"prompt": "2+2=", "completion": "4"}], {}, 0),
    "an end token": ([{"document": "ab", "summary": "cd"}], {"task": "xsum"}, 0),
    "a text": ([{"text": "abc"}], {}, 0),
    "ids": ([{"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}], {}, 0),
}


@pytest.mark.parametrize(("rows", "arguments", "together"), JOINS.values(), ids=JOINS)
def test_prompt_and_target_that_run_together_are_warned_of_once(base, caplog, rows, arguments, together):
    train(base, {"a": rows, "b": rows[:1]}, **arguments, **FEW)
    found = [r for r in caplog.records if "run together" in r.message]
    assert len(found) == (together > 0)
    assert all(
        r.levelno == logging.WARNING and f"in {together + 1} of {len(rows) + 1} rows" in r.message for r in found
    )


def test_a_checkpoint_of_another_mapping_is_refused(base, tmp_path):
    how = {**FEW, "output_dir": tmp_path / "out", "save_steps": 1}

    class Stop:
        def on_step(self, *_: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, ROWS, **OWN, **how, callbacks=[Stop()])
    with pytest.raises(ConfigError, match="task: "):
        train(base, ROWS, prompt="{name}, {price} ->", target="{text}", **how, resume=True)
    assert train(base, ROWS, **OWN, **how, resume=True).training["metrics"]["steps"] == 3


def test_the_names_of_the_package():
    assert prefixfast.data.column_task is column_task


def test_columns_that_nothing_reads_are_named(base, caplog):
    caplog.set_level(logging.INFO)
    train(base, [{"text": "good", "label": "1", "Source": "web", "id": 3}], **FEW)
    (found,) = (r.message for r in caplog.records if "'Source'" in r.message)
    assert ("'label'" in found, "'text'" in found, "'id'" in found) == (True, False, False)


def test_a_column_params_without_options_is_refused_with_what_to_do(base):
    prefix = train(base, ROWS, **OWN, **FEW)
    with pytest.raises(prefixfast.RequestError, match=r"params: .*rename the column"):
        generate([{**ROWS[0], "params": "7B"}], prefix, model=base)
