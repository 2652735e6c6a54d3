"""Every run says in which dtype it computes: one log line of the library, one line on standard error of a command."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys

import pytest
import torch

import prefixfast
import tiny
from oracles import ROOT
from prefixfast.model import load as loading

ROWS = [{"prompt": "a", "completion": "b"}]
CALLS = {
    "train": lambda base: prefixfast.train(base, ROWS, prefix_length=2, max_steps=1, progress=False),
    "generate": lambda base: prefixfast.generate(["a"], model=base, max_new_tokens=2, progress=False),
    "score": lambda base: prefixfast.score(["a"], targets=["b"], model=base),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_a_call_logs_its_dtype_once(call, dtype, caplog, tokenizer):
    with prefixfast.load(tiny.make("gpt2").to(dtype), tokenizer=tokenizer) as base, caplog.at_level(logging.INFO):
        CALLS[call](base)
    said = [r.getMessage() for r in caplog.records if "computing in" in r.getMessage()]
    assert len(said) == 1
    assert f"computing in {str(dtype).removeprefix('torch.')} on cpu" in said[0]


@pytest.mark.parametrize("bf16", [False, True])
def test_auto_says_what_it_is_and_why(folder, monkeypatch, caplog, bf16):
    monkeypatch.setattr(loading, "has_fast_bf16", lambda: bf16)
    with caplog.at_level(logging.DEBUG), prefixfast.load(folder) as base:
        assert base.dtype == (torch.bfloat16 if bf16 else torch.float32)
    name = "bfloat16" if bf16 else "float32"
    assert any(m.startswith(f"dtype 'auto' is {name}: this CPU has") for m in caplog.messages)


PROGRAM = """
import contextlib
import sys
from prefixfast.cli import main
from prefixfast.model import load

load.has_fast_bf16 = lambda: True
for command in COMMANDS:
    sys.argv = ["prefixfast", *map(str, command)]
    with contextlib.suppress(SystemExit):
        main()
"""


def test_commands_print_the_dtype_that_was_chosen(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf8")
    commands = [
        ("train", folder, rows, "-o", tmp_path / "prefix", "--prefix-length", 2, "--max-steps", 1),
        ("generate", rows, "-o", tmp_path / "out.jsonl", "--model", folder, "--max-new-tokens", 2),
        ("score", rows, "-o", tmp_path / "scores.jsonl", "--model", folder, "--dtype", "float32"),
    ]
    program = PROGRAM.replace("COMMANDS", repr([list(map(str, c)) for c in commands]))
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert (tmp_path / "scores.jsonl").exists(), done.stderr
    said = re.findall(r"computing in (\w+) on cpu", done.stderr)
    assert said == ["bfloat16", "bfloat16", "float32"]
    assert "computing in" not in done.stdout
