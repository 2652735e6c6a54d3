"""Prefixes made from texts compared to the base model, and concatenated prefixes compared to their composition."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny
from composed import error, logits
from prefixfast import BaseMismatchError, ConfigError, Prefix, generate, load
from prefixfast.model.text_kv import text_kv

TEXT, PROMPT = list(range(20, 37)), list(range(50, 59))  # longer than the tiny models' sliding window
FAMILIES = ("gpt2", "llama", "qwen3", "mistral", "gemma3", "opt", "gpt_neox")


@pytest.fixture(scope="module", params=FAMILIES)
def any_base(request):
    with load(tiny.make(request.param)) as base:
        yield base


def other(model, seed: int, length: int = 5, **fields) -> Prefix:
    """Random prefix for a base model, with large numbers."""
    g = torch.Generator().manual_seed(seed)
    shapes = {f"self.{i}.{x}": (length, s.num_kv_heads, s.head_dim) for i, s in enumerate(model.layers) for x in "kv"}
    return Prefix(
        {n: torch.randn(s, generator=g) for n, s in shapes.items()},
        **{"pos_start": length, "base": model.fingerprint, **fields},
    )


def test_a_prefix_from_a_text_equals_the_text_before_the_prompt(any_base):
    prefix = Prefix.from_text(any_base, TEXT)
    assert (prefix.length, prefix.pos_start, prefix.window) == (len(TEXT), len(TEXT), "slide")
    assert error(logits(any_base, PROMPT, [prefix]), logits(any_base, TEXT + PROMPT)[len(TEXT) :]) < 1e-5
    assert error(logits(any_base, PROMPT), logits(any_base, TEXT + PROMPT)[len(TEXT) :]) > 1e-2


def test_a_text_after_another_prefix_sees_it(any_base):
    first = other(any_base, 1)
    second = Prefix.from_text(any_base, TEXT, after=first)
    assert second.pos_start == first.pos_start + len(TEXT)
    assert second.training["after"] == [first.digest]
    expected = logits(any_base, TEXT + PROMPT, [first])[len(TEXT) :]
    assert error(logits(any_base, PROMPT, [first, second]), expected) < 1e-5
    blind = Prefix.from_text(any_base, TEXT)
    assert error(logits(any_base, PROMPT, [first, blind]), expected) > 1e-3


def test_a_text_after_several_prefixes_whose_positions_differ(any_base):
    before = [other(any_base, 1, 6), other(any_base, 2, 3, pos_start=0)]
    last = Prefix.from_text(any_base, TEXT, after=before)
    assert last.pos_start == 6 + len(TEXT)
    assert error(logits(any_base, PROMPT, [*before, last]), logits(any_base, TEXT + PROMPT, before)[len(TEXT) :]) < 1e-5


def test_concatenated_prefixes_equal_their_composition(any_base):
    a, b = other(any_base, 1, 6), other(any_base, 2, 9)
    c = Prefix.from_text(any_base, TEXT, after=[a, b])
    for parts in ((a, b), (b, a), (a, b, c)):
        joined = parts[0].concat(*parts[1:])
        assert (joined.length, joined.pos_start) == (sum(p.length for p in parts), max(p.pos_start for p in parts))
        assert error(logits(any_base, PROMPT, [joined]), logits(any_base, PROMPT, parts)) < 1e-5
    assert error(logits(any_base, PROMPT, [a.concat(b)]), logits(any_base, PROMPT, [a])) > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generated_tokens_are_those_of_text_and_prompt(family):
    with load(tiny.make(family)) as base:
        prefix, how = Prefix.from_text(base, TEXT), {"model": base, "max_new_tokens": 12}
        a, b = other(base, 1), other(base, 2, 7)
        assert generate([PROMPT], prefix, **how)[0].token_ids == generate([TEXT + PROMPT], **how)[0].token_ids
        assert generate([PROMPT], a.concat(b), **how)[0].token_ids == generate([PROMPT], [[a, b]], **how)[0].token_ids


def test_a_length_repeats_or_cuts_the_text(base):
    for length in (3, 40):
        prefix = Prefix.from_text(base, TEXT, prefix_length=length)
        kv = text_kv(base, TEXT, length)
        assert prefix.length == prefix.pos_start == length
        assert all(
            torch.equal(prefix.kv[f"self.{i}.{x}"], t)
            for i, pair in enumerate(kv)
            for x, t in zip("kv", pair, strict=True)
        )


def test_a_text_is_tokenized_as_a_prompt_is(base):
    text = "Café £5"
    ids = base.require_tokenizer().encode([text])[0].tolist()
    assert Prefix.from_text(base, text).digest == Prefix.from_text(base, ids).digest


def test_a_text_is_not_kept(base):
    prefix = Prefix.from_text(base, "a secret of 27 letters")
    assert "secret" not in repr([prefix.base, prefix.training, prefix.task, prefix.decoding])


def test_the_model_may_be_a_name(folder, base):
    assert Prefix.from_text(folder, TEXT).kv["self.2.v"].shape == Prefix.from_text(base, TEXT).kv["self.2.v"].shape


def test_a_prefix_from_a_text_is_a_peft_adapter(base, tmp_path):
    prefix = Prefix.from_text(base, TEXT)
    prefix.to_peft(tmp_path / "p")
    assert Prefix.from_pretrained(tmp_path / "p").digest == prefix.digest


CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant{% endif %}"
)


@pytest.fixture
def chat_base(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = CHAT + "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    with load(tiny.make("gpt2"), tokenizer=own) as base:
        yield base


def test_messages_go_through_the_chat_template(chat_base):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = "<s>system: Be brief.</s><s>user: Hi</s>"
    assert Prefix.from_text(chat_base, messages).digest == Prefix.from_text(chat_base, text).digest
    ids = chat_base.require_tokenizer().encode([text])[0].tolist()
    assert ids[0] == 1  # one begin token, from the template
    assert (
        error(
            logits(chat_base, PROMPT, [Prefix.from_text(chat_base, messages)]),
            logits(chat_base, ids + PROMPT)[len(ids) :],
        )
        < 1e-5
    )


WRONG_TEXTS = {
    "empty": "",
    "no tokens": [],
    "a number": 5,
    "None": None,
    "token of another vocabulary": [tiny.VOCAB],
    "negative token": [-1],
    "true": [True],
    "mixed": [3, "a"],
    "message without content": [{"role": "user"}],
    "message without role": [{"content": "x"}],
    "what the template refuses": [{"role": "tool", "content": "x"}],
}


@pytest.mark.parametrize("text", WRONG_TEXTS.values(), ids=WRONG_TEXTS)
def test_a_wrong_text_is_refused(chat_base, text):
    with pytest.raises(ConfigError, match=r"^text: "):
        Prefix.from_text(chat_base, text)


@pytest.mark.parametrize("length", [0, -1, 1.5, True, "10"])
def test_a_wrong_length_is_refused(base, length):
    with pytest.raises(ConfigError, match="prefix_length: expected a number of at least 1 or None"):
        Prefix.from_text(base, TEXT, prefix_length=length)


def test_messages_without_a_template_are_refused(base):
    with pytest.raises(ConfigError, match="no chat template"):
        Prefix.from_text(base, [{"role": "user", "content": "Hi"}])


def test_a_text_beyond_the_positions_is_refused(base):
    assert Prefix.from_text(base, TEXT, prefix_length=159).length == 159
    with pytest.raises(ConfigError, match="160 rows after position 0 leave no room in the base's 160 positions"):
        Prefix.from_text(base, TEXT, prefix_length=160)
    with pytest.raises(ConfigError, match="150 rows after position 10"):
        Prefix.from_text(base, TEXT, prefix_length=150, after=other(base, 1, 10))


def test_a_text_after_a_prefix_of_another_base_is_refused(base):
    with load(tiny.make("gpt2", seed=1)) as second, pytest.raises(BaseMismatchError, match="after: prefix 0"):
        Prefix.from_text(second, TEXT, after=other(base, 1))
    with pytest.raises(ConfigError, match="after: expected a Prefix"):
        Prefix.from_text(base, TEXT, after=["mill"])


# ---- concat ----


def test_attributes_of_concatenated_prefixes(base):
    a = other(
        base, 1, decoding={"num_beams": 2, "max_new_tokens": 5}, task={"name": "prompt"}, training={"num_trained": 3}
    )
    b = other(base, 2, decoding={"num_beams": 4}, base={"name": "x/y"}, training={"num_trained": 4})
    joined = a.concat(b)
    assert joined.decoding == {"num_beams": 4, "max_new_tokens": 5}
    assert joined.task == {"name": "prompt"}
    assert joined.base == a.base
    assert (joined.num_trained, joined.training["concatenated_from"]) == (7, [a.digest, b.digest])
    assert a.concat().kv.keys() == a.kv.keys()
    assert joined.peft_incompatibility == "text starts at another position than the prefix's length"


def test_prefixes_without_an_equivalent_prefix_are_refused(base, make_prefix):
    a = other(base, 1)
    kv = {n: t.bfloat16() for n, t in other(base, 2).kv.items()}
    ragged = {**make_prefix(1, layers=(0,)).kv, **make_prefix(1, layers=(1, 2), length=3).kv}
    cases = {
        "window is 'always' in prefix 1": other(base, 2, window="always"),
        "numbers of another dtype": Prefix(kv, 5),
        "differ in length": Prefix(ragged, 4),
    }
    for reason, b in cases.items():
        with pytest.raises(ConfigError, match=f"no single prefix does the same: .*{reason}"):
            a.concat(b)


def test_prefixes_of_different_bases_are_refused(base, make_prefix):
    a = other(base, 1)
    with load(tiny.make("gpt2", seed=1)) as second, pytest.raises(BaseMismatchError, match="weights differ"):
        make_prefix(3).concat(a, other(second, 2))
    with pytest.raises(BaseMismatchError, match="other heads"):
        a.concat(make_prefix(heads=2))
