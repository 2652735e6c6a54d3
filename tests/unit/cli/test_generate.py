"""The command line on a tiny saved model: what it writes, what it says, and how it exits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from oracles import ROOT
from prefixfast import Prefix, load
from prefixfast.model.base_name import different_bases

ROWS = [{"prompt": f"{a}=", "completion": a * 3} for a in "abcd"]
FAST = ("--max-steps", "2", "--batch-size", "2", "--prefix-length", "3", "--dtype", "float32")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    return write(tmp_path / "rows.jsonl", ROWS)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


def test_train_then_generate(cli, folder, data, tmp_path):
    trained = cli("train", folder, data, "-o", tmp_path / "p", *FAST)
    assert trained.code == 0, trained.err
    assert str(tmp_path / "p") in trained.out
    assert Prefix.from_pretrained(tmp_path / "p").length == 3
    requests = write(tmp_path / "in.jsonl", [{"prompt": "a=", "id": 7}, {"prompt": "b="}])
    made = cli(
        "generate",
        requests,
        "-o",
        tmp_path / "out.jsonl",
        "--prefix",
        tmp_path / "p",
        "--details",
        "--max-new-tokens",
        3,
        "--max-num-seqs",
        4,
    )
    assert made.code == 0, made.err
    lines = read(tmp_path / "out.jsonl")
    assert [(g["index"], g.get("id"), g["prefix_digest"]) for g in lines] == [
        (i, n, Prefix.from_pretrained(tmp_path / "p").digest) for i, n in ((0, 7), (1, None))
    ]
    assert all(1 <= len(g["token_ids"]) <= 3 for g in lines)


def test_several_prefixes_by_name(cli, folder, data, tmp_path):
    trained = cli("train", folder, f"x={data}", f"y={data}", "-o", tmp_path / "ps", *FAST)
    assert trained.code == 0, trained.err
    requests = write(tmp_path / "in.jsonl", [{"prompt": "a=", "prefix": n} for n in "yx"])
    made = cli(
        "generate",
        requests,
        "-o",
        tmp_path / "out.jsonl",
        "--prefixes",
        tmp_path / "ps",
        "--details",
        "--max-new-tokens",
        2,
        "--max-num-seqs",
        4,
    )
    assert made.code == 0, made.err
    assert [g["prefix_digest"] for g in read(tmp_path / "out.jsonl")] == [
        Prefix.from_pretrained(tmp_path / "ps" / n).digest for n in "yx"
    ]


def test_training_leaves_a_log(cli, folder, data, tmp_path):
    assert cli("train", folder, data, "-o", tmp_path / "p", *FAST, "--logging-steps", 1, "--eval-data", data).code == 0
    lines = read(tmp_path / "p" / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert any("eval_loss" in line for line in lines)


def settings(folder: Path) -> dict:
    training = Prefix.from_pretrained(folder).training
    return training["config"] | training["prefix_config"]


def test_a_file_of_options_is_read_and_flags_win(cli, folder, data, tmp_path):
    options = {"max_steps": 1, "prefix_length": 2, "learning_rate": 0.125, "pos_start": "zero", "shuffle": False}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options), encoding="utf8")
    done = cli(
        "train",
        folder,
        data,
        "-o",
        tmp_path / "p",
        "--config",
        tmp_path / "options.yaml",
        "--max-steps",
        2,
        "--dtype",
        "float32",
    )
    assert done.code == 0, done.err
    got = settings(tmp_path / "p")
    assert {n: got[n] for n in options} == {**options, "max_steps": 2}


@pytest.mark.parametrize(("flag", "value"), [("--shuffle", True), ("--no-shuffle", False)])
def test_a_switch_can_be_turned_on_and_off(cli, folder, data, tmp_path, flag, value):
    done = cli("train", folder, data, "-o", tmp_path / "p", *FAST, flag)
    assert done.code == 0, done.err
    assert settings(tmp_path / "p")["shuffle"] is value


@pytest.mark.parametrize("value", ["true", "false", "never"])
def test_early_stopping_takes_its_three_values(cli, folder, tmp_path, monkeypatch, value):
    seen = {}
    monkeypatch.setattr("prefixfast.engine.generate.generate_each", lambda *_, **how: seen.update(how) or [])
    requests = write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    assert (
        cli("generate", requests, "-o", tmp_path / "out.jsonl", "--model", folder, "--early-stopping", value).code == 0
    )
    assert seen["early_stopping"] == {"true": True, "false": False}.get(value, value)


# ---- mistakes: one message, no traceback ----

TRAIN = ("train", "{folder}", "{data}", "-o", "{tmp}/p")
GENERATE = ("generate", "{data}", "-o", "{tmp}/out.jsonl", "--model", "{folder}")
MISTAKES = {
    "unknown flag": ((*TRAIN, "--max-step", "3"), 2, "No such option: --max-step"),
    "no output": (("train", "{folder}", "{data}"), 2, "expected -o FOLDER for the prefix"),
    "a word for a number": ((*TRAIN, "--batch-size", "ten"), 2, "Invalid value for '--batch-size'"),
    "an unknown choice": ((*TRAIN, "--overflow", "drop"), 2, "'drop' is not one of"),
    "unknown command": (("tune",), 2, "No such command 'tune'"),
    "wrong range": ((*TRAIN, "--batch-size", "0"), 1, "TrainConfig.batch_size: expected at least 1, got 0"),
    "no such model": (("train", "{tmp}/nothing", "{data}", "-o", "{tmp}/p"), 1, "{tmp}/nothing"),
    "no such data": (("train", "{folder}", "{tmp}/none.jsonl", "-o", "{tmp}/p"), 1, "{tmp}/none.jsonl"),
    "malformed data": (("train", "{folder}", "{tmp}/bad.jsonl", "-o", "{tmp}/p"), 1, "{tmp}/bad.jsonl:2"),
    "a row without target": (
        ("train", "{folder}", "{tmp}/half.jsonl", "-o", "{tmp}/p"),
        1,
        "completion: expected a string",
    ),
    "one name twice": (("train", "{folder}", "x={data}", "x={tmp}/half.jsonl", "-o", "{tmp}/p"), 1, "'x'"),
    "a name that is no folder": (("train", "{folder}", "../x={data}", "-o", "{tmp}/p"), 1, "'../x' cannot be a folder"),
    "unknown task": ((*TRAIN, "--task", "nlg"), 1, "task: expected one of e2e, webnlg, dart"),
    "init of no folder": ((*TRAIN, "--init", "{tmp}/none"), 1, "{tmp}/none: no such folder"),
    "unknown dtype": ((*TRAIN, "--dtype", "int8"), 2, "'int8' is not one of 'auto', 'float32'"),
    "no options file": ((*TRAIN, "--config", "{tmp}/none.yaml"), 1, "--config {tmp}/none.yaml: cannot be read"),
    "broken options file": ((*TRAIN, "--config", "{tmp}/broken.yaml"), 1, "--config {tmp}/broken.yaml: cannot be read"),
    "a list of options": ((*TRAIN, "--config", "{tmp}/list.yaml"), 1, "expected a mapping of options, got list"),
    "an unknown option in the file": ((*TRAIN, "--config", "{tmp}/lr.yaml"), 1, "lr.yaml"),
    "generate: no such file": (("generate", "{tmp}/none.jsonl", "-o", "{tmp}/o.jsonl"), 1, "{tmp}/none.jsonl"),
    "generate: no model": (
        ("generate", "{data}", "-o", "{tmp}/o.jsonl"),
        1,
        "model: expected a base",
    ),
    "generate: no such prefix": ((*GENERATE, "--prefix", "{tmp}/none"), 1, "{tmp}/none: no such folder"),
    "generate: two ways": (
        (*GENERATE, "--prefix", "{tmp}/a", "--prefixes", "{tmp}"),
        1,
        "expected either --prefixes or --prefix, got both",
    ),
    "generate: rows name no prefix": ((*GENERATE, "--prefixes", "{tmp}"), 1, "--prefixes: expected"),
    "generate: a folder above": (
        ("generate", "{tmp}/above.jsonl", "-o", "{tmp}/o.jsonl", "--model", "{folder}", "--prefixes", "{tmp}"),
        1,
        "got '..'",
    ),
    "generate: a long way": (
        ("generate", "{tmp}/far.jsonl", "-o", "{tmp}/o.jsonl", "--model", "{folder}", "--prefixes", "{tmp}"),
        1,
        "got 'x/y'",
    ),
    "generate: the training flags": ((*GENERATE, "--max-steps", "3"), 2, "No such option: --max-steps"),
}
OTHER_FILES = {
    "bad.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": \n',
    "half.jsonl": '{"prompt": "a"}\n',
    "above.jsonl": '{"prompt": "a", "prefix": ".."}\n',
    "far.jsonl": '{"prompt": "a", "prefix": "x/y"}\n',
    "broken.yaml": "a: [1\n",
    "list.yaml": "- max_steps\n",
    "lr.yaml": "lr: 0.1\n",
}


@pytest.mark.parametrize(("arguments", "code", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message(cli, folder, data, tmp_path, arguments, code, message):
    for name, text in OTHER_FILES.items():
        (tmp_path / name).write_text(text, encoding="utf8")
    places = {"folder": folder, "data": data, "tmp": tmp_path}
    got = cli(*(a.format(**places) for a in arguments))
    assert got.code == code
    assert message.format(**places) in got.err
    assert "Traceback" not in got.err
    assert not (tmp_path / "p").exists()
    assert not (tmp_path / "out.jsonl").exists()


def test_an_unknown_option_in_a_file_gets_the_hint(cli, folder, data, tmp_path):
    (tmp_path / "o.yaml").write_text("lr: 0.1\n", encoding="utf8")
    assert (
        "did you mean learning_rate"
        in cli("train", folder, data, "-o", tmp_path / "p", "--config", tmp_path / "o.yaml").err
    )


def test_an_interrupt_exits_with_130(cli, folder, data, tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixfast.train", interrupt, raising=False)
    assert cli("train", folder, data, "-o", tmp_path / "p").code == 130


def test_an_error_of_ours_keeps_its_traceback(cli, folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr("prefixfast.train", lambda *_, **__: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        cli("train", folder, data, "-o", tmp_path / "p")


# ---- a process ----


def test_a_process_exits_without_a_traceback(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    command = [sys.executable, "-m", "prefixfast", "generate", "none.jsonl", "-o", "out.jsonl"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("prefixfast: none.jsonl: cannot be read")
    assert "Traceback" not in run.stderr


# ---- score, stores, single failures ----


def test_score_inspect_and_a_store_by_the_command_line(cli, folder, tmp_path, make_prefix):
    import json

    from prefixfast import PrefixStore, load, score

    store = PrefixStore(tmp_path / "store")
    with load(folder, dtype="float32") as base:
        fingerprint = base.fingerprint
    prefixes = {name: make_prefix(i, base=fingerprint) for i, name in enumerate(("a", "b"))}
    for name, prefix in prefixes.items():
        store.put(name, prefix)
    rows = [
        {"prompt": "ab", "completion": "cd", "prefix": "a", "id": 1},
        {"prompt": "ef", "completion": "gh", "prefix": "b", "id": 2},
    ]
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = cli("score", str(file), "-o", str(out), "--store", str(store.path), "--dtype", "float32")
    assert done.code == 0, done
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    expected = score(["ab", "ef"], list(prefixes.values()), targets=["cd", "gh"], model=str(folder), dtype="float32")
    assert [r["logprob"] for r in lines] == [pytest.approx(s.logprob) for s in expected]
    assert [r["id"] for r in lines] == [1, 2]
    how = (
        "--details",
        "--store",
        str(store.path),
        "--max-new-tokens",
        "3",
        "--max-num-seqs",
        "4",
        "--max-model-len",
        "64",
    )
    assert cli("generate", str(file), "-o", str(out), *how).code == 0
    assert [json.loads(line)["prefix_digest"] for line in out.read_text().splitlines()] == [
        p.digest for p in prefixes.values()
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"prompt": "x", "prefix": "nobody"}]))
    some = cli("generate", str(file), "-o", str(out), *how, "--on-error", "return")
    assert some.code == 3
    assert "1 request failed" in some.out
    assert [json.loads(line)["error"] is None for line in out.read_text().splitlines()] == [True, True, False]
    assert cli("generate", str(file), "-o", str(out), *how).code == 1
    both = cli("generate", str(file), "-o", str(out), *how, "--prefix", "x")
    assert both.code == 1
    assert "no prefix is named 'x'" in both.err
    seen = cli(
        "prefixes", "inspect", str(store.path), "a", str(file), "--words", "0", "--plot", str(tmp_path / "p.png")
    )
    assert seen.code == 0, seen
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_words_and_strings_are_flags_that_come_several_times(cli, folder, tmp_path, make_prefix):
    import json

    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps({"prompt": "ab"}) + "\n")
    common = (
        "generate",
        str(file),
        "-o",
        str(out),
        "--model",
        str(folder),
        "--max-new-tokens",
        "8",
        "--min-new-tokens",
        "8",
        "--details",
    )
    assert cli(*common).code == 0
    free = json.loads(out.read_text())["token_ids"]
    assert cli(*common, "--bad-words-ids", str(free[0]), "--bad-words-ids", f"{free[1]},{free[2]}").code == 0
    assert free[0] not in json.loads(out.read_text())["token_ids"]
    wrong = cli(*common, "--bad-words-ids", "x")
    assert wrong.code == 1
    assert "--bad-words-ids: expected numbers with commas between them" in wrong.err
    assert cli(*common, "--stop-strings", "zz", "--do-sample", "--seed", "5", "--logprobs", "2").code == 0
    assert len(json.loads(out.read_text())["logprobs"][0]["top"]) == 2


def test_prefixes_that_name_one_folder_by_different_paths_have_one_base(cli, folder, make_prefix, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    with load(folder, dtype="float32") as base:
        fingerprint = base.fingerprint
    for seed, (name, path) in enumerate({"ann": folder, "bob": tmp_path / "link"}.items()):
        make_prefix(seed, base=fingerprint | {"name": str(path)}).save_pretrained(tmp_path / "all" / name)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "ab", "prefix": name}) + "\n" for name in ("ann", "bob")))
    done = cli("generate", rows, "--prefixes", tmp_path / "all", "--max-new-tokens", 2, "--max-num-seqs", 2)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 2
    assert different_bases([str(folder), str(tmp_path / "link"), "gpt2", "gpt2"]) == sorted([str(folder), "gpt2"])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "ab", "text": "the last answer"},
        {"instruction": "ab", "text": "the last answer"},
        {"question": "ab", "answer": "c", "text": "the last answer"},
    ],
)
def test_a_file_that_generate_wrote_is_read_again_by_its_input(cli, folder, tmp_path, row):
    (tmp_path / "again.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "first.jsonl").write_text(json.dumps({k: v for k, v in row.items() if k != "text"}) + "\n")
    found = {}
    for name in ("first", "again"):
        done = cli("generate", tmp_path / f"{name}.jsonl", "--model", folder, "--max-new-tokens", 4)
        assert done.code == 0, done.err
        found[name] = json.loads(done.out)
    assert found["again"] == found["first"] | {"input_text": "the last answer"}


def test_the_error_of_a_row_begins_with_its_file_and_line(cli, folder, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt\nab\n" + "a" * 500 + "\n")
    done = cli("generate", rows, "--model", folder, "--max-new-tokens", 2)
    assert done.code == 1
    assert done.err.splitlines()[-1].startswith(f"prefixfast: {rows}:3: ")
