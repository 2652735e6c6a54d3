"""Prefixes of texts, composition and inspection on encoder-decoder bases, against unmodified models of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import seq2seq
from prefixfast import BaseMismatchError, ConfigError, Prefix, RequestError, check_fits, load
from prefixfast.config.sites import SITES
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


def test_an_infix_is_refused_by_name(models):
    base, hf = models
    infix = Prefix(random_prefix(hf, {"self": 5}, pos_start=5).kv, pos_start=5, position="infix")
    with pytest.raises(BaseMismatchError, match="is an infix, which this base does not take"):
        check_fits(base, infix)


# ---- inspection ----

LENGTHS = {"enc": 3, "self": 5, "cross": 2}


def oracle_mass(hf: Any, prefix: Prefix, source: torch.Tensor, decoder: torch.Tensor) -> dict[str, torch.Tensor]:
    """Attention mass ``[L, HQ, T]`` on the prefix rows by site, from the weights of the brute-force attention."""
    found: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}
    own = torch.Tensor.softmax

    def softmax(scores: torch.Tensor, dim: int) -> torch.Tensor:
        weights = own(scores, dim)
        if scores.dim() == 4:
            order.append(weights[0])
        return weights

    order: list[torch.Tensor] = []
    with torch.no_grad(), seq2seq.oracle(hf, prefix), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "softmax", softmax)
        hf(input_ids=source[None], decoder_input_ids=decoder[None], use_cache=False)
    modules = seq2seq.attention_modules(hf)
    names = ["enc"] * len(modules["enc"]) + ["self", "cross"] * len(modules["self"])
    for site, weights in zip(names, order, strict=True):
        found[site].append(weights[..., : prefix.length_at(site)].sum(-1))
    return {site: torch.stack(own) for site, own in found.items()}


def test_mass_and_divergence_equal_those_of_brute_force(models):
    base, hf = models
    prefix = random_prefix(hf, LENGTHS, pos_start=5)
    start = base.seq2seq.start
    rows = [
        {"input_ids": SOURCE.tolist(), "labels": TARGET.tolist()},
        {"input_ids": MORE.tolist(), "labels": RULES.tolist()},
    ]
    found = prefix.inspect(base, [*rows, RULES.tolist()], words=0)
    pairs = [(SOURCE, [start, *TARGET[:-1].tolist()]), (MORE, [start, *RULES[:-1].tolist()]), (RULES, [start])]
    masses = [oracle_mass(hf, prefix, source, torch.tensor(decoder)) for source, decoder in pairs]
    for site in SITES:
        expected = torch.cat([mass[site] for mass in masses], -1).mean(-1)
        assert found.sites[site].mass.shape == expected.shape
        assert (found.sites[site].mass - expected).abs().max() < 1e-5
        assert 0.01 < expected.mean() < 0.99
    for (source, decoder), got in zip(pairs, found.divergence, strict=True):
        with torch.no_grad():
            p, q = (
                seq2seq.logits_of(hf, source, torch.tensor(decoder), kv, at).double().log_softmax(-1)
                for kv, at in ((dict(prefix.kv), 5), ({}, 0))
            )
        expected = (p.exp() * (p - q)).sum(-1)
        assert got.shape == expected.shape == (len(decoder),)
        assert ((got - expected).abs() / expected.clamp_min(1)).max() < 1e-4
    assert found.length == prefix.length
    assert list(found.sites) == list(SITES)
    assert found.mass is found.sites["self"].mass
    encoder = Prefix({n: t for n, t in prefix.kv.items() if n.startswith("enc")}, pos_start=0)
    at_encoder = encoder.inspect(base, rows, words=0)
    assert list(at_encoder.sites) == ["enc"]
    with pytest.raises(ConfigError, match="enc"):
        _ = at_encoder.mass


def test_words_of_a_text_are_its_tokens(models, tmp_path):
    base, hf = models
    text = Prefix.from_text(base, RULES.tolist())
    found = text.inspect(base, [SOURCE.tolist()], words=2)
    assert {site: [*one.words] for site, one in found.sites.items()} == {"enc": list(range(len(RULES))), "cross": []}
    for row, near in found.sites["enc"].words.items():
        assert near[0][0] == f"#{int(RULES[row])}"
        assert near[0][1] == pytest.approx(1, abs=1e-4)
    shown = str(found)
    for words in (
        "attention mass of encoder self-attention on the prefix",
        "attention mass of cross-attention on the prefix",
        "words of 7 of 7 rows of encoder self-attention",
        "rows of cross-attention have no words",
    ):
        assert words in " ".join(shown.split())
    found.plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000
    rows = random_prefix(hf, LENGTHS, pos_start=5).inspect(base, [SOURCE.tolist()], words=1, rows=[0, 4]).sites
    assert {site: [*one.words] for site, one in rows.items()} == {"enc": [0], "self": [0, 4], "cross": []}
    cross = random_prefix(hf, {"cross": 2}, pos_start=0)
    assert cross.inspect(base, [SOURCE.tolist()]).sites["cross"].words == {}


def test_decoder_rows_are_compared_with_keys_at_their_positions(models):
    base, hf = models
    tokens = RULES[:3]
    found: dict[str, torch.Tensor] = {}
    module = seq2seq.attention_modules(hf)["self"][0]
    projection = getattr(module, "k_proj", None) or module.k
    hook = projection.register_forward_hook(lambda _, __, out: found.update(k=out[0]))
    with torch.no_grad():
        hf(input_ids=SOURCE[None], decoder_input_ids=tokens[None], use_cache=False)
    hook.remove()
    prefix = random_prefix(hf, {"self": 3}, pos_start=3)
    kv = {**prefix.kv, "self.0.k": found["k"].unflatten(-1, seq2seq.heads(module))}
    words = Prefix(kv, pos_start=3).inspect(base, [SOURCE.tolist()], words=1).words
    assert [words[i][0][0] for i in range(3)] == [f"#{int(t)}" for t in tokens]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5] * 65, "at most 64 tokens for the encoder, got 65"),
        ({"input_ids": [5], "labels": [6] * 61}, "expected 1 to 59 tokens"),
        ({"messages": [{"role": "user", "content": "a"}]}, "prompt 0"),
        ([500], "prompt 0"),
    ],
)
def test_wrong_prompts_of_an_inspection_are_refused(prompt, message):
    hf = seq2seq.make_seq2seq("bart")
    prefix = random_prefix(hf, {"self": 5}, pos_start=5)
    with load(hf) as base, pytest.raises((RequestError, ConfigError), match=message):
        prefix.inspect(base, [prompt])
