"""`allow_base_mismatch="quantized"`: a prefix runs on a quantized copy of its base, and on nothing else."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from prefixfast import BaseMismatchError, ConfigError, Engine, Prefix, generate, load, score, train
from prefixfast.model import quantized_copy
from quantized import quantized_llama, write_gguf

PROMPT, TARGET = list(range(3, 20)), [20, 21]
ALLOWED = {"allow_base_mismatch": "quantized"}


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(quantized_copy, "_WARNED", set())


@pytest.fixture(scope="module")
def prefix() -> Prefix:
    with load(tiny.make("llama", dtype=torch.bfloat16)) as base:
        return Prefix.from_text(base, PROMPT)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "copy.gguf"
    write_gguf(path, tiny.make("llama"), tokenizer, quantized=True)
    return path


def copies(gguf_file: Path) -> dict[str, Any]:
    return {"gguf Q8_0": gguf_file, "Int8": quantized_llama()}


@pytest.mark.parametrize("kind", ["gguf Q8_0", "Int8"])
def test_a_quantized_copy_is_refused_unless_it_is_allowed(prefix, gguf_file, kind):
    with (
        load(copies(gguf_file)[kind], dtype="float32") as base,
        pytest.raises(BaseMismatchError, match=rf"weights differ.*allow_base_mismatch='quantized'.*{kind}"),
    ):
        generate([PROMPT], prefix, model=base)


@pytest.mark.parametrize("kind", ["gguf Q8_0", "Int8"])
def test_outputs_of_a_copy_say_so(prefix, gguf_file, kind, caplog):
    with load(copies(gguf_file)[kind], dtype="float32", **ALLOWED) as base:
        assert base.quantization == kind
        own = Prefix.from_text(base, PROMPT)
        with caplog.at_level(logging.WARNING):
            made = generate([PROMPT] * 3, [prefix, own, None], model=base, max_new_tokens=3)
            scores = score([PROMPT] * 3, [prefix, own, [own, prefix]], targets=[TARGET] * 3, model=base)
        assert [g.base_mismatch for g in made] == ["quantized", None, None]
        assert [s.base_mismatch for s in scores] == ["quantized", None, "quantized"]
        assert made[0].prefix_digest == scores[0].prefix_digest == prefix.digest
        close = score([PROMPT], own, targets=[TARGET], model=base)[0]
        assert scores[0].logprob == pytest.approx(close.logprob, abs=0.2)  # own keys and values are those of the copy
        with Engine(base, max_num_seqs=1, max_model_len=32) as engine:
            assert kind in engine.explain()["weights"]
    warned = [r.getMessage() for r in caplog.records if "other weights" in r.getMessage()]
    assert len(warned) == 1  # once for a pair of bases
    assert kind in warned[0]


NO_COPIES = {
    "another training": (lambda: quantized_llama(seed=1), "sampled matrices differ"),
    "trained norms": (lambda: quantized_llama(lambda m: m.model.norm.weight.mul_(1.1)), "sampled vectors differ"),
    "large updates": (
        lambda: quantized_llama(
            lambda m: [p.add_(torch.randn_like(p) * p.std()) for p in m.parameters() if p.dim() > 1]
        ),
        "sampled matrices differ",
    ),
    "not quantized": (lambda: tiny.make("llama", seed=1), "not known to be quantized"),
    "another architecture": (lambda: tiny.make("qwen3"), "model_type"),
}


@pytest.mark.parametrize("kind", NO_COPIES)
def test_other_bases_are_refused(prefix, kind):
    make, reason = NO_COPIES[kind]
    with load(make(), **ALLOWED) as base, pytest.raises(BaseMismatchError, match=reason):
        generate([PROMPT], prefix, model=base)


def test_a_base_of_another_size_is_refused(prefix, gguf_file):
    config = {**prefix.base["config"], "num_hidden_layers": 30}
    other = Prefix(prefix.kv, **{**prefix.fields, "base": {**prefix.base, "config": config}})
    with (
        load(gguf_file, dtype="float32", **ALLOWED) as base,
        pytest.raises(BaseMismatchError, match="num_hidden_layers"),
    ):
        generate([PROMPT], other, model=base)


def without_sample(prefix: Prefix) -> Prefix:
    base = {k: v for k, v in prefix.base.items() if k != "sample"}
    return Prefix(prefix.kv, **{**prefix.fields, "base": base})


def test_a_prefix_with_a_digest_only_is_accepted_with_a_warning_of_what_was_not_checked(prefix, gguf_file, caplog):
    with load(gguf_file, dtype="float32", **ALLOWED) as base, caplog.at_level(logging.WARNING):
        assert generate([PROMPT], without_sample(prefix), model=base, max_new_tokens=2)[0].base_mismatch == "quantized"
    assert "its weights were not compared" in caplog.text


@pytest.mark.parametrize("text", ["", "AAAA", "not base64", "/" * 24])
def test_a_damaged_sample_is_refused(prefix, gguf_file, text):
    sample = {k: dict.fromkeys(named, text) for k, named in prefix.base["sample"].items()}
    damaged = Prefix(prefix.kv, **{**prefix.fields, "base": {**prefix.base, "sample": sample}})
    with load(gguf_file, dtype="float32", **ALLOWED) as base, pytest.raises(BaseMismatchError, match="differ by"):
        generate([PROMPT], damaged, model=base)


def test_training_goes_on_from_a_prefix_of_the_original(prefix, gguf_file):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]
    with load(gguf_file, dtype="float32", **ALLOWED) as base:
        trained = train(base, rows, init=prefix, max_steps=1)
        assert trained.base == base.fingerprint
        assert generate([PROMPT], trained, model=base, max_new_tokens=1)[0].base_mismatch is None


def test_a_base_by_name_takes_the_option(prefix, gguf_file):
    how = {"model": str(gguf_file), "dtype": "float32", "max_new_tokens": 2}
    assert generate([PROMPT], prefix, **how, **ALLOWED)[0].base_mismatch == "quantized"
    with pytest.raises(BaseMismatchError):
        generate([PROMPT], prefix, **how)


def test_the_option_is_one_word_and_belongs_to_the_load(gguf_file):
    for wrong in ("all", "ignore", True, ["quantized"]):
        with pytest.raises(ConfigError, match="allow_base_mismatch"):
            load(gguf_file, allow_base_mismatch=wrong)
        with pytest.raises(ConfigError, match="allow_base_mismatch"):
            generate([PROMPT], model=str(gguf_file), allow_base_mismatch=wrong)
    with load(tiny.make("llama")) as base:
        with pytest.raises(ConfigError, match="load it again"):
            load(base, **ALLOWED)
        with pytest.raises(ConfigError, match="load it again"):
            generate([PROMPT], model=base, **ALLOWED)


def test_the_command_line_writes_the_mismatch(cli, prefix, gguf_file, tmp_path):
    prefix.save_pretrained(tmp_path / "p")
    (tmp_path / "in.jsonl").write_text('{"input_ids": [3, 4], "labels": [-100, 4]}\n', encoding="utf8")
    how = ("--prefix", tmp_path / "p", "--model", gguf_file, "--dtype", "float32")
    for command in ("generate", "score"):
        out = tmp_path / f"{command}.jsonl"
        refused = cli(command, tmp_path / "in.jsonl", "-o", out, *how)
        assert refused.code == 1
        assert "allow_base_mismatch" in refused.err
        done = cli(command, tmp_path / "in.jsonl", "-o", out, *how, "--allow-base-mismatch", "quantized")
        assert done.code == 0, done.err
        assert '"base_mismatch": "quantized"' in out.read_text(encoding="utf8")
    shown = cli("doctor", gguf_file, "--dtype", "float32")
    assert "quantized: gguf Q8_0" in shown.out
