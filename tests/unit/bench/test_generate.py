"""`prefixfast bench generate` on a tiny base: every contender agrees, the files are there, and wrong tokens stop it."""

import json

import pytest
import torch

import tiny
from prefixfast import load
from prefixfast.bench import generate
from prefixfast.bench.generate import BY_HAND, ONE_BY_ONE, ONE_FOR_ALL, OURS, Key, Workload, check, measure, plot, table
from prefixfast.bench.report import write_report
from prefixfast.errors import ConfigError

WORK = Workload(requests=3, prompt=6, new=5, one_by_one=2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_contenders_are_measured_on_equal_tokens(family, dtype, tmp_path):
    make = [tiny.make(family).to(dtype) for _ in "ab"]
    for base in make:  # with end tokens that would come soon
        base.generation_config.eos_token_id = list(range(tiny.VOCAB // 2)) if dtype == torch.float32 else None
        base.generation_config.pad_token_id = 0
    with load(make[0]) as model:
        points = measure(model, [0, 4, 9], [1, 3], WORK, rounds=2, plain=make[1].eval(), progress=False)
    names = {(p.key.contender, p.key.distinct, p.prefix_length) for p in points}
    assert {(OURS, 0, 0), (OURS, 1, 4), (OURS, 3, 9), (BY_HAND, 3, 9), (ONE_BY_ONE, 1, 9), (ONE_FOR_ALL, 1, 0)} <= names
    assert len(points) == 3 + 2 * 5
    text = table(points)
    assert text.splitlines()[0] == "| tokens/s | P=0 | P=4 | P=9 |"
    assert f"| {BY_HAND} |  | " in text
    assert text.count(" | ") == 3 * 7
    plot(points, tmp_path / "p.png", "a title")
    write_report(tmp_path / "r.html", "<b>", [("caption", text)], tmp_path / "p.png", {"cpu": "x"}, "command")
    page = (tmp_path / "r.html").read_text()
    assert page.count("<tr>") == 6
    assert "data:image/png;base64,iVBOR" in page
    assert "<h1>&lt;b&gt;</h1>" in page
    assert json.dumps([p.row() for p in points])


def test_wrong_tokens_stop_the_benchmark():
    good = torch.tensor([[1, 2, 3], [4, 5, 6]])
    calls = {Key(OURS, 2, 2): lambda: good, Key(BY_HAND, 2, 2): lambda: good, Key(ONE_BY_ONE, 1, 1): lambda: good[:1]}
    check(calls, 5)
    with pytest.raises(
        RuntimeError, match="PEFT, one request at a time gives other tokens than prefixfast from token 2 on"
    ):
        check(calls | {Key(ONE_BY_ONE, 1, 1): lambda: torch.tensor([[1, 2, 4]])}, 5)
    with pytest.raises(RuntimeError, match="mixed by hand"):
        check(calls | {Key(BY_HAND, 2, 2): lambda: torch.tensor([[1, 2, 3], [4, 5, 7]])}, 5)


def test_the_command_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "Workload", lambda requests=2: Workload(requests, 4, 3, 1))
    monkeypatch.setitem(
        generate.SHAPES,
        "gpt2",
        (*generate.SHAPES["gpt2"][:2], {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}, "tiny"),
    )
    how = {
        "model": None,
        "shape": "gpt2",
        "dtype": "float32",
        "lengths": [0, 3],
        "distinct": [1, 2],
        "requests": [1, 2],
        "rounds": 1,
        "command": "again",
    }
    generate.run(tmp_path, **how)
    head, *rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()][1:]
    assert head["command"] == "again"
    assert {r["requests"] for r in rows} == {1, 2}
    assert (tmp_path / "throughput.png").stat().st_size > 1000
    assert "again" in (tmp_path / "report.html").read_text()
    assert "2 requests: milliseconds a token of one request" in capsys.readouterr().out


def test_a_length_that_the_base_has_no_positions_for_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "make", lambda *_: tiny.make("gpt2"))
    how = {
        "model": None,
        "shape": "gpt2",
        "dtype": "float32",
        "distinct": [1],
        "requests": [2],
        "rounds": 1,
        "command": "",
    }
    with pytest.raises(ConfigError, match="100, 40 prompt tokens and 32 new ones are 172 positions, this base has 160"):
        generate.run(tmp_path, lengths=[0, 100], **how)
    longest = max(generate.SHAPES["llama"][2]["max_position_embeddings"] - 72, 0)
    assert longest >= 4096, "what the option's help promises"
