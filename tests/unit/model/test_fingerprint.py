"""What a fingerprint tells apart, what it does not, and how long it takes."""

from __future__ import annotations

import copy
import logging
import time

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import tiny
from prefixfast import BaseMismatchError, check_fits, load
from prefixfast.model import fingerprint
from prefixfast.model.fingerprint import check_base
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


def test_a_large_vocabulary_and_many_layers_take_little_time():
    """The tokenizer's own description of 150,000 tokens alone would take longer."""
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
    check_base(prints[0], prints[1], "it")


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_other_weights_of_the_same_shape_are_refused(family):
    ours, other = make(tiny.make(family), None), make(tiny.make(family, seed=1), None)
    assert ours["config"] == other["config"]
    with pytest.raises(
        BaseMismatchError,
        match="it was made for base 'unknown', not for 'this model': weights differ; load the base it was trained on",
    ):
        check_base(ours, other, "it")
    check_base(ours, make(tiny.make(family), None), "it")


def test_another_tokenizer_is_a_warning_once(base, caplog, make_prefix):
    other = {**base.fingerprint, "tokenizer": "0" * 64}
    with caplog.at_level(logging.WARNING, "prefixfast"):
        for _ in range(3):
            check_fits(base, make_prefix(base=other))
        assert [r.message for r in caplog.records] == [
            "the prefix was made with another tokenizer than this base has: texts may become other tokens than in training"
        ]
        check_fits(base, make_prefix(base={**other, "tokenizer": "1" * 64}))
        assert len(caplog.records) == 2


@pytest.mark.parametrize("there", [None, {}, {"name": "x"}, {"tokenizer": None}], ids=str)
def test_what_is_not_known_is_no_difference(base, caplog, make_prefix, there):
    with caplog.at_level(logging.WARNING, "prefixfast"):
        check_fits(base, make_prefix(base=there))
    assert caplog.records == []


def digest(tokenizer: PreTrainedTokenizerFast) -> str:
    return Tokenizer.from_hf(tokenizer).digest_text


def test_use_of_a_tokenizer_does_not_change_its_fingerprint(tokenizer):
    """Padding and truncation are written into its own description, and stay there."""
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
