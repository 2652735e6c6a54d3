"""The pages of docs/: examples run as they stand there, links lead somewhere, each command has an example."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import MBartTokenizer

import tiny
from oracles import ROOT
from pages import blocks, run_page
from prefixfast import Prefix, PrefixStore, unload
from prefixfast.cli import app
from seq2seq import make_seq2seq

PAGES = sorted((ROOT / "docs").glob("*.md"))
RUN = [p for p in PAGES if p.name != "api.md" and any(kind in ("pycon", "console") for kind, *_ in blocks(p))]
OTHERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "kernels/README.md")]
COMMANDS = ROOT / "docs" / "command-line.md"


@pytest.fixture(scope="module")
def seq2seq_bases(tmp_path_factory, tokenizer):
    """Folder with encoder-decoder bases: a BART of the tokenizer of the other bases, and an mBART of its own."""
    path = tmp_path_factory.mktemp("seq2seq")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": tiny.EOS, "decoder_start_token_id": tiny.EOS}
    make_seq2seq("bart", vocab_size=tiny.VOCAB, **ids).save_pretrained(path / "tiny-bart")
    tokenizer.save_pretrained(path / "tiny-bart")
    words = ("the", "house", "is", "sold", "das", "haus", "ist", "verkauft", "la", "maison", "est", "vendue")
    pieces = [(f"\u2581{word}", -1.0) for word in words]
    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    languages = MBartTokenizer(
        vocab=[*special, *pieces, ("en_XX", 0.0), ("de_DE", 0.0), ("fr_XX", 0.0), ("<mask>", 0.0)]
    )
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2}
    make_seq2seq("mbart", vocab_size=len(languages), **ids).save_pretrained(path / "tiny-mbart")
    languages.save_pretrained(path / "tiny-mbart")
    return path


@pytest.fixture
def here(folder, seq2seq_bases, tmp_path, monkeypatch):
    """A folder with bases in it is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-gpt2").symlink_to(folder)
    for base in seq2seq_bases.iterdir():
        (tmp_path / base.name).symlink_to(base)
    yield tmp_path
    unload()


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.stem)
def test_the_examples_of_the_page_run(page, here, cli):
    done = run_page(page, cli)
    assert not done.wrong, "".join(done.wrong)
    assert done.examples + done.lines > 3


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_commands_of_several_processes_run(folder, tmp_path):
    """The ``bash`` blocks of docs/scaling.md, with a folder of a base where they name gpt2."""
    (tmp_path / "gpt2").symlink_to(folder)
    (tmp_path / "users").mkdir()
    for name in ("rows.jsonl", "users/ann.jsonl", "users/bob.jsonl", "users/eve.jsonl"):
        (tmp_path / name).write_text('{"prompt": "2+2=", "completion": "4"}\n{"prompt": "3+4=", "completion": "7"}\n')
    commands = "".join(text for kind, text, _ in blocks(ROOT / "docs" / "scaling.md") if kind == "bash")
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "python")}
    environment = {**os.environ, **paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(["bash", "-e", "-c", commands], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes divide 3 prefixes" in done.stderr
    assert sorted(PrefixStore(tmp_path / "prefixes")) == ["ann", "bob", "eve"]
    digests = {Prefix.from_pretrained(tmp_path / name).digest for name in ("mine", "mine-too")}
    assert len(digests) == 1
    assert Prefix.from_pretrained(tmp_path / "shared").length == 10


def leaves(command: Any, path: tuple[str, ...] = ()) -> list[str]:
    """Full names of all commands."""
    if not hasattr(command, "commands"):
        return [" ".join(path)]
    return [name for word, own in command.commands.items() for name in leaves(own, (*path, word))]


def test_every_command_has_an_example():
    text = COMMANDS.read_text(encoding="utf8")
    names = leaves(typer.main.get_command(app))
    assert len(names) > 15
    shown = [n for n in names if re.search(rf"^(\$|   ) prefixfast {n}( |$)", text, re.MULTILINE)]
    assert shown == names


def anchors(text: str) -> set[str]:
    """The links that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*OTHERS, *PAGES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text(encoding="utf8")), link


@pytest.mark.parametrize("page", [*OTHERS, *PAGES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_that_a_page_names_exist(page):
    """Paths in backticks that begin with a folder of the repository."""
    text = page.read_text(encoding="utf8")
    named = re.findall(r"`((?:python|kernels|rust|tests|benches|docs|examples)/[\w./-]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
