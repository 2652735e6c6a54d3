"""Wrong calls are refused without torch: the message and exit status of each command's most common first errors."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oracles import ROOT
from prefixfast import PrefixStore

# Imports of these packages raise. huggingface_hub and numpy are allowed.
FORBID = """
import sys

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "peft"):
            raise AssertionError(f"{name} was imported")

sys.meta_path.insert(0, Forbid())
import contextlib, io, json, traceback
from prefixfast.cli import main

results = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["prefixfast", *words]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            code = traceback.format_exc()
    if isinstance(code, str):
        print(code, file=err)
        code = 1
    results.append((code, out.getvalue(), err.getvalue()))
sys.stdout.write(json.dumps(results))
"""
ROWS = [{"prompt": f"{a}=", "completion": a * 3} for a in "abcd"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, folder, base_of_module) -> Path:
    """Folder with rows, a base, a prefix, a folder of prefixes, a store, and what is none of them."""
    path = tmp_path_factory.mktemp("place")
    (path / "base").symlink_to(folder)
    for name, rows in {
        "rows.jsonl": ROWS,
        "pairs.jsonl": [{"prompt": f"{a}{b}=", "completion": a} for a in "abcd" for b in "efgh"],
        "bad.jsonl": [*ROWS, {"prompt": 1}],
        "named.jsonl": [{**ROWS[0], "prefix": "nobody"}],
        "params.jsonl": [{**ROWS[0], "params": {"max_token": 3}}],
        "beams.jsonl": [{**ROWS[0], "params": {"num_beams": 0}}],
        "misspelt.jsonl": [{**ROWS[0], "prefx": "mill"}],
        "untargeted.jsonl": [{"prompt": "a"}],
        "other.jsonl": [{"shop_name": "a", "price": 3}],
        "id.jsonl": [{"prompt": "a", "id": float("nan")}],
        "columns.jsonl": [{"nam": "a"}],
    }.items():
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "empty.csv").write_text("")
    (path / "x.xlsx").write_bytes(b"PK\x03\x04")
    (path / "rows.txt").write_text("a\n")
    (path / "two.txt").write_text("a\nb\n")
    (path / "recipe.yaml").write_text("learning_rat: 1\n")
    (path / "empty").mkdir()
    store = PrefixStore(path / "shop")
    for name in ("mill", "inn"):
        prefix = base_of_module(name)
        prefix.save_pretrained(path / "prefixes" / name)
        store.put(name, prefix)
    base_of_module("mapped").save_pretrained(path / "mapped")
    (path / "lora").mkdir()
    (path / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "CAUSAL_LM"}')
    (path / "lora" / "adapter_model.safetensors").write_bytes(b"")
    shutil.copytree(path / "lora", path / "ia3")
    (path / "ia3" / "adapter_config.json").write_text('{"peft_type": "IA3", "task_type": "CAUSAL_LM"}')
    return path


@pytest.fixture(scope="module")
def base_of_module(folder):
    """Function that makes a prefix of the tiny base; the prefix ``mapped`` reads columns of its own."""
    import torch

    from prefixfast import Prefix, load
    from prefixfast.data import column_task

    with load(folder, dtype="float32") as base:
        fingerprint = base.fingerprint
        rows = [s.row[0] for s in base.layers]

    def make(name: str) -> Any:
        kv = {f"self.{i}.{x}": torch.ones(2, *row) for i, row in enumerate(rows) for x in "kv"}
        task = column_task(prompt="{name} ->", target="text").spec() if name == "mapped" else None
        return Prefix(kv, 2, base=fingerprint, task=task, training={"loss": len(name)})

    return make


TRAIN = ("train", "base", "rows.jsonl", "-o", "out")
GENERATE = ("generate", "rows.jsonl", "--model", "base")
SCORE = ("score", "rows.jsonl", "--model", "base")
EVAL = ("eval", "rows.txt", "rows.txt", "--task", "e2e")
REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    # train
    "max steps": ((*TRAIN, "--max-steps", "0"), 1, "max_steps: expected at least 1, got 0"),
    "flag": ((*TRAIN, "--max-step", "3"), 2, "No such option: --max-step"),
    "choice": ((*TRAIN, "--overflow", "drop"), 2, "'drop' is not one of"),
    "no data": (("train", "base", "none.jsonl", "-o", "out"), 1, "none.jsonl: cannot be read"),
    "swapped": (("train", "rows.jsonl", "base", "-o", "out"), 1, "the base comes before the data"),
    "spreadsheet": (("train", "base", "x.xlsx", "-o", "out"), 1, "x.xlsx"),
    "suffix": (("train", "base", "rows.txt", "-o", "out"), 1, "expected a file ending in .jsonl"),
    "empty": (("train", "base", "empty.csv", "-o", "out"), 1, "at least one row"),
    "row": (("train", "base", "bad.jsonl", "-o", "out"), 1, "bad.jsonl:5: prompt: expected a string, got 1"),
    "no target": (("train", "base", "untargeted.jsonl", "-o", "out"), 1, "untargeted.jsonl:1: completion: expected"),
    "columns": (("train", "base", "other.jsonl", "-o", "out"), 1, "expected one of the keys prompt"),
    "no column": ((*TRAIN, "--prompt", "{nam} ->", "--target", "completion"), 1, "nam"),
    "task": ((*TRAIN, "--task", "nlg"), 1, "task: expected one of e2e, webnlg, dart"),
    "recipe": ((*TRAIN, "--recipe", "papr"), 1, "did you mean 'paper'"),
    "recipe file": ((*TRAIN, "--recipe", "recipe.yaml"), 1, "learning_rat"),
    "sweep": ((*TRAIN, "--sweep", "learning-rat=1,2"), 1, "learning_rate"),
    "no model": (
        ("train", "bas/", "rows.jsonl", "-o", "out"),
        1,
        "did you mean 'base'",
    ),
    "offline": (("train", "some/base", "rows.jsonl", "-o", "out"), 1, "HF_HUB_OFFLINE is set"),
    "a prefix as base": (
        ("train", "prefixes/mill", "rows.jsonl", "-o", "out"),
        1,
        "which holds a prefix",
    ),
    "empty base": (("train", "empty", "rows.jsonl", "-o", "out"), 1, "which has no config.json"),
    "output": (("train", "base", "rows.jsonl", "-o", "rows.jsonl"), 1, "output_dir: expected a folder"),
    "earlier run": (("train", "base", "rows.jsonl", "-o", "prefixes/mill"), 1, "give --resume"),
    "both": ((*TRAIN, "--resume", "--overwrite"), 1, "resume and overwrite: expected one of them"),
    "init": ((*TRAIN, "--init", "none"), 1, "none: no such folder"),
    "init and recipe": ((*TRAIN, "--init", "prefixes/mill", "--recipe", "papr"), 1, "did you mean 'paper'"),
    "on top of and sweep": ((*TRAIN, "--on-top-of", "prefixes/mill", "--sweep", "a"), 1, "FIELD=VALUE"),
    "init and base": (("train", "./none", "rows.jsonl", "-o", "out", "--init", "prefixes/mill"), 1, "no such folder"),
    "lora as init": ((*TRAIN, "--init", "lora"), 1, "weights of method 'lora'"),
    "lora to try": (("try", "./none", "a", "--prefix", "lora"), 1, "weights of method 'lora'"),
    # generate
    "option": ((*GENERATE, "--max-new-tokens", "0"), 1, "max_new_tokens: expected at least 1"),
    "engine option": ((*GENERATE, "--max-num-seqs", "0"), 1, "max_num_seqs: expected at least 1"),
    "output suffix": ((*GENERATE, "-o", "out.xml"), 1, ".jsonl, .csv, .txt"),
    "output folder": ((*GENERATE, "-o", "empty"), 1, "expected a file, got the folder"),
    "no file": (("generate", "none.jsonl", "--model", "base"), 1, "none.jsonl: cannot be read"),
    "malformed": (("generate", "bad.jsonl", "--model", "base"), 1, "bad.jsonl:5: prompt: expected a string, got 1"),
    "id": (("generate", "id.jsonl", "--model", "base"), 1, "id.jsonl:1: id: expected a value that JSON can hold"),
    "params name": (("generate", "params.jsonl", "--model", "base"), 1, "did you mean max_new_tokens"),
    "params value": (("generate", "beams.jsonl", "--model", "base"), 1, "num_beams: expected at least 1"),
    "misspelt key": (("generate", "misspelt.jsonl", "--model", "base"), 1, "did you mean 'prefix'"),
    "no input": (("generate", "other.jsonl", "--model", "base"), 1, "expected one of the keys prompt"),
    "no base": (("generate", "rows.jsonl"), 1, "model: expected a base model, or prefixes that name one"),
    "base": (("generate", "rows.jsonl", "--model", "./none"), 1, "there is no such folder or file"),
    "no prefix": ((*GENERATE, "--prefix", "none"), 1, "none: no such folder"),
    "ia3": ((*GENERATE, "--prefix", "ia3"), 1, "got 'IA3'"),
    "empty folder": ((*GENERATE, "--prefix", "empty"), 1, "no prefix here"),
    "a folder of prefixes": ((*GENERATE, "--prefix", "prefixes"), 1, "('inn', 'mill'): give --prefixes prefixes"),
    "a store as prefix": ((*GENERATE, "--prefix", "shop"), 1, "which is a store: give --store shop"),
    "a prefix as folder": ((*GENERATE, "--prefixes", "prefixes/mill"), 1, "give --prefix prefixes/mill"),
    "a store as folder": ((*GENERATE, "--prefixes", "shop"), 1, "give --store shop"),
    "prefixes as store": ((*GENERATE, "--store", "prefixes"), 1, "give --prefixes prefixes"),
    "no store": ((*GENERATE, "--store", "none"), 1, "store: expected a directory"),
    "no key": ((*GENERATE, "--prefixes", "prefixes"), 1, "got no 'prefix' key"),
    "name": (("generate", "named.jsonl", "--store", "shop"), 1, "'nobody'"),
    "name of a flag": ((*GENERATE, "--store", "shop", "--prefix", "mil"), 1, "did you mean 'mill'"),
    "name in a folder": (("generate", "named.jsonl", "--prefixes", "prefixes"), 1, "prefixes/nobody: no such folder"),
    "mapping": (("generate", "columns.jsonl", "--prefix", "mapped"), 1, "'name'"),
    "a folder of rows": (("generate", "empty", "--model", "base"), 1, "IN: expected one file of rows, got a folder"),
    "two flags": (
        (*GENERATE, "--prefix", "prefixes/mill", "--prefixes", "prefixes"),
        1,
        "either --prefixes or",
    ),
    # score
    "score: no target": (("score", "untargeted.jsonl", "--model", "base"), 1, "completion: expected a string"),
    "score: suffix": ((*SCORE, "-o", "x.parquet"), 1, ".jsonl, .csv, .txt"),
    "score: option": ((*SCORE, "--max-num-batched-tokens", "0"), 1, "max_num_batched_tokens"),
    "score: base": (("score", "rows.jsonl", "--prefix", "prefixes/mill", "--model", "./none"), 1, "no such folder"),
    # eval
    "eval: task": (("eval", "rows.txt", "rows.txt", "--task", "e2"), 1, "task: expected one of e2e"),
    "eval: no task": (("eval", "rows.txt", "rows.txt"), 2, "Missing option '--task'"),
    "eval: metric": ((*EVAL, "--metrics", "BLEUE"), 1, "did you mean 'BLEU'"),
    "eval: split": ((*EVAL, "--split", "dev"), 1, "split: expected none for a file of plain references"),
    "eval: no file": (("eval", "none.txt", "rows.txt", "--task", "e2e"), 1, "none.txt: cannot be read"),
    "eval: spreadsheet": (("eval", "x.xlsx", "rows.txt", "--task", "e2e"), 1, "x.xlsx"),
    "eval: counts": (("eval", "two.txt", "rows.txt", "--task", "e2e"), 1, "got 2 outputs in two.txt and 1 groups"),
    "eval: output": ((*EVAL, "-o", "scores.txt"), 1, "--output: expected a file ending in .json"),
    "eval: no key": (("eval", "other.jsonl", "rows.txt", "--task", "e2e"), 1, "other.jsonl:1: expected one of"),
    # others
    "doctor": (("doctor", "./none"), 1, "there is no such folder or file"),
    "convert": (("convert", "none", "out"), 1, "none: no such folder"),
    "convert lora": (("convert", "lora", "out"), 1, "got 'LORA'"),
    "convert all": (("convert", "empty", "out", "--recursive"), 1, "no adapter folder in empty"),
    "data check": (("data", "check", "auto", "none.jsonl"), 1, "none.jsonl: cannot be read"),
    "data check task": (("data", "check", "nlg", "rows.jsonl"), 1, "task: expected one of e2e"),
    "prefixes list": (("prefixes", "list", "none"), 1, "store: expected a directory"),
    "prefixes list of no store": (("prefixes", "list", "prefixes"), 1, "which is a folder of prefixes"),
    "prefixes show": (("prefixes", "show", "shop", "mil"), 1, "did you mean 'mill'"),
    "prefixes rm": (("prefixes", "rm", "shop", "mil", "--yes"), 1, "did you mean 'mill'"),
    "prefixes verify": (("prefixes", "verify", "none"), 1, "which does not exist"),
    "prefixes rollback": (("prefixes", "rollback", "shop", "mill"), 1, "no version before 1"),
    "prefixes add": (("prefixes", "add", "shop", "x", "none"), 1, "none: no such folder"),
    "command": (("tune",), 2, "No such command 'tune'"),
}
COMPARE = ("compare", "pairs.jsonl", "--model", "base", "-o", "out")
REFUSED |= {
    "compare method": ((*COMPARE, "--methods", "prefx"), 1, "did you mean 'prefix'"),
    "compare option": ((*COMPARE, "--set", "prefix.prefix_lenth=3"), 1, "did you mean prefix_length"),
    "compare value": (
        (*COMPARE, "--methods", "prefix", "--set", "prefix.prefix_length=0"),
        1,
        "prefix_length: expected",
    ),
    "compare metric": ((*COMPARE, "--metrics", "BLUE"), 1, "metrics: expected names of metrics"),
    "compare decoding": ((*COMPARE, "--num-beams", "0"), 1, "num_beams: expected"),
    "compare rows": (("compare", "untargeted.jsonl", "--model", "base"), 1, "untargeted.jsonl:1: completion: expected"),
    "compare few rows": (("compare", "rows.jsonl", "--model", "base"), 1, "give --eval-data"),
    "compare no model": ((*COMPARE[:2], "--model", "bas/"), 1, "did you mean 'base'"),
    "compare folder": ((*COMPARE[:4], "-o", "rows.jsonl"), 1, "expected a folder"),
    "compare seeds": ((*COMPARE, "--seeds", "0"), 2, "--seeds"),
    "compare both": ((*COMPARE, "--eval-data", "pairs.jsonl", "--eval-fraction", "0.5"), 1, "got both"),
}
DONE: dict[str, tuple[tuple[str, ...], int, str]] = {
    "list": (("prefixes", "list", "shop"), 0, "inn"),
    "show": (("prefixes", "show", "shop", "mill"), 0, "float32"),
    "check": (("data", "check", "auto", "rows.jsonl"), 0, "4 rows"),
    "eval": ((*EVAL, "--metrics", "bleu,ter,chrf,lengths"), 0, "BLEU"),
    "version": (("--version",), 0, "prefixfast"),
}


ALL = REFUSED | DONE


def run(place: Path, program: str, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TERM": "dumb"}
    command = [sys.executable, "-c", program, *words]
    null = subprocess.DEVNULL
    return subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False, stdin=null)


@pytest.fixture(scope="module")
def results(place) -> dict[str, Any]:
    """Exit status, standard output and standard error of every command, all in one process that cannot import torch."""
    before = sorted(p.name for p in place.iterdir())
    done = run(place, FORBID, json.dumps([words for words, _, _ in ALL.values()]))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in place.iterdir()) == before, "nothing is written"
    return dict(zip(ALL, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", ALL)
def test_no_torch_is_imported(results, case):
    _, code, message = ALL[case]
    got, out, err = results[case]
    assert got == code, err
    assert message in " ".join((out + err).split())
    assert "Traceback" not in err


def test_the_list_is_sorted_by_name(results):
    lines = results["list"][1].splitlines()
    assert [line.split("\t")[0] for line in lines] == ["name", "inn", "mill"]


def test_a_refusal_takes_little_time(place):
    refusal = "from prefixfast.cli import main; main()"
    words = REFUSED["max steps"][0]
    assert run(place, refusal, *words).returncode == 1
    taken = min(cpu_seconds(place, refusal, *words) for _ in range(3))
    assert taken < cpu_seconds(place, "import torch, transformers")


def cpu_seconds(place: Path, program: str, *words: str) -> float:
    """CPU seconds of a Python program, which do not count time that other processes take."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(place, program, *words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
