"""Suite ``generate`` on a tiny base: contenders agree, files are written, wrong tokens stop the suite."""

import json

import pytest
import torch

import tiny
from prefixfast import load
from prefixfast.bench import generate, random_base
from prefixfast.bench.contenders import Bases
from prefixfast.bench.generate import Settings, Workload, measure
from prefixfast.bench.generate_points import BY_HAND, ONE_BY_ONE, ONE_FOR_ALL, OURS
from prefixfast.bench.generate_report import plot, table
from prefixfast.bench.harness import WrongResultError
from prefixfast.bench.report import Report, write_report
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
        points = measure(Bases(model, make[1].eval()), [0, 4, 9], [1, 3], WORK, rounds=2, shown=False)
    names = {(p.key.contender, p.key.distinct, p.prefix_length) for p in points}
    assert {(OURS, 0, 0), (OURS, 1, 4), (OURS, 3, 9), (BY_HAND, 3, 9), (ONE_BY_ONE, 1, 9), (ONE_FOR_ALL, 1, 0)} <= names
    assert len(points) == 3 + 2 * 5
    text = table(points)
    assert text.splitlines()[0] == "| tokens/s | P=0 | P=4 | P=9 |"
    assert f"| {BY_HAND} |  | " in text
    assert text.count(" | ") == 3 * 7
    plot(points, tmp_path / "p.png", "a title")
    write_report(tmp_path / "r.html", Report("<b>", [("caption", text)], tmp_path / "p.png", "command"))
    page = (tmp_path / "r.html").read_text()
    assert page.count("<tr>") == 6
    assert "data:image/png;base64,iVBOR" in page
    assert "<h1>&lt;b&gt;</h1>" in page
    assert json.dumps([p.row() for p in points])


def test_wrong_tokens_stop_the_benchmark(monkeypatch):
    """A token of the last request, which only the mixed batches and the batch with one prefix contain."""
    right = generate._ours

    def wrong(*arguments):
        tokens = right(*arguments)
        tokens[-1][-1] = (tokens[-1][-1] + 1) % tiny.VOCAB
        return tokens

    monkeypatch.setattr(generate, "_ours", wrong)
    with (
        load(tiny.make("gpt2")) as model,
        pytest.raises(WrongResultError, match=r"P=4: prefixfast: token 4 of request 2 is .* no speed is reported"),
    ):
        measure(Bases(model, tiny.make("gpt2")), [4], [1], WORK, rounds=1, shown=False)


TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}


def settings(**fields):
    defaults = {"model": None, "shape": "gpt2", "dtype": "float32", "lengths": [0, 3], "distinct": [1, 2]}
    return Settings(**defaults | {"requests": [1, 2], "rounds": 1, "command": "the command"} | fields)


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_suite_writes_its_files(tmp_path, monkeypatch, capsys, rounds):
    monkeypatch.setattr(generate, "Workload", lambda requests=2: Workload(requests, 4, 3, 1))
    monkeypatch.setitem(random_base.SHAPES, "gpt2", random_base.SHAPES["gpt2"]._replace(fields=TINY))
    generate.run(tmp_path, settings(rounds=rounds))
    first, head, *rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert first["environment"]["cpu"]
    assert head["command"] == "the command"
    assert {r["requests"] for r in rows} == {1, 2}
    assert (tmp_path / "throughput.png").stat().st_size > 1000
    assert "the command" in (tmp_path / "report.html").read_text()
    assert all(r["settings"]["use_cache"] and r["settings"]["dtype"] == "float32" for r in rows)
    printed = capsys.readouterr()
    assert "2 requests: milliseconds a token of one request" in printed.out
    assert "| prefixfast | float32 | prefixfast, torch | True | 2 |" in printed.out
    assert ("spread" in printed.out) is (rounds > 1), "one round has no spread"
    assert printed.err.count("computing in float32 on cpu") == 1


def test_a_length_beyond_the_positions_of_the_base_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(random_base, "make", lambda *_: tiny.make("gpt2"))
    with pytest.raises(ConfigError, match="100, 40 prompt tokens and 32 new ones are 172 positions, this base has 160"):
        generate.run(tmp_path, settings(lengths=[0, 100]))
    assert random_base.LLAMA["max_position_embeddings"] >= 4096 + 72, "the help of --lengths says so"


def test_a_base_that_cannot_be_loaded_is_one_message(cli, tmp_path):
    done = cli("bench", "generate", "-o", tmp_path / "out", "--model", tmp_path / "nothing")
    assert done.code == 1
    assert "model: expected a hub id or a folder of a causal language model" in done.err
    assert not (tmp_path / "out").exists()
