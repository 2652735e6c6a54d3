"""Help pages of all commands: whole flag names at 80 columns, defaults, examples; and the version."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import prefixfast
from oracles import ROOT
from prefixfast import EngineConfig, GenerationParams, MethodConfig, PrefixConfig, TrainConfig
from prefixfast.cli import app
from prefixfast.cli.help import commands
from prefixfast.data import TASKS
from prefixfast.metrics.tasks import TASK_METRICS

ALL = dict(commands(typer.main.get_command(app)))
LEAVES = {path: command for path, command in ALL.items() if not hasattr(command, "commands")}
CONFIGS = {
    "train": (TrainConfig, PrefixConfig, MethodConfig),
    "generate": (GenerationParams, EngineConfig),
    "score": (EngineConfig,),
    "compare": (TrainConfig, GenerationParams),
}
each = pytest.mark.parametrize("path", ALL, ids=lambda path: " ".join(path) or "prefixfast")
leaf = pytest.mark.parametrize("path", LEAVES, ids=" ".join)


@pytest.fixture
def page(cli, monkeypatch):
    """Function from a command's words to its help page at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def read(path: tuple[str, ...]) -> str:
        shown = cli(*path, "--help")
        assert shown.code == 0, shown.err
        return shown.out

    return read


def entry(page: str, flag: str) -> str:
    """The text of one option on a help page, on one line."""
    found = re.search(rf"^  (?:-\w, )?{flag}(?=[ ,;/]).*(?:\n {{10,}}.*)*", page, re.MULTILINE)
    assert found, flag
    return " ".join(found[0].split())


def options(path: tuple[str, ...]) -> list:
    return [p for p in ALL[path].params if p.param_type_name == "option"]


@each
def test_no_flag_name_is_cut_at_80_columns(path, page):
    text = page(path)
    assert max(map(len, text.splitlines())) <= 80
    flags = {flag for p in options(path) for flag in (*p.opts, *p.secondary_opts)} | {"--help"}
    assert flags - set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text)) == set()


@each
def test_every_option_is_described_with_its_default(path, page):
    text = page(path)
    for p in options(path):
        if p.name != "version":
            assert re.search(r"\[(default: .+|required)\]$", entry(text, max(p.opts, key=len))), p.opts


@pytest.mark.parametrize("command", CONFIGS)
def test_every_field_of_the_option_dataclasses_is_a_flag(command, page):
    text = page((command,))
    fields = {f.name: f for c in reversed(CONFIGS[command]) for f in dataclasses.fields(c)}
    for name, field in fields.items():
        shown = entry(text, "--" + name.replace("_", "-"))
        assert re.sub(r"\s+", "", field.metadata["help"])[1:30] in re.sub(r"\s+", "", shown)
        if field.default is None:
            assert re.search("none|default", field.metadata["help"], re.IGNORECASE), f"{name}: says what None does"


@each
def test_every_page_ends_with_an_example(path, page):
    example = page(path).partition("\nExample:\n")[2]
    assert example.splitlines()
    assert all(line.startswith("  prefixfast " + " ".join(path)) for line in example.splitlines())


@leaf
def test_examples_are_valid_command_lines(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()
    for line in LEAVES[path].epilog.splitlines():
        words = shlex.split(line)[1 + len(path) :]
        LEAVES[path].make_context(path[-1], words)


def test_the_pages_of_groups_list_their_commands(page):
    for path, command in ALL.items():
        if hasattr(command, "commands"):
            shown = page(path).partition("\nCommands:\n")[2]
            assert set(re.findall(r"^  ([a-z0-9-]+)  ", shown, re.MULTILINE)) == set(command.commands)


@pytest.mark.parametrize("path", [("train",), ("data", "check"), ("compare",), ("eval",)], ids=" ".join)
def test_the_help_of_a_task_names_every_task(path):
    names = TASK_METRICS if path == ("eval",) else TASKS
    (option,) = (p for p in LEAVES[path].params if "--task" in p.opts)
    assert {*names} <= {*re.findall(r"\w+", option.help)}


def test_version(cli):
    shown = cli("--version")
    assert (shown.code, shown.out) == (0, f"prefixfast {prefixfast.__version__}\n")


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["train", "--help"], ["bench", "generate", "--help"]])
def test_help_and_version_need_no_torch(words):
    program = (
        "import sys\nfrom prefixfast.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python")}
    run = subprocess.run([sys.executable, "-c", program, *words], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
