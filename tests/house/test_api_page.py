"""docs/api.md and the examples in docstrings: they run as they stand there, and no public name is missing from them."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import re
import textwrap
from collections.abc import Callable
from functools import cached_property
from types import CodeType, FrameType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers

import prefixfast
from oracles import ROOT
from pages import FLAGS, blocks, run_page
from prefixfast import Model, Prefix, load, unload
from prefixfast.config import Options
from prefixfast.engine.ticket import Ticket
from prefixfast.prefix.inspect import Inspection
from prefixfast.store import Check, Outcome, Receipt, StoredPrefix

PAGE = ROOT / "docs" / "api.md"
REACHED = (Ticket, StoredPrefix, Receipt, Outcome, Check, Inspection)  # what public methods return
CLASSES = [c for c in (*(getattr(prefixfast, n) for n in prefixfast.__all__), *REACHED) if isinstance(c, type)]


class Hub:
    """In place of the hub: the commit of an upload."""

    def __init__(self, token: str | None) -> None: ...
    def create_repo(self, *_, **__) -> None: ...
    def upload_folder(self, *, repo_id: str, **_):
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/0123")


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """A folder with a base in it is the current one."""
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-gpt2").symlink_to(folder)
    yield tmp_path
    unload()


def function_of(member: Any) -> Callable[..., Any] | None:
    """What runs when a member is used; None for what is no code."""
    found = (
        member.fget
        if isinstance(member, property)
        else member.func
        if isinstance(member, cached_property)
        else getattr(member, "__func__", member)
    )
    return found if inspect.isfunction(found) else None


def public_members(owner: type) -> dict[str, Callable[..., Any]]:
    """Methods and properties of a class, without those of the class of transformers that it extends."""
    theirs = {n for base in (transformers.Cache, transformers.Trainer) if issubclass(owner, base) for n in dir(base)}
    classes = [c for c in owner.__mro__ if c.__module__.startswith("prefixfast")]
    return {
        n: f
        for c in reversed(classes)
        for n, m in vars(c).items()
        if n[0] != "_" and n not in theirs and (f := function_of(m)) is not None
    }


METHODS = {f"{c.__name__}.{n}": f for c in CLASSES for n, f in public_members(c).items()}
CACHED = {
    f"{c.__name__}.{n}"
    for c in CLASSES
    for owner in c.__mro__
    if owner.__module__.startswith("prefixfast")
    for n, m in vars(owner).items()
    if isinstance(m, cached_property) and n[0] != "_"
}
PROPERTIES = CACHED | {
    f"{c.__name__}.{n}"
    for c in CLASSES
    for n in public_members(c)
    if isinstance(inspect.getattr_static(c, n), property)
}
CALLED = {n: f for n, f in METHODS.items() if n not in PROPERTIES}
INDIRECT = CACHED | {n for n, f in METHODS.items() if inspect.iscoroutinefunction(f)}  # run before, or by an event loop
FUNCTIONS = {n: getattr(prefixfast, n) for n in prefixfast.__all__ if inspect.isfunction(getattr(prefixfast, n))}


# Members that a user of the public names does not call.
INTERNAL = {
    "Model.handle",
    "Model.head",
    "Model.hidden",
    "Model.guard",
    "Model.packed",
    "Model.prepack",
    "Model.training_layers",
    "Model.run",
    "Model.whole_fingerprint",
    "Model.opened",
    "Prefix.fields",
    "TunedWeights.fields",
}
# `TrainConfig.make` stands for the `make` of all option classes.
MAKE = {"MethodConfig.make", "PrefixConfig.make", "GenerationParams.make", "EngineConfig.make"}
# Names of version 0.1.0, which warn.
RENAMED = {
    "Model.check_prefix",
    "Prefix.linearizer",
    "Prefix.not_peft_because",
    "StoredPrefix.linearizer",
    "Model.need_tokenizer",
}


def test_the_page_runs_and_calls_everything_public(here, cli):
    """The code that the examples themselves call is watched."""
    called = set[CodeType]()

    def watch(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_back is not None and frame.f_back.f_code.co_filename.startswith("<doctest"):
            called.add(frame.f_code)

    done = run_page(PAGE, cli, watch)
    assert not done.wrong, "".join(done.wrong)
    assert done.examples > 80
    public = {n: f for n, f in (METHODS | FUNCTIONS).items() if n not in {*INDIRECT, *INTERNAL, *MAKE, *RENAMED}}
    assert [n for n, f in public.items() if f.__code__ not in called] == []


def source_of_the_page() -> str:
    """The examples without their output."""
    found = [text for kind, text, _ in blocks(PAGE) if kind == "pycon"]
    return "\n".join(e.source for text in found for e in doctest.DocTestParser().get_examples(text))


def test_every_public_name_is_in_an_example():
    source = source_of_the_page()
    assert [n for n in prefixfast.__all__ if not re.search(rf"\bprefixfast\.{n}\b", source)] == []
    fields = [
        f"{c.__name__}.{f.name}"
        for c in CLASSES
        if dataclasses.is_dataclass(c) and not issubclass(c, Options)
        for f in dataclasses.fields(c)
        if not f.name.startswith("_")
    ]
    used = {*re.findall(r"\.(\w+)\b(?!\()", source)} | {
        n.split(".")[1] for n in INDIRECT if f".{n.split('.')[1]}(" in source
    }
    assert [n for n in (*fields, *INDIRECT) if n not in INTERNAL and n.split(".")[1] not in used] == []


# ---- docstrings ----


def local_docs(name: str) -> str:
    """The docstring of a method, and of the one whose arguments it says to have."""
    doc = inspect.getdoc(METHODS[name]) or ""
    same = re.search(r"Arguments are those of `(\w+)`", doc)
    return doc + (local_docs(f"{name.split('.')[0]}.{same[1]}") if same else "")


@pytest.mark.parametrize("name", CALLED)
def test_every_argument_of_a_method_is_described(name):
    doc = local_docs(name)
    wanted = [p for p in inspect.signature(METHODS[name]).parameters if p not in ("self", "cls", "options")]
    assert [p for p in wanted if not re.search(rf"^    {p}: |``{p}``", doc, re.MULTILINE)] == []


RETURNING_TENSORS = [
    n for n, f in (CALLED | FUNCTIONS).items() if "Tensor" in str(inspect.signature(f).return_annotation)
]


@pytest.mark.parametrize("name", RETURNING_TENSORS)
def test_the_shape_of_a_tensor_that_comes_back_is_described(name):
    assert re.search(r"``\[.*\]``", (inspect.getdoc((CALLED | FUNCTIONS)[name]) or "").partition("Returns:")[2])


@pytest.mark.parametrize("owner", [c for c in CLASSES if dataclasses.is_dataclass(c)], ids=lambda c: c.__name__)
def test_fields_with_tensors_say_their_shapes(owner):
    tensors = [f.name for f in dataclasses.fields(owner) if "Tensor" in str(f.type)]
    assert [n for n in tensors if not re.search(rf"^ +{n}: .*``\[.*\]``", owner.__doc__, re.MULTILINE)] == []


@pytest.mark.parametrize("name", [*METHODS, *FUNCTIONS])
def test_what_a_function_raises_itself_is_described(name):
    function = (METHODS | FUNCTIONS)[name]
    body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    raised = {
        ast.unparse(n.exc.func) for n in ast.walk(body) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)
    }
    described = (inspect.getdoc(function) or "").partition("Raises:")[2]
    assert {
        r
        for r in raised
        if not re.search(rf"^ +{r}: ", described, re.MULTILINE)
        and f"Raise `{r}`" not in (inspect.getdoc(function) or "")
    } == set()


# ---- examples in docstrings; those of `Prefix` and of training run in tests/unit ----

ELSEWHERE = {"MethodConfig", "Prefix", "PrefixConfig", "TrainConfig", "TrainRun", "TunedWeights", "train"}
SHOWN = {
    "Engine",
    "EngineConfig",
    "Folder",
    "GenerationParams",
    "HFCache",
    "PrefixStore",
    "PrefixTrainer",
    "Stream",
    "check_fits",
    "evaluate",
    "generate",
    "load",
    "score",
    "unload",
}


def examples_of(value: Any, name: str) -> list[doctest.DocTest]:
    return [t for t in doctest.DocTestFinder().find(value, name) if t.examples]


EXAMPLES = [t for n in prefixfast.__all__ if n not in ELSEWHERE for t in examples_of(getattr(prefixfast, n), n)]


def test_what_users_call_has_an_example():
    assert {t.name for t in EXAMPLES} >= SHOWN
    results = {c.__name__ for c in CLASSES if dataclasses.is_dataclass(c) or issubclass(c, Exception)}
    assert set(prefixfast.__all__) - SHOWN - ELSEWHERE == results & set(prefixfast.__all__) - SHOWN - ELSEWHERE


def run_example(case: doctest.DocTest, model: Model, **names: Any) -> None:
    case.globs = (
        names
        | {n: getattr(prefixfast, n) for n in prefixfast.__all__}
        | {"base": model, "prefix": Prefix.from_text(model, "table-to-text:"), "torch": torch}
    )
    out: list[str] = []
    assert doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(case, out=out.append).failed == 0, "".join(out)


@pytest.mark.parametrize("case", EXAMPLES, ids=lambda t: t.name)
def test_the_example_holds(case, here):
    with load("tiny-gpt2", dtype="float32") as model:
        run_example(case, model)


def test_the_example_of_the_lm_eval_model_holds(here):
    from prefixfast.integrations.lm_eval import PrefixLM

    (case,) = examples_of(PrefixLM, "PrefixLM")
    with load("tiny-gpt2", dtype="float32") as model:
        run_example(case, model, PrefixLM=PrefixLM)
