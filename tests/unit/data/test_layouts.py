"""Rows of public data sets: each layout becomes the prompt and target of a task, in training and in generation."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from prefixfast import DataError, Prefix, generate, score, train
from prefixfast.data import TASKS, Task, column_task, find_task
from prefixfast.data.check_data import check_data
from prefixfast.data.rows import read_rows

PAIRS = {
    "Alpaca": ({"instruction": "Add.", "input": "2, 2", "output": "4"}, "instruction", "Add.\n\n2, 2\n", "4"),
    "Alpaca without input": ({"instruction": "Say hi.", "input": "", "output": "hi"}, "instruction", "Say hi.\n", "hi"),
    "Alpaca of a table": ({"instruction": "Say hi.", "input": None, "output": "hi"}, "instruction", "Say hi.\n", "hi"),
    "Dolly": (
        {"instruction": "Where?", "context": "In Rome.", "response": "Rome", "category": "qa"},
        "instruction",
        "Where?\n\nIn Rome.\n",
        "Rome",
    ),
    "question and answer": ({"question": "2+2?", "answer": "4"}, "instruction", "2+2?\n", "4"),
    "question with context": (
        {"question": "Where?", "context": "In Rome.", "answer": "Rome"},
        "instruction",
        "In Rome.\n\nWhere?\n",
        "Rome",
    ),
    "question and response": ({"question": "2+2?", "response": "4"}, "instruction", "2+2?\n", "4"),
    "query and answer": ({"query": "2+2?", "answer": "4"}, "instruction", "2+2?\n", "4"),
    "input and output": ({"input": "2+2?", "output": "4"}, "instruction", "2+2?\n", "4"),
    "CNN and Daily Mail": ({"article": "Long.", "highlights": "L.", "id": "1"}, "summary", "Long.\n", "L."),
    "SAMSum": ({"id": "1", "dialogue": "A: hi", "summary": "A greets."}, "summary", "A: hi\n", "A greets."),
    "prompt and response": ({"prompt": "2+2=", "response": "4"}, "prompt", "2+2=", "4"),
    "the keys of a format come first": (
        {"prompt": "2+2=", "completion": "4", "response": "5", "question": "x", "input": "y"},
        "prompt",
        "2+2=",
        "4",
    ),
}


@pytest.mark.parametrize(("row", "name", "prompt", "target"), PAIRS.values(), ids=PAIRS)
def test_prompt_and_target(row, name, prompt, target):
    task = find_task(None, row)
    assert task.name == name
    assert task.pairs([row], None) == [(prompt, [target])]
    assert Task.from_spec(task.spec()) == task
    asked = {k: v for k, v in row.items() if k not in ("output", "response", "answer", "highlights", "completion")}
    assert find_task(None, asked).prompts([asked], None) == [prompt]


SHAREGPT = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "hello"},
]
MESSAGES = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
]


def template(messages, *, generation_prompt, tools=None, options=None):
    return "".join(f"<{m['role']}>{m['content']}" for m in messages) + ("<assistant>" if generation_prompt else "")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SHAREGPT},
        {"conversations": SHAREGPT[1:], "system": "Be kind."},
        {"conversations": SHAREGPT, "system": ""},
        {"conversations": MESSAGES, "id": "1"},
        {"messages": SHAREGPT},
    ],
)
def test_conversations_are_messages(row):
    task = find_task(None, row)
    assert task.name == "messages"
    assert task.pairs([row], None, template) == TASKS["messages"].pairs([{"messages": MESSAGES}], None, template)
    (key,) = {"conversations", "messages"} & {*row}
    asked = {**row, key: row[key][:-1]}
    assert task.prompts([asked], None, template) == ["<system>Be kind.<user>hi<assistant>"]


WRONG = {
    "another speaker": (
        {"conversations": [{"from": "bard", "value": "a"}]},
        r"conversations\[0\].from: expected one of",
    ),
    "no value": ({"conversations": [{"from": "human"}]}, r"conversations\[0\].value: expected a string"),
    "no list": ({"conversations": "hi"}, "conversations: expected a list of messages"),
    "a number as answer": ({"question": "a", "answer": 3}, "answer: expected a string, got 3"),
    "no answer": ({"question": "a"}, "expected one of the keys output, response, answer"),
    "an empty answer": ({"question": "a", "answer": None}, "expected one of the keys output, response, answer"),
    "two answers": ({"question": "a", "answer": "b", "response": "c"}, "remove all but one"),
    "an empty completion": ({"prompt": "a", "completion": None}, "completion: expected a string, got None"),
}


@pytest.mark.parametrize(("row", "message"), WRONG.values(), ids=WRONG)
def test_wrong_rows_are_refused(row, message):
    with pytest.raises(DataError, match=message):
        find_task(None, row).pairs([row], None, template)


UNCERTAIN = {
    "two inputs": ({"question": "a", "query": "b"}, "expected one of the keys"),
    "text and summary": ({"text": "a", "summary": "b"}, "target summary to learn summary"),
    "a source": ({"source": "a", "target": "b"}, "--prompt"),
    "nothing known": ({"a": "b"}, "--prompt"),
}


@pytest.mark.parametrize(("row", "message"), UNCERTAIN.values(), ids=UNCERTAIN)
def test_rows_without_a_certain_meaning_are_refused(row, message):
    with pytest.raises(DataError, match=message):
        find_task(None, row)
    assert find_task("text", {"text": "a", "summary": "b"}).name == "text"


def test_a_table_without_header_is_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"What is 2+2?,4\nWhat is 2+3?,5\n")
    (row,) = read_rows(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"a\.csv:2: .*the first line of the file names the columns"):
        find_task(None, row)


def test_own_columns_keep_their_meaning():
    task = column_task(prompt="{question} ({input}) ->", target="answer")
    row = {"question": "2+2?", "input": "numbers", "answer": "4"}
    assert task.pairs([row], None) == [("2+2? (numbers) ->", [" 4"])]


def test_training_generation_score_and_check_read_them_alike(base, tmp_path, caplog):
    rows = [{"instruction": f"Say {a}.", "input": a, "output": a, "note": "n"} for a in "abc"]
    plain = [{"prompt": f"Say {a}.\n\n{a}\n", "completion": a} for a in "abc"]
    how = {"prefix_length": 2, "max_steps": 2, "seed": 1, "init": "random", "progress": False}
    path = tmp_path / "a.csv"
    path.write_text("Instruction,Input,Output,note\n" + "".join(f"Say {a}.,{a},{a},n\n" for a in "abc"))
    with caplog.at_level(logging.INFO):
        prefix = train(base, path, **how)
    assert any("instruction and input" in r.getMessage() for r in caplog.records)
    same = train(base, plain, **how)
    for name, values in prefix.kv.items():
        assert all(map(torch.equal, values, same.kv[name]))
    prefix.save_pretrained(tmp_path / "p")
    prefix = Prefix.from_pretrained(tmp_path / "p")
    asked = [{k: r[k] for k in ("instruction", "input")} for r in rows]
    options = {"model": base, "max_new_tokens": 3}
    found = [g.token_ids for g in generate(asked, prefix, **options)]
    assert found == [g.token_ids for g in generate([{"prompt": r["prompt"]} for r in plain], prefix, **options)]
    with pytest.raises(ValueError, match="unknown key 'note'"):
        generate(rows, prefix, **options)
    with pytest.raises(ValueError, match="unknown key 'input'"):
        generate([{"prompt": "a", "input": "b"}], prefix, **options)
    kept = [{k: v for k, v in r.items() if k != "note"} for r in rows]
    scores = [s.logprob for s in score(kept, prefix, model=base)]
    assert scores == [s.logprob for s in score(plain, prefix, model=base)]
    report = check_data(None, path)
    assert (report.task, report.num_problems, report.unread) == ("instruction", 0, ["note"])
    assert ["instruction and input" in note for note in report.notes] == [True]


def test_conversations_in_a_cell(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(f"conversations\n{json.dumps(SHAREGPT)}\n")
    (row,) = read_rows(path)
    assert row == {"conversations": SHAREGPT}
    assert check_data(None, path).num_problems == 0
    (tmp_path / "a.json").write_text(json.dumps({"conversations": SHAREGPT}))
    assert read_rows(tmp_path / "a.json") == [row]


def test_generate_says_how_rows_are_read(cli, folder, tmp_path, caplog):
    (tmp_path / "a.csv").write_text("Question,Answer,note\n2+2?,4,n\n")
    how = ("-o", tmp_path / "out.jsonl", "--model", folder, "--max-new-tokens", 2)
    with caplog.at_level(logging.INFO):
        result = cli("generate", tmp_path / "a.csv", *how)
    assert result.code == 0, result.err
    assert "the input is question" in caplog.text
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["note"] == "n"


def test_a_row_with_its_whole_text_too_needs_the_task_and_its_prefix_keeps_it(base):
    rows = [{"instruction": f"Say {a}.", "output": a, "text": f"### Say {a}. ### {a}"} for a in "abc"]
    with pytest.raises(DataError, match=r"task instruction .* task text"):
        find_task(None, rows[0])
    how = {"prefix_length": 2, "max_steps": 2, "init": "random", "model": base, "progress": False}
    prefix = train(data=rows, task="instruction", **how)
    plain = [{"prompt": f"Say {a}.\n"} for a in "abc"]
    found, expected = (generate(asked, prefix, model=base, max_new_tokens=3) for asked in (rows, plain))
    assert [g.token_ids for g in found] == [g.token_ids for g in expected]


@pytest.mark.parametrize(
    "row", [{"prompt": "q", "goal": "a"}, {"question": "q", "goal": "a"}, {"document": "q", "goal": "a", "id": 1}]
)
def test_a_target_of_another_name_is_refused_with_the_mapping_that_reads_it(row):
    key = next(iter(row))
    with pytest.raises(DataError, match=rf"goal, give prompt '\{{{key}\}}\\n' and target, with --prompt and --target"):
        find_task(None, row).pairs([row], None)
    assert column_task(prompt=f"{{{key}}}\n", target="goal").pairs([row], None) == [("q\n", ["a"])]
