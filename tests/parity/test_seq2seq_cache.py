"""transformers' unmodified `generate` of an encoder-decoder base on `HFCache`, against the oracle and the engine."""

from __future__ import annotations

import gc

import pytest
import torch

import seq2seq
import tiny
from parity.test_seq2seq_generate import NEW, engine, of_families, setup
from prefixfast import CapacityError, ConfigError, HFCache, load
from prefixfast.integrations.hf_seq2seq import DIGIT, DIGITS, ids_of, states_of

HOW = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 6, "length_penalty": 0.8},
    "rules": {"num_beams": 3, "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 1, "forced_bos_token_id": 9},
}


def padded(texts, pad: int):
    """Texts padded on the right, and their mask."""
    most = max(map(len, texts))
    ids = torch.stack([torch.cat([t, t.new_full((most - len(t),), pad)]) for t in texts])
    mask = torch.stack([(torch.arange(most) < len(t)).long() for t in texts])
    return ids, mask


def theirs_cut(out, ends):
    rows = [row[1:].tolist() for row in out]
    return [next((r[: i + 1] for i, t in enumerate(r) if t in ends), r) for r in rows]


@pytest.mark.parametrize(("name", "case"), of_families(list(HOW), ("beams",)))
def test_generate_on_the_cache_gives_the_tokens_of_the_engine_and_of_the_oracle(name, case):
    s, how = setup(name), HOW[case]
    beams = how["num_beams"]
    if case == "rules":  # transformers bans the n-grams of the padding as well
        how = {**how, "bad_words_ids": [[s.base.seq2seq.pad]]}
    ids, mask = padded(s.texts, s.base.seq2seq.pad)
    with HFCache(s.base, s.prefixes, num_beams=beams, max_len=20) as cache, seq2seq.counted(s.base.hf) as counts:
        out = s.base.hf.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False, **how
        )
    depth = len(s.base.sites["cross"])
    assert counts == {"encoder": 2, "cross": depth}, "once for the tokens, once for the states"
    with engine(s.base) as made:
        ours = made.generate([t.tolist() for t in s.texts], s.prefixes, max_new_tokens=NEW, **how)
    got = theirs_cut(out, made.loop.batch.end_ids)
    assert got == [g.token_ids for g in ours]
    assert got == [s.alone(t, p, **how) for t, p in zip(s.texts, s.prefixes, strict=True)]
    assert "forward" not in s.base.hf.__dict__
    assert "forward" not in s.base.hf.get_encoder().__dict__


def test_one_prefix_for_all_rows_and_several_samples():
    s = setup("bart")
    ids, mask = padded(s.texts[:2], s.base.seq2seq.pad)
    how = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5, "min_new_tokens": 5, "top_k": 1}
    with HFCache(s.base, s.prefixes[0], num_beams=3, max_len=20) as cache:
        out = s.base.hf.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **how)
    for i in range(6):  # the most likely token has probability 1
        expected = s.alone(s.texts[i // 3], s.prefixes[0], max_new_tokens=5, min_new_tokens=5)
        assert out[i, 1:].tolist() == expected


def test_two_open_caches_and_a_dropped_one():
    s = setup("bart")
    text, how = s.texts[0], {"max_new_tokens": 5, "do_sample": False}
    first, second = HFCache(s.base, s.prefixes[0], max_len=9), HFCache(s.base, s.prefixes[2], max_len=9)
    dropped = HFCache(s.base, max_len=9)
    del dropped
    gc.collect()
    outs = [s.base.hf.generate(input_ids=text[None], past_key_values=c, **how) for c in (second, first)]
    first.close()
    first.close()
    assert "forward" in s.base.hf.__dict__
    second.close()
    assert "forward" not in s.base.hf.__dict__
    for out, prefix in zip(outs, (s.prefixes[2], s.prefixes[0]), strict=True):
        assert out[0, 1:].tolist() == s.alone(text, prefix, max_new_tokens=5)


def test_what_the_cache_does_not_take_is_refused():
    s = setup("bart")
    hf, text, how = s.base.hf, s.texts[0], {"max_new_tokens": 5, "do_sample": False}
    ids, mask = padded(s.texts[:2], s.base.seq2seq.pad)
    with HFCache(s.base, max_len=9) as cache:
        with pytest.raises(ConfigError, match="padded on the right"):
            hf.generate(input_ids=ids.flip(1), attention_mask=mask.flip(1), past_key_values=cache, **how)
        with pytest.raises(ConfigError, match="decoder to begin with its start token"):
            hf.generate(input_ids=text[None], decoder_input_ids=torch.tensor([[2, 5, 6]]), past_key_values=cache, **how)
    with HFCache(s.base, s.prefixes[:2], num_beams=2) as cache, pytest.raises(ConfigError, match="num_beams=2"):
        hf.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **how)
    with HFCache(s.base) as cache:
        hf.generate(input_ids=text[None], past_key_values=cache, **how)
        with pytest.raises(ConfigError, match="use a new cache for each generate"):
            hf.generate(input_ids=text[None], past_key_values=cache, **how)
    with HFCache(s.base, max_len=4) as cache, pytest.raises(CapacityError, match="max_len=4"):
        hf.generate(input_ids=text[None], past_key_values=cache, **how)
    states = torch.randn(1, 4, 32)
    with HFCache(s.base) as cache, pytest.raises(ConfigError, match="pass input_ids to generate"):
        hf(encoder_outputs=(states,), decoder_input_ids=torch.tensor([[2]]), past_key_values=cache)


def test_texts_that_the_encoder_does_not_read_as_transformers_does_are_refused():
    base, how = setup("bart").base, {"max_new_tokens": 2, "do_sample": False}
    longest = torch.full((1, seq2seq.POSITIONS), 5)
    with HFCache(base, max_len=9) as cache:
        assert base.hf.generate(input_ids=longest, past_key_values=cache, **how).shape == (1, 3)
    longer = torch.cat([longest, longest[:, :1]], 1)
    with HFCache(base) as cache, pytest.raises(CapacityError, match=f"at most {seq2seq.POSITIONS} tokens"):
        base.hf.generate(input_ids=longer, past_key_values=cache, **how)
    with HFCache(base) as cache, pytest.raises(ConfigError, match="at least one token"):
        base.hf.generate(input_ids=longest[:, :0], past_key_values=cache, **how)
    for more in ({"decoder_input_ids": torch.tensor([[2]])}, {"labels": torch.tensor([[2]])}):
        with HFCache(base) as cache, pytest.raises(ConfigError, match="expected a forward of generate"):
            base.hf(input_ids=longest, past_key_values=cache, **more)
    base = setup("m2m_100").base
    ids = torch.tensor([[5, base.seq2seq.pad, 6]])
    with HFCache(base) as cache, pytest.raises(ConfigError, match="padding token"):
        base.hf.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **how)


def test_empty_prompts_of_a_decoder_only_base_are_refused():
    empty = torch.zeros(2, 0, dtype=torch.int64)
    with load(tiny.make("gpt2")) as base, HFCache(base) as cache, pytest.raises(ConfigError, match="at least one"):
        base.hf(input_ids=empty, past_key_values=cache)


@pytest.mark.parametrize(("make", "name"), [(tiny.make, "gpt2"), (seq2seq.make_seq2seq, "bart")])
def test_a_cache_of_a_closed_base_changes_nothing(make, name):
    hf, ids, how = make(name), torch.tensor([[5, 6, 7]]), {"max_new_tokens": 4, "do_sample": False}
    expected = hf.generate(input_ids=ids, **how)
    base = load(hf)
    with HFCache(base, max_len=9) as cache:
        base.close()
        with pytest.raises(ConfigError, match="this base was closed"):
            hf.generate(input_ids=ids, past_key_values=cache, **how)
        assert torch.equal(hf.generate(input_ids=ids, **how), expected)


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "4", None])
@pytest.mark.parametrize("option", ["num_beams", "max_len"])
def test_counts_of_a_cache_are_numbers_from_1(option, number):
    with pytest.raises(ConfigError, match=f"{option}: expected a number of at least 1"):
        HFCache(setup("bart").base, **{option: number})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_hold_every_token_exactly(dtype):
    ids = torch.tensor([[0, 1, 63, 64, 4095, 250_053, 256_203, DIGIT**DIGITS - 1]])
    assert torch.equal(ids_of(states_of(ids, 12, dtype)), ids)
    with pytest.raises(ConfigError, match="encoder_outputs"):
        ids_of(torch.zeros(1, 3, 12))
