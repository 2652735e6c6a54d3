"""transformers' unmodified `generate` with an `HFCache` of mixed prefixes against PEFT for each request alone."""

import gc

import pytest
import torch
from transformers import LogitsProcessorList, SuppressTokensLogitsProcessor

import tiny
from prefixfast import HFCache, Prefix, load
from prefixfast.errors import BaseMismatchError, CapacityError, ConfigError
from prefixfast.prefix import peft_format as layout

LENGTHS, CHOICE = (7, 4, 1, 13), (0, 1, None, 1)


def setup(family):
    g = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, tiny.VOCAB, (n,), generator=g) for n in LENGTHS]
    tables = [tiny.peft_table(tiny.make(family), n, seed) for n, seed in ((5, 1), (3, 2))]
    base = tiny.make(family)
    prefixes = [Prefix(layout.from_table(t, *tiny.shapes(base)), pos_start=len(t)) for t in tables]
    theirs = [tiny.make(family) if c is None else tiny.with_prefix(tiny.make(family), tables[c]) for c in CHOICE]
    return base, prompts, [None if c is None else prefixes[c] for c in CHOICE], theirs


def padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (longest - len(p), 0)) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def cut(row):
    row = row.tolist()
    return row[: row.index(tiny.EOS) + 1] if tiny.EOS in row else row


GENERATIONS = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "two of three beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "logits processors": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "own logits processor": {"logits_processor": LogitsProcessorList([SuppressTokensLogitsProcessor([40, 41, 17])])},
}


@pytest.mark.parametrize("name", GENERATIONS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_unmodified_generate_gives_peft_tokens(family, name):
    base, prompts, chosen, theirs = setup(family)
    how = {"max_new_tokens": 12, "do_sample": False, **GENERATIONS[name]}
    expected = []
    for m, p in zip(theirs, prompts, strict=True):
        out = m.generate(input_ids=p[None], attention_mask=torch.ones_like(p)[None], **how)
        expected += [cut(row[len(p) :]) for row in out]
    with load(base) as model, HFCache(model, chosen, num_beams=how.get("num_beams", 1), max_len=64) as cache:
        out = model.hf.generate(**padded(prompts), past_key_values=cache, **how)
    assert [cut(row[max(LENGTHS) :]) for row in out] == expected


def test_sampling_is_that_of_transformers():
    base, prompts, chosen, _ = setup("llama")
    how = {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5}
    with load(base) as model:
        outs = []
        for _ in range(2):
            torch.manual_seed(1)
            with HFCache(model, chosen) as cache:
                outs.append(model.hf.generate(**padded(prompts), past_key_values=cache, **how))
    assert torch.equal(*outs)
    assert len(set(map(tuple, outs[0].tolist()))) == len(prompts)


def test_the_model_is_restored_afterwards():
    base, prompts, chosen, _ = setup("gpt2")
    before = base(input_ids=prompts[0][None]).logits
    with load(base) as model:
        with HFCache(model, chosen[0]) as cache:
            model.hf.generate(input_ids=prompts[0][None], past_key_values=cache, max_new_tokens=3)
        HFCache(model, chosen[0])
        gc.collect()
        assert not model.hf._forward_hooks
        assert not model.hf._forward_pre_hooks
    assert torch.equal(base(input_ids=prompts[0][None]).logits, before)


def test_unsupported_calls_are_refused():
    base, prompts, chosen, _ = setup("gpt2")
    batch = padded(prompts)
    with load(base) as model:
        for prefixes, inputs, error, words in (
            ([chosen[0]] * 3, batch, ConfigError, "prefixes"),
            (chosen, {**batch, "attention_mask": batch["attention_mask"].flip(1)}, ConfigError, "padded on the left"),
            (Prefix({n: t[:, :, :4] for n, t in chosen[0].kv.items()}, 5), batch, BaseMismatchError, "expected"),
        ):
            with HFCache(model, prefixes) as cache, pytest.raises(error, match=words):
                model.hf.generate(**inputs, past_key_values=cache, max_new_tokens=3)
        with HFCache(model, chosen, max_len=16) as cache, pytest.raises(CapacityError, match="max_len"):
            model.hf.generate(**batch, past_key_values=cache, max_new_tokens=9, min_new_tokens=9)
