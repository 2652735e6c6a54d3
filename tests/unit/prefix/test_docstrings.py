"""Doctests of `Prefix`."""

from __future__ import annotations

import doctest
import os
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from prefixfast import Prefix, generate

FOUND = [t for t in doctest.DocTestFinder(recurse=True).find(Prefix, "Prefix") if t.examples]
WITH_EXAMPLE = {
    "Prefix",
    *(
        f"Prefix.{n}"
        for n in ("save_pretrained", "to_peft", "from_pretrained", "from_text", "concat", "inspect", "push_to_hub")
    ),
}


def test_every_method_has_an_example():
    assert {t.name for t in FOUND} == WITH_EXAMPLE


@pytest.mark.parametrize("case", FOUND, ids=lambda t: t.name)
def test_example(case, base, tmp_path, monkeypatch):
    class Hub:
        def __init__(self, token: str | None) -> None: ...
        def create_repo(self, *_, **__) -> None: ...
        def upload_folder(self, *, repo_id: str, **_):
            return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/0123")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.chdir(tmp_path)
    case.globs = {
        "base": base,
        "prefix": Prefix.from_text(base, "table-to-text:"),
        "Prefix": Prefix,
        "generate": generate,
        "os": os,
        "torch": torch,
    }
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(case).failed == 0
