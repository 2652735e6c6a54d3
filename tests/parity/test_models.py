"""Every causal-LM type of the installed transformers: computed as transformers computes it, or refused with the reason.

The long test goes over all types and compares the table of docs/models.md with what it found. With
``PREFIXFAST_WRITE_MODELS=1`` it writes the table.
"""

from __future__ import annotations

import logging
import os
import re

import pytest
import transformers

import causal_lms
import one_by_one
from oracles import ROOT
from prefixfast import ConfigError
from prefixfast.model.load import load

PAGE = ROOT / "docs" / "models.md"
BLOCK = re.compile(r"(?<=<!-- models -->\n).*?(?=<!-- end -->)", re.DOTALL)
FAST = ("gpt2", "llama", "qwen2", "qwen3", "mistral", "opt", "gpt_neox", "gemma", "gemma2", "gemma3_text")
FURTHER = ("gemma3n_text", "jetmoe", "deepseek_v3", "falcon_h1", "bart", "phimoe")
RIGHT = "right"


def verdict(kind: str) -> str:
    """`RIGHT`, or the reason of the refusal. Fails if an accepted type computes something else than transformers."""
    model, own = causal_lms.make(kind), causal_lms.make(kind)
    try:
        base = load(model)
    except ConfigError as e:
        return "refused: " + reason(str(e))
    with base:
        found = one_by_one.compare(base, own)
    assert found.none, (kind, found)
    return RIGHT


def reason(message: str) -> str:
    """Reason of a refusal without numbers that depend on the machine, for one line of the table."""
    text = message.partition("): ")[2] or message
    text = re.sub(r" \(relative error [^)]*\)", "", text).removesuffix("; run it with transformers alone")
    first = re.match(r"its results differ from its own forward: (layer 0 [^;]*)", text)
    return (first[1] if first else text).replace("|", "\\|").replace("\n", " ")


@pytest.mark.parametrize("kind", [*FAST, *FURTHER])
def test_a_type_is_right_or_refused(kind):
    found = verdict(kind)
    assert found == RIGHT or kind in FURTHER
    assert f"| `{kind}` | {found} |" in PAGE.read_text(encoding="utf8")


def test_the_page_has_every_type_once():
    [table] = BLOCK.findall(PAGE.read_text(encoding="utf8"))
    rows = re.findall(r"^\| `([\w-]+)` \| (right|refused: .+|not built: .+) \|$", table, re.M)
    assert [kind for kind, _ in rows] == sorted(causal_lms.TYPES)
    assert {kind for kind, found in rows if found.startswith("not built")} == set(causal_lms.NOT_BUILT)
    assert len(causal_lms.NOT_BUILT) <= 3


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_type_is_right_or_refused_as_the_page_says():
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    found, wrong = {}, []
    for kind in sorted(causal_lms.TYPES):
        try:
            built = kind not in causal_lms.NOT_BUILT
            found[kind] = verdict(kind) if built else f"not built: {causal_lms.NOT_BUILT[kind]}"
        except AssertionError as e:
            wrong.append(str(e).splitlines()[0])
    logging.disable(logging.NOTSET)
    assert wrong == []
    text = PAGE.read_text(encoding="utf8")
    counts = [sum(v.startswith(k) for v in found.values()) for k in (RIGHT, "refused", "not built")]
    table = (
        f"transformers {transformers.__version__}: {counts[0]} types are right, {counts[1]} are refused, {counts[2]} "
        "are not built by the test.\n\n| type | result |\n| --- | --- |\n"
    ) + "".join(f"| `{kind}` | {found[kind]} |\n" for kind in sorted(found))
    if os.environ.get("PREFIXFAST_WRITE_MODELS"):
        PAGE.write_text(BLOCK.sub(lambda _: table, text), encoding="utf8")
    elif (match := BLOCK.search(text)) is None or match[0] != table:
        pytest.fail(f"docs/models.md differs from what was found; write it with PREFIXFAST_WRITE_MODELS=1\n{table}")
