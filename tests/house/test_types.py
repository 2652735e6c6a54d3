"""Types for users: mypy accepts and rejects scripts as it should, and no result on docs/api.md is Any."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oracles import ROOT

HEADER = "import prefixfast\nfrom prefixfast import *\nfrom prefixfast import load, train, generate, score\n"
START = """
from pathlib import Path
rows = [{"prompt": "2+2=", "completion": "4"}]
base = load("tiny-gpt2")
"""
FINE = {
    "rows give a prefix": 'train(base, rows).save_pretrained("mill")',
    "a file gives a prefix": 'train("gpt2", "rows.jsonl", prefix_length=4, learning_rate=1e-3).digest',
    "a mapping gives a run": 'train(base, {"ann": rows})["ann"].save_pretrained("ann")',
    "a folder gives a run": 'train("gpt2", Folder("users"), eval_data=Folder(Path("held-out")))["ann"].digest',
    "a column gives a run": 'train(base, rows, prefix_column="user").failed',
    "a sweep gives a run": 'train(base, rows, sweep={"learning_rate": [1e-3, 1e-2]}).best().save_pretrained("best")',
    "options as a dataclass": "train(base, rows, config=TrainConfig(max_steps=1), prefix_config=PrefixConfig())",
    "weights": 'train(base, rows, method="full").save_pretrained("w")',
    "weights generate": 'generate(["a"], train(base, rows, method="lora", lora_rank=4), model=base)[0].text.upper()',
    "texts": 'generate(["a", {"prompt": "b"}, [1, 2]], [None, train(base, rows), None], model=base)[0].text.upper()',
    "generation options": 'generate(["a"], model=base, num_beams=2, max_new_tokens=3)[0].token_ids.sort()',
    "a store": 'PrefixStore("s").info("ann").digest.upper()',
    "scores": 'score(["a"], targets=["b"], model=base)[0].logprob.is_integer()',
    "an engine": 'with Engine(base, max_num_seqs=4) as engine: engine.submit("a", top_k=2).result().text.upper()',
    "a stream": 'for piece in Engine(base).stream("a"): piece.upper()',
    "an inspection": 'train(base, rows).inspect(base, ["a"]).mass.shape',
}
WRONG = {
    "a misspelt option": "train(base, rows, prefix_lenght=3)",
    "an option of another library": 'generate(["a"], model=base, max_tokens=3)',
    "an option of the wrong type": 'train(base, rows, max_steps="many")',
    "a run is no prefix": 'train(base, {"ann": rows}).save_pretrained("x")',
    "weights have no rows": 'train(base, rows, method="full").kv',
    "a prefix is no run": 'train(base, rows)["ann"]',
    "a result without such a field": 'generate(["a"], model=base)[0].txt',
    "one request without a list": 'generate({"prompt": "a"}, model=base)',
    "a misspelt engine option": "Engine(base, max_num_seq=4)",
}


def mypy(folder: Path, scripts: dict[str, str]) -> dict[str, list[str]]:
    """Lines that mypy prints for each script."""
    files = []
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf8")
        files.append(str(folder / f"{name}.py"))
    # Other options than those of lint would discard its cache, and mypy would read all packages again.
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--no-error-summary"]
    env = {"MYPYPATH": str(ROOT / "python"), "PATH": ""}
    done = subprocess.run([*command, *files], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return {name: [line for line in done.stdout.splitlines() if f"/{name}.py:" in line] for name in scripts}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What mypy says of every script, from one run."""
    scripts = {f"fine_{i}": HEADER + START + line for i, line in enumerate(FINE.values())}
    scripts |= {f"wrong_{i}": HEADER + START + line for i, line in enumerate(WRONG.values())}
    return mypy(tmp_path_factory.mktemp("scripts"), scripts)


@pytest.mark.parametrize("case", FINE)
def test_right_scripts_pass(case, found):
    assert [line for line in found[f"fine_{list(FINE).index(case)}"] if ": error:" in line] == []


@pytest.mark.parametrize("case", WRONG)
def test_wrong_scripts_fail(case, found):
    assert [line for line in found[f"wrong_{list(WRONG).index(case)}"] if ": error:" in line]


def revealing(page: str) -> str:
    """The page's examples as one script that reveals the type of every result."""
    lines = [HEADER]
    for example in doctest.DocTestParser().get_examples(page):
        source = example.source.rstrip("\n")
        try:
            compile(source, "example", "eval")
        except SyntaxError:
            lines.append(source)
            if name := re.match(r"([a-z_]\w*) = ", source):
                lines.append(f"reveal_type({name[1]})")
        else:
            lines.append(f"reveal_type({re.sub(r'  #.*$', '', source, flags=re.MULTILINE)})")
    return "\n".join(lines)


def test_no_result_on_the_page_is_any(tmp_path):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf8")
    (lines,) = mypy(tmp_path, {"page": revealing(page)}).values()
    revealed = [line.partition('Revealed type is "')[2].rstrip('"') for line in lines if "Revealed type" in line]
    assert len(revealed) > 50
    assert [line for line in lines if re.search(r'Revealed type is "(Any|builtins\.object)', line)] == []
