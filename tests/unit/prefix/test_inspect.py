"""`Prefix.inspect`: mass compared to eager attention, divergence to its definition, words to keys of the base model."""

from __future__ import annotations

import sys

import pytest
import torch
from matplotlib.image import imread

import tiny
from prefixfast import BaseMismatchError, ConfigError, Prefix, RequestError, load
from prefixfast.config.sites import BySite
from prefixfast.data.builtin_tasks import table_task
from prefixfast.prefix import peft_format as layout
from prefixfast.prefix.inspect import Inspection, SiteInspection

FAMILIES = ("gpt2", "llama", "qwen3", "mistral", "gemma2", "gemma3")
PROMPTS = [
    list(range(3, 20)),
    [7],
    list(range(90, 60, -2)),
]  # the first and last are longer than the tiny models' window


def strong(family: str, length: int = 5) -> tuple[torch.Tensor, Prefix]:
    table = tiny.peft_table(tiny.make(family), length, seed=1)
    return table, Prefix(layout.from_table(table, *tiny.shapes(tiny.make(family))), pos_start=length)


@torch.no_grad()
def eager(family: str, table: torch.Tensor, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights ``[L, HQ, N, P + N]`` and logits ``[N, V]`` of PEFT's model with eager attention."""
    model = tiny.make(family)
    model.set_attn_implementation("eager")
    out = tiny.with_prefix(model, table)(input_ids=torch.tensor([ids]), output_attentions=True)
    return torch.cat(out.attentions), out.logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_mass_equals_eager_attention(family):
    table, prefix = strong(family)
    weights = [eager(family, table, ids)[0][..., :-n].sum(-1) for ids in PROMPTS for n in [len(ids)]]
    expected = torch.cat(weights, -1).mean(-1)
    with load(tiny.make(family)) as base:
        found = prefix.inspect(base, PROMPTS, words=0)
    assert found.mass.shape == expected.shape
    assert (found.mass - expected).abs().max() < 1e-5
    assert 0.01 < expected.mean() < 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_divergence_of_the_next_token(family):
    table, prefix = strong(family)
    with load(tiny.make(family)) as base:
        found = prefix.inspect(base, PROMPTS, words=0)
    for ids, got in zip(PROMPTS, found.divergence, strict=True):
        with torch.no_grad():
            p, q = (
                eager(family, table, ids)[1].double().softmax(-1),
                tiny.make(family)(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1),
            )
        expected = (p * (p / q).log()).sum(-1)
        assert got.shape == expected.shape
        assert ((got - expected).abs() / expected.clamp_min(1)).max() < 1e-4
        assert expected.max() > 0.05


def test_only_the_target_of_a_row_is_measured(base, make_prefix):
    prefix, tokens = make_prefix(), base.require_tokenizer()
    prompt, target = tokens.encode(["The table: "])[0].tolist(), tokens.encode(["set"])[0].tolist()
    row = prefix.inspect(base, [{"prompt": "The table: ", "completion": "set"}], words=0)
    text = prefix.inspect(base, [prompt + target], words=0)
    assert row.divergence[0].shape == (4,)  # before s, e, t and the end token
    assert torch.allclose(row.divergence[0], text.divergence[0][len(prompt) - 1 :])
    weights, _ = eager("gpt2", layout.to_table(prefix.kv), prompt + target)
    assert (row.mass - weights[:, :, len(prompt) - 1 :, :4].sum(-1).mean(-1)).abs().max() < 1e-5
    assert (row.mass - text.mass).abs().max() > 1e-3


def test_a_row_is_read_by_the_task_of_the_prefix(base, make_prefix):
    own = table_task(item="<{key}={value}>", prompt="{src}!").spec()
    plain = make_prefix().inspect(base, [{"table": {"name": "Zizzi"}, "ref": "Zizzi."}], words=0)
    assert len(plain.divergence[0]) == 7
    for linearizer, text in ((own, "<name=Zizzi>!"), (None, "name : Zizzi\n")):
        read = make_prefix(task=linearizer).inspect(base, [{"table": {"name": "Zizzi"}}], words=0)
        assert len(read.divergence[0]) == len(text)
    with pytest.raises(RequestError, match="prompt 0: "):
        make_prefix(task=own).inspect(base, [{"tabel": {"name": "Zizzi"}}], words=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3"])
def test_rows_made_from_a_text_are_nearest_to_its_tokens(family):
    text = [20, 77, 5, 20, 99]
    with load(tiny.make(family)) as base:
        words = Prefix.from_text(base, text).inspect(base, [[3]], words=2).words
    assert [found[0][0] for found in words.values()] == [f"#{t}" for t in text]
    assert all(found[0][1] == pytest.approx(1, abs=1e-4) and found[1][1] < 0.9999 for found in words.values())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_words_are_those_with_the_nearest_first_layer_keys(family, monkeypatch):
    monkeypatch.setattr("prefixfast.prefix.nearest_tokens.TOKENS_PER_CHUNK", 30)  # several chunks
    _, prefix = strong(family)
    model, keys = tiny.make(family), []
    with torch.no_grad():
        for position in range(5):
            cache = model(
                input_ids=torch.arange(tiny.VOCAB)[:, None],
                position_ids=torch.full((tiny.VOCAB, 1), position),
                use_cache=True,
            ).past_key_values
            keys.append(cache.layers[0].keys[:, :, 0].flatten(1))
    with load(tiny.make(family)) as base:
        words = prefix.inspect(base, [[3]], words=3, rows=[4, 0]).words
    assert list(words) == [4, 0]
    for row, found in words.items():
        cosine = torch.nn.functional.cosine_similarity(keys[row], prefix.kv["self.0.k"][row].flatten()[None])
        best = cosine.topk(3)
        assert [int(word[1:]) for word, _ in found] == best.indices.tolist()
        assert [c for _, c in found] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_print(base):
    prefix = Prefix.from_text(base, "[b]£:a:" * 6)
    shown = str(prefix.inspect(base, ["Hello there"], words=1))
    assert "attention mass on the prefix" in shown
    assert "over 11 positions of 1 prompts" in shown
    assert "words of 16 of 48 rows" in shown
    assert all(
        f"{word!r} 1.00" in shown for word in ("[", "b", "]", "Â", "£", ":", "a")
    )  # a part of a character is shown by its name in the vocabulary
    assert max(map(len, shown.splitlines())) <= 100
    assert "words of" not in str(prefix.inspect(base, ["Hello"], words=0))


def test_markup_in_words_is_not_interpreted():
    words = [("[red]", 1.0), ("[/]", 0.5), (":smile:", 0.25)]
    shown = str(Inspection(BySite({"self": SiteInspection(torch.ones(1, 1), {0: words})}), [torch.zeros(1)], 1))
    assert all(f"{word!r} {cosine:.2f}" in shown for word, cosine in words)


def test_plot(base, make_prefix, tmp_path, monkeypatch):
    found = make_prefix().inspect(base, ["Hello"], words=0)
    found.plot(tmp_path / "deep" / "x.png")
    assert imread(tmp_path / "deep" / "x.png").std() > 0.05
    with pytest.raises(ConfigError, match=r"expected a file ending in \.png, \.svg or \.pdf"):
        found.plot(tmp_path / "x.exe")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"prefixfast\[train\]"):
        found.plot(tmp_path / "y.png")
    assert not (tmp_path / "y.png").exists()


WRONG = {
    "one text": ("Hello", {}, ConfigError),
    "flat ids": ([3, 4], {}, ConfigError),
    "a row": ({"prompt": "x"}, {}, ConfigError),
    "none": ([], {}, ConfigError),
    "words negative": (["x"], {"words": -1}, ConfigError),
    "words true": (["x"], {"words": True}, ConfigError),
    "row that is not there": (["x"], {"rows": [4]}, ConfigError),
    "row by name": (["x"], {"rows": ["first"]}, ConfigError),
    "empty prompt": (["x", ""], {}, RequestError),
    "token of another vocabulary": ([[3], [101]], {}, RequestError),
    "a number": (["x", 5.0], {}, RequestError),
    "too long": (["x", [3] * 157], {}, RequestError),
    "row without input": (["x", {"completion": "x"}], {}, RequestError),
    "row without prompt tokens": (["x", {"prompt": "", "completion": "x"}], {}, RequestError),
}


@pytest.mark.parametrize(("prompts", "how", "kind"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(base, make_prefix, prompts, how, kind):
    with pytest.raises(kind) as caught:
        make_prefix().inspect(base, prompts, **how)
    assert kind is not RequestError or caught.value.index == 1


def test_the_longest_prompt_fits(base, make_prefix):
    assert len(make_prefix().inspect(base, [[3] * 156], words=0).divergence[0]) == 156


def test_a_prefix_of_another_base_is_refused(make_prefix):
    with load(tiny.make("llama")) as base, pytest.raises(BaseMismatchError):
        make_prefix().inspect(base, [[3]])
