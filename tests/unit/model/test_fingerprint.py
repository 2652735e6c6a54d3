"""Fingerprints of base models: which differences they show, which they do not, and their time."""

from __future__ import annotations

import copy
import json
import logging
import time
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import tiny
from prefixfast import BaseMismatchError, check_fits, load
from prefixfast.model import fingerprint
from prefixfast.model.fingerprint import check_same_base
from prefixfast.model.fingerprint import fingerprint as make
from prefixfast.model.tokenizer import Tokenizer

LIMIT = 0.05  # seconds


def quickest(work) -> float:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(fingerprint, "_WARNED", set())


def large_tokenizer(size: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(alphabet)} | {
        f"word{i}": i + len(alphabet) for i in range(size - len(alphabet))
    }
    core = Core(models.BPE(vocab, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.long  # measures time
def test_a_large_vocabulary_and_many_layers_take_little_time():
    """To serialize a tokenizer of 150,000 tokens alone takes longer than the limit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(LlamaConfig(**{**tiny.GROUPED, "vocab_size": 150_000, "num_hidden_layers": 60}))
    tokenizer = Tokenizer.from_hf(large_tokenizer(150_000))

    def work() -> None:
        tokenizer.__dict__.pop("digest_text", None)
        make(wide, tokenizer.digest_text)

    assert quickest(work) < LIMIT


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_base_is_the_same_in_fp32_and_bf16(family, tmp_path):
    tiny.make(family, dtype=torch.bfloat16).save_pretrained(tmp_path)
    prints = []
    for dtype in ("float32", "bfloat16"):
        from transformers import AutoModelForCausalLM

        prints.append(make(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)), None))
    assert prints[0] == prints[1]
    check_same_base(prints[0], prints[1], "it")


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_other_weights_of_the_same_shape_are_refused(family):
    ours, other = make(tiny.make(family), None), make(tiny.make(family, seed=1), None)
    assert ours["config"] == other["config"]
    with pytest.raises(
        BaseMismatchError,
        match="it was made for base 'unknown', not for 'this model': weights differ; load the base it was trained on",
    ):
        check_same_base(ours, other, "it")
    check_same_base(ours, make(tiny.make(family), None), "it")


def test_another_tokenizer_is_a_warning_once(base, caplog, make_prefix):
    other = {**base.fingerprint, "tokenizer": "0" * 64}
    with caplog.at_level(logging.WARNING, "prefixfast"):
        for _ in range(3):
            check_fits(base, make_prefix(base=other))
        assert [r.message for r in caplog.records] == [
            "the prefix was made with another tokenizer than that of this base: "
            "texts can become other tokens than in training"
        ]
        check_fits(base, make_prefix(base={**other, "tokenizer": "1" * 64}))
        assert len(caplog.records) == 2


@pytest.mark.parametrize("there", [None, {}, {"name": "x"}, {"tokenizer": None}], ids=str)
def test_unknown_parts_of_a_fingerprint_are_not_compared(base, caplog, make_prefix, there):
    with caplog.at_level(logging.WARNING, "prefixfast"):
        check_fits(base, make_prefix(base=there))
    assert caplog.records == []


def digest(tokenizer: PreTrainedTokenizerFast) -> str:
    return Tokenizer.from_hf(tokenizer).digest_text


def test_use_of_a_tokenizer_does_not_change_its_fingerprint(tokenizer):
    """Padding and truncation change the tokenizer's serialized form permanently."""
    used = copy.deepcopy(tokenizer)
    before, described = digest(used), used.backend_tokenizer.to_str()
    used(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert used.backend_tokenizer.to_str() != described
    assert digest(used) == before == digest(tokenizer)


def test_tokenizers_that_differ_have_other_fingerprints(tokenizer):
    more, another_end, lower = (copy.deepcopy(tokenizer) for _ in range(3))
    more.add_tokens(["<extra>"])
    another_end.eos_token = "<pad>"
    from tokenizers import normalizers

    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert len({digest(t) for t in (tokenizer, more, another_end, lower, large_tokenizer(1000))}) == 5


def test_the_fingerprint_of_a_loaded_base_has_all_its_parts(folder, base):
    with load(folder, dtype="float32") as again:
        assert again.fingerprint == base.fingerprint
    assert base.fingerprint["name"] == str(folder)
    assert all(base.fingerprint[k] for k in ("config", "tokenizer", "weights"))


def weights(**how: Any) -> str:
    with load(tiny.make("gpt2", **how)) as base:
        return base.fingerprint["weights"]


@pytest.mark.long  # measures time
def test_a_fingerprint_takes_little_time(base):
    assert quickest(lambda: make(base.hf, base.require_tokenizer().digest_text)) < LIMIT


def test_a_fingerprint_is_json(base):
    assert json.loads(json.dumps(base.fingerprint)) == base.fingerprint


def test_a_fingerprint_is_that_of_the_weights_in_any_dtype(folder, base):
    with load(folder, dtype="bfloat16") as other:
        assert {k: other.fingerprint[k] for k in ("config", "weights", "tokenizer")} == {
            k: base.fingerprint[k] for k in ("config", "weights", "tokenizer")
        }


def test_a_fingerprint_does_not_depend_on_the_attachment(base):
    assert make(tiny.make("gpt2"), None)["weights"] == base.fingerprint["weights"]


def test_other_weights_have_another_fingerprint():
    assert weights(seed=1) != weights(seed=0) == weights(seed=0)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "transformer.h.0.attn.c_attn.weight",
        "transformer.h.2.mlp.c_proj.weight",
        "transformer.ln_f.bias",
    ],
)
def test_a_fine_tuned_part_changes_the_fingerprint(name):
    model = tiny.make("gpt2")
    before = make(model, None)["weights"]
    with torch.no_grad():
        model.get_parameter(name).mul_(1.05)
    assert make(model, None)["weights"] != before


def test_another_architecture_has_another_configuration(base):
    with load(tiny.make("llama")) as other:
        assert other.fingerprint["config"] != base.fingerprint["config"]
