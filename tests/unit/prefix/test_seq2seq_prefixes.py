"""Prefixes of texts, composition and inspection on encoder-decoder bases, against unmodified models of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import seq2seq
from prefixfast import BaseMismatchError, ConfigError, Prefix, check_fits, load
from seq2seq import FAST, random_prefix, random_texts
from sites import packed_logits

SOURCE, TARGET, RULES, MORE = random_texts([9, 6, 7, 4], seed=5)


@pytest.fixture(scope="module", params=FAST)
def models(request) -> Iterator[tuple[Any, Any]]:
    """A base, and the same model as transformers has it."""
    hf = seq2seq.make_seq2seq(request.param)
    with load(seq2seq.make_seq2seq(request.param)) as base:
        yield base, hf


def projected(hf: Any, encoder_ids: torch.Tensor, prefix: Prefix | None) -> dict[str, torch.Tensor]:
    """Keys and values that the encoder and cross-attention compute of a text, by the names of a prefix's tensors."""
    found: dict[str, torch.Tensor] = {}
    hooks = []
    for site, modules in seq2seq.attention_modules(hf).items():
        for i, module in enumerate(modules):
            for x in "kv":
                projection = getattr(module, f"{x}_proj", None) or getattr(module, x)
                name, heads = f"{site}.{i}.{x}", seq2seq.heads(module)
                hooks.append(
                    projection.register_forward_hook(
                        lambda _, __, out, name=name, heads=heads: found.update({name: out[0].unflatten(-1, heads)})
                    )
                )
    with torch.no_grad(), seq2seq.oracle(hf, prefix):
        hf(input_ids=encoder_ids[None], decoder_input_ids=torch.tensor([[2]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: t for name, t in found.items() if not name.startswith("self")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=1e-4, rtol=1e-4) for n in a)


def test_a_text_of_the_encoder_becomes_a_prefix(models):
    base, hf = models
    rules = Prefix.from_text(base, RULES.tolist())
    assert (rules.sites, rules.length, rules.pos_start) == (("enc", "cross"), len(RULES), 0)
    assert same(dict(rules.kv), projected(hf, RULES, None))
    check_fits(base, rules)
    after = Prefix.from_text(base, MORE.tolist(), after=rules)
    assert same(dict(after.kv), projected(hf, MORE, rules))
    assert not same(dict(after.kv), projected(hf, MORE, None))
    assert after.training["after"] == [rules.digest]
    cut = Prefix.from_text(base, RULES.tolist(), prefix_length=3)
    assert same(dict(cut.kv), projected(hf, RULES[:3], None))
    with torch.no_grad():
        expected = seq2seq.logits_of(hf, SOURCE, TARGET, dict(rules.concat(after).kv), 0)
    assert torch.allclose(packed_logits(base, [rules, after], SOURCE, TARGET), expected, atol=1e-4)
    with pytest.raises(ConfigError, match="reads no conversations"):
        Prefix.from_text(base, [{"role": "user", "content": "a"}])


def test_a_text_longer_than_the_encoder_is_refused():
    with (
        load(seq2seq.make_seq2seq("bart")) as base,
        pytest.raises(ConfigError, match="at most 64, the number of posit"),
    ):
        Prefix.from_text(base, RULES.tolist(), prefix_length=65)


@pytest.mark.parametrize("first", [("enc", "self"), ("self",), ("cross",)], ids=",".join)
def test_a_concatenation_equals_the_composition(models, first):
    base, hf = models
    lengths = {"enc": 3, "self": 5, "cross": 2}
    a = random_prefix(hf, {s: lengths[s] for s in first}, pos_start=5 if "self" in first else 0)
    b = random_prefix(hf, {"self": 4, "cross": 1, "enc": 2}, pos_start=4, seed=1)
    joined = a.concat(b)
    with torch.no_grad():
        expected = seq2seq.logits_of(hf, SOURCE, TARGET, dict(joined.kv), joined.pos_start)
    for prefixes in ([a, b], [joined]):
        assert torch.allclose(packed_logits(base, prefixes, SOURCE, TARGET), expected, atol=1e-4)
    assert not torch.allclose(packed_logits(base, [a], SOURCE, TARGET), expected, atol=1e-2)


def test_a_prefix_carries_the_fingerprint_of_its_base(models, tmp_path):
    base, _ = models
    prefix = Prefix.from_text(base, RULES.tolist())
    assert prefix.base["config"]["is_encoder_decoder"] is True
    assert prefix.requires["prefixfast"] == ">0.1.0"
    prefix.save_pretrained(tmp_path / "p")
    check_fits(base, Prefix.from_pretrained(tmp_path / "p"))
    config = {**prefix.base["config"], "decoder_layers": 7, "num_decoder_layers": 7}
    with pytest.raises(BaseMismatchError, match="decoder_layers is 7 there"):
        check_fits(base, Prefix(prefix.kv, pos_start=0, base={**prefix.base, "config": config}))
