"""What holds for the files of the repository themselves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
from pathlib import Path

import pytest

import prefixfast
from oracles import ROOT
from prefixfast.config import Options

LONGEST_FILE, LONGEST_FUNCTION, LONGEST_KERNEL = 400, 60, 150
SOURCES = sorted(p for folder in ("python/prefixfast", "kernels") for p in (ROOT / folder).rglob("*.py"))
RUST = sorted(p for p in (ROOT / "rust").rglob("*.rs") if "tests" not in p.relative_to(ROOT / "rust").parts)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [
        n
        for n in ast.walk(ast.parse(path.read_text(encoding="utf8")))
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    docstring = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    return function.end_lineno - function.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def test_there_are_sources():
    assert len(SOURCES) > 30
    assert len(RUST) > 15


def test_the_kernels_folder_is_no_package():
    """It would shadow Hugging Face's package `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_kernels_are_linked_into_the_python_folder():
    link = ROOT / "python" / "prefixfast_kernels"
    assert link.readlink().as_posix() == "../kernels/prefixfast_kernels"
    assert (link / "reference.py").is_file()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf8").splitlines()) < LONGEST_FILE


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_functions_are_short(path):
    most = {
        f: LONGEST_KERNEL if "triton.jit" in map(ast.unparse, f.decorator_list) else LONGEST_FUNCTION
        for f in functions(path)
    }
    assert {f.name: lines_of_code(f) for f, limit in most.items() if lines_of_code(f) > limit} == {}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_say_what_they_are_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf8")))


# ---- public names ----


def test_public_names_are_those_with_a_home():
    assert sorted(prefixfast.__all__) == sorted(prefixfast._HOME)


@pytest.mark.parametrize("public", prefixfast.__all__)
def test_every_public_name_has_a_docstring(public):
    assert inspect.getdoc(getattr(prefixfast, public))


def members(public: str) -> list[tuple[str, object]]:
    """The object, and of a class its own public methods."""
    value = getattr(prefixfast, public)
    own = [
        (f"{public}.{n}", getattr(value, n))
        for n, m in vars(value).items()
        if not n.startswith("_") and isinstance(m, staticmethod | classmethod)
    ]
    own += [(f"{public}.{n}", m) for n, m in vars(value).items() if not n.startswith("_") and inspect.isfunction(m)]
    return [(public, value), *own]


def arguments(value: object) -> list[str]:
    """Names that a caller must know; options have their help texts, other dataclasses their attributes."""
    if dataclasses.is_dataclass(value):
        return []
    if isinstance(value, type) and value.__init__ in (
        object.__init__,
        Exception.__init__,
        ValueError.__init__,
        RuntimeError.__init__,
        KeyError.__init__,
    ):
        return []
    return [n for n in inspect.signature(value).parameters if n not in ("self", "cls")]


CALLABLES = [pytest.param(n, id=n) for n in prefixfast.__all__]


@pytest.mark.parametrize("public", CALLABLES)
def test_every_argument_of_a_public_callable_is_described(public):
    value = getattr(prefixfast, public)
    wanted = arguments(value)
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", (inspect.getdoc(value) or "") + "\n", re.MULTILINE)
    described = re.findall(r"^    (\w+):", section[1], re.MULTILINE) if section else []
    assert described == wanted or not wanted


@pytest.mark.parametrize("public", [n for n in prefixfast.__all__ if dataclasses.is_dataclass(getattr(prefixfast, n))])
def test_every_field_of_a_public_dataclass_is_described(public):
    value = getattr(prefixfast, public)
    fields = [f for f in dataclasses.fields(value) if not f.name.startswith("_")]
    section = (inspect.getdoc(value) or "").partition("Attributes:")[2]
    described = [
        f.name
        for f in fields
        if re.search(rf"^\s*{f.name}: ", section, re.MULTILINE)
        or (issubclass(value, Options) and f.metadata.get("help"))
    ]
    assert described == [f.name for f in fields]


@pytest.mark.parametrize("public", prefixfast.__all__)
def test_every_public_method_has_a_docstring(public):
    assert [n for n, m in members(public) if not inspect.getdoc(m)] == []


# ---- what must not be in any tracked file ----

REGISTRIES = tuple(
    ".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("crates", "io"))
)  # not spelt out: this file is searched too
CONSOLE = re.compile(r"^```console\n.*?^```$", re.MULTILINE | re.DOTALL)
HOSTS = re.compile(rf"//(?:[\w-]+\.)*(?:{'|'.join(map(re.escape, REGISTRIES))})(?![\w.-])")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / n for n in listed.stdout.split("\0") if n and (ROOT / n).is_file()]


def test_a_registry_host_would_be_found():
    assert HOSTS.search(f"index-url = https://{REGISTRIES[0]}/simple")
    assert HOSTS.search(f"sparse+https://index.{REGISTRIES[2]}/")
    assert not HOSTS.search(f"https://example.com/{REGISTRIES[2]}-index")


def test_no_tracked_file_names_a_registry_host():
    assert [name(p) for p in tracked() if HOSTS.search(p.read_bytes().decode("utf8", "replace"))] == []


def blank(block: re.Match[str]) -> str:
    """As many empty lines as the block has."""
    return "\n" * block[0].count("\n")


def test_lines_of_text_and_code_have_at_most_120_columns():
    """Tables, addresses, generated files and outputs of commands are exempt; ruff checks Python files."""
    kinds = (".md", ".rs", ".toml", ".yaml", ".yml", "Makefile")
    exempt = re.compile(r"\s*\||.*https?://")
    long = [
        f"{name(p)}:{number}"
        for p in tracked()
        if p.name.endswith(kinds) and "benches/results" not in name(p)
        for number, line in enumerate(CONSOLE.sub(blank, p.read_text(encoding="utf8")).splitlines(), 1)
        if len(line) > 120 and not exempt.match(line)
    ]
    assert long == []


def test_no_tracked_file_is_large():
    demo = ROOT / "python" / "prefixfast" / "demo"
    bases = {demo / "base", demo / "base_seq2seq"}
    for base in bases:
        assert 0 < sum(p.stat().st_size for p in tracked() if p.parent == base) <= 8 * 2**20
    assert {name(p): p.stat().st_size for p in tracked() if p.stat().st_size > 2**20 and p.parent not in bases} == {}
