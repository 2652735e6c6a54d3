"""Logits processors, sampling, several texts, log-probabilities and scores against transformers and PEFT."""

import functools

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.logits_process import TopKLogitsWarper

import tiny
from prefixfast import Engine, score
from prefixfast.errors import ConfigError, RequestError
from prefixfast.prefix import peft_format as layout
from prefixfast.prefix.prefix import Prefix

LENGTHS, CHOICE, NEW = (7, 4, 1, 20), (0, 1, None, 1), 14


class RepetitionDecay(LogitsProcessor):
    """Logits processor that lowers the score of a token by its number of occurrences so far."""

    def __call__(self, input_ids, scores):
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
        return scores - 1.5 * counts


PROCESSORS = {
    "repetition": {"repetition_penalty": 1.7},
    "weaker repetition": {"repetition_penalty": 0.6},
    "bigrams": {"no_repeat_ngram_size": 2},
    "trigrams": {"no_repeat_ngram_size": 3},
    "unigrams and a minimum": {"no_repeat_ngram_size": 1, "min_new_tokens": 9},
    "bad words": {"bad_words_ids": [[40], [16, 70], [7, 8, 9], [tiny.EOS], [99, 99]]},
    "own processors": {"logits_processor": [RepetitionDecay(), SuppressTokensLogitsProcessor([40, 41, 42])]},
    "all": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[99]],
        "min_new_tokens": 5,
        "logits_processor": [RepetitionDecay()],
    },
}


@functools.cache
def setup(family: str):
    make = functools.partial(tiny.make, family)
    g = torch.Generator().manual_seed(11)
    prompts = [torch.randint(3, tiny.VOCAB, (n,), generator=g) for n in LENGTHS]
    tables = [tiny.peft_table(make(), n, seed) for n, seed in ((5, 1), (3, 2))]
    base = make()
    prefixes = [Prefix(layout.from_table(t, *tiny.shapes(base)), pos_start=len(t)) for t in tables]
    theirs = {i: tiny.with_prefix(make(), t) for i, t in enumerate(tables)} | {None: make()}
    return base, prompts, [None if c is None else prefixes[c] for c in CHOICE], [theirs[c] for c in CHOICE]


def theirs_alone(model, prompt, processors=None, **how):
    """Sequences of transformers' `generate` for one request, each cut after its end token."""
    own = {"logits_processor": LogitsProcessorList(processors)} if processors else {}
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], do_sample=False, **own, **how
        )
    rows = [row[len(prompt) :].tolist() for row in out]
    return [row[: row.index(tiny.EOS) + 1] if tiny.EOS in row else row for row in rows]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_processors_are_those_of_transformers(family, name, beams):
    base, prompts, chosen, theirs = setup(family)
    how = {**PROCESSORS[name], "max_new_tokens": NEW, "num_beams": beams}
    processors = how.pop("logits_processor", None)
    expected = [theirs_alone(m, p, processors, **how)[0] for m, p in zip(theirs, prompts, strict=True)]
    ours = LogitsProcessorList(processors) if processors else None
    with Engine(base, max_num_seqs=16, max_model_len=64) as engine:
        got = [
            g.token_ids for g in engine.generate([p.tolist() for p in prompts], chosen, logits_processor=ours, **how)
        ]
        free = [
            g.token_ids
            for g in engine.generate([p.tolist() for p in prompts], chosen, max_new_tokens=NEW, num_beams=beams)
        ]
    assert got == expected
    assert got != free, "the logits processor must change the tokens"


@pytest.mark.parametrize(("family", "size"), [("gpt2", 1), ("llama", 2)])
def test_sequences_of_the_prompt_do_not_occur_in_the_text_as_in_transformers(family, size):
    """Prompts that end with the text of the bare prompt, which the model would go on to repeat."""
    base, prompts, chosen, theirs = setup(family)
    with Engine(base, max_num_seqs=16, max_model_len=64) as engine:
        before = engine.generate([p.tolist() for p in prompts], chosen, max_new_tokens=6)
        prompts = [torch.cat([p, torch.tensor(g.token_ids)]) for p, g in zip(prompts, before, strict=True)]
        for beams in (1, 3):
            how = {"max_new_tokens": NEW, "num_beams": beams}
            free = engine.generate([p.tolist() for p in prompts], chosen, **how)
            how["encoder_no_repeat_ngram_size"] = size
            got = engine.generate([p.tolist() for p in prompts], chosen, **how)
            assert [g.token_ids for g in got] == [
                theirs_alone(m, p, **how)[0] for m, p in zip(theirs, prompts, strict=True)
            ]
            assert sum(g.token_ids != f.token_ids for g, f in zip(got, free, strict=True)) >= 2


def test_requests_with_and_without_logits_processors_share_a_batch():
    base, prompts, chosen, theirs = setup("llama")
    each = [
        {},
        {"repetition_penalty": 1.7},
        {"num_beams": 3, "no_repeat_ngram_size": 2},
        {"no_repeat_ngram_size": 1, "num_beams": 1},
    ]
    batch = [{"input_ids": p.tolist(), "params": own} for p, own in zip(prompts, each, strict=True)]
    expected = [
        theirs_alone(m, p, max_new_tokens=NEW, **{"num_beams": 1, **own})[0]
        for m, p, own in zip(theirs, prompts, each, strict=True)
    ]
    with Engine(base, max_num_seqs=16, max_model_len=64) as engine:
        for _ in range(2):  # decode rows are reused by requests with other processors
            assert [g.token_ids for g in engine.generate(batch, chosen, max_new_tokens=NEW)] == expected
            assert [g.token_ids for g in engine.generate(batch[::-1], chosen[::-1], max_new_tokens=NEW)] == expected[
                ::-1
            ]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_several_beams_are_returned_in_order(family):
    base, prompts, chosen, theirs = setup(family)
    how = {"max_new_tokens": NEW, "num_beams": 4, "num_return_sequences": 3}
    with Engine(base, max_num_seqs=16, max_model_len=64) as engine:
        got = engine.generate([p.tolist() for p in prompts], chosen, **how)
    for g, m, p in zip(got, theirs, prompts, strict=True):
        expected = theirs_alone(m, p, **how)
        assert len(g.texts) == 3
        assert g.token_ids == expected[0]
        assert g.usage["completion_tokens"] == sum(map(len, expected))


def test_log_probabilities_are_those_of_the_model():
    base, prompts, chosen, theirs = setup("llama")
    with Engine(base, max_num_seqs=16, max_model_len=64) as engine:
        got = engine.generate(
            [p.tolist() for p in prompts], chosen, max_new_tokens=NEW, repetition_penalty=1.7, logprobs=4
        )
        some = engine.generate(
            [{"input_ids": prompts[0].tolist(), "params": {"logprobs": 0}}, prompts[1].tolist()],
            chosen[:2],
            max_new_tokens=NEW,
        )
    for g, m, p in zip(got, theirs, prompts, strict=True):
        out = m.generate(
            input_ids=p[None],
            attention_mask=torch.ones_like(p)[None],
            do_sample=False,
            max_new_tokens=NEW,
            repetition_penalty=1.7,
            output_logits=True,
            return_dict_in_generate=True,
        )
        raw = torch.stack(out.logits).log_softmax(-1)[:, 0]
        assert len(g.logprobs) == len(g.token_ids) == len(raw)
        for logprob, token, own in zip(g.logprobs, g.token_ids, raw, strict=True):
            assert logprob.token_id == token
            assert logprob.logprob == pytest.approx(own[token].item(), abs=1e-5)
            assert list(logprob.top) == own.topk(4)[1].tolist()
            assert list(logprob.top.values()) == pytest.approx(own.topk(4)[0].tolist(), abs=1e-5)
    assert [t.top for t in some[0].logprobs] == [{}] * len(some[0].token_ids)
    assert some[1].logprobs is None


@pytest.mark.parametrize("budget", [10, 4096])
@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2"])
def test_scores_are_log_probabilities_of_their_forward(family, budget):
    base, prompts, chosen, theirs = setup(family)
    g = torch.Generator().manual_seed(2)
    targets = [torch.randint(3, tiny.VOCAB, (n,), generator=g).tolist() for n in (5, 1, 9, 3)]
    with Engine(base, max_num_seqs=4, max_model_len=64, max_num_batched_tokens=budget) as engine:
        got = engine.score([p.tolist() for p in prompts], chosen, targets=targets)
        best = engine.generate([p.tolist() for p in prompts], chosen, max_new_tokens=6, min_new_tokens=6)
        greedy = engine.score([p.tolist() for p in prompts], chosen, targets=[b.token_ids for b in best])
    for s, m, p, t in zip(got, theirs, prompts, targets, strict=True):
        ids = torch.cat([p, torch.tensor(t)])[None]
        with torch.no_grad():
            logp = m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)[-len(t) - 1 : -1]
        assert s.token_ids == t
        assert s.token_logprobs == pytest.approx(logp[range(len(t)), t].tolist(), abs=1e-5)
        assert s.logprob == pytest.approx(sum(s.token_logprobs))
        assert s.is_greedy == (logp.argmax(-1).tolist() == t)
        assert s.usage == {"prompt_tokens": len(p), "completion_tokens": len(t), "prefix_rows": s.usage["prefix_rows"]}
    assert all(
        s.is_greedy == (tiny.EOS not in b.token_ids[:-1] and m is not None)
        for s, b, m in zip(greedy, best, theirs, strict=True)
    )


def test_wrong_targets_are_refused():
    base, prompts, chosen, _ = setup("gpt2")
    one = [prompts[0].tolist()]
    for targets, error in (
        ([[5], [6]], ConfigError),
        ("ab", ConfigError),
        ([[]], RequestError),
        ([[tiny.VOCAB]], RequestError),
        ([[5] * 200], RequestError),
    ):
        with pytest.raises(error, match=r"target"):
            score(one, chosen[0], targets=targets, model=base)
    with pytest.raises(RequestError, match="expected a row with a target"):
        score(one, chosen[0], model=base)


SAMPLED = {"do_sample": True, "max_new_tokens": NEW, "temperature": 1.4, "top_k": 30, "top_p": 0.95}


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_a_seeded_request_has_the_same_text_alone_and_in_any_batch(family):
    base, prompts, chosen, _ = setup(family)
    ids = [p.tolist() for p in prompts]
    mixed = [{"input_ids": p, "params": {"seed": 100 + i}} for i, p in enumerate(ids)]
    with Engine(base, max_num_seqs=16, max_model_len=64) as engine:
        alone = [engine.generate([m], [c], **SAMPLED)[0].token_ids for m, c in zip(mixed, chosen, strict=True)]
        assert [g.token_ids for g in engine.generate(mixed, chosen, **SAMPLED)] == alone
        others = [
            {"input_ids": [5, 6, 7], "params": {"num_beams": 2, "do_sample": False}},
            {"input_ids": [9] * 11, "params": {"do_sample": False}},
        ]
        defaults = {"do_sample": True, "max_new_tokens": NEW}
        batch = [
            others[0],
            *({**m, "params": {**m["params"], "temperature": 1.4, "top_k": 30, "top_p": 0.95}} for m in mixed[::-1]),
            others[1],
            {"input_ids": [8]},
        ]
        got = engine.generate(batch, [None, *chosen[::-1], None, None], **defaults)
        assert [g.token_ids for g in got[1:5]] == alone[::-1]
        submitted = [engine.submit(m, c, **SAMPLED) for m, c in zip(mixed, chosen, strict=True)]
        assert [s.result(60).token_ids for s in submitted] == alone
        assert [g.token_ids for g in engine.generate(ids, chosen, seed=7, **SAMPLED)] != alone
    with (
        Engine(base, max_num_seqs=16, max_model_len=64, seed=3) as a,
        Engine(base, max_num_seqs=16, max_model_len=64, seed=3) as b,
    ):
        first, again = ([g.token_ids for g in e.generate(ids, chosen, **SAMPLED)] for e in (a, b))
        assert first == again
        assert first != [g.token_ids for g in a.generate(ids, chosen, **SAMPLED)]


def test_several_samples_share_one_prompt():
    base, prompts, chosen, _ = setup("llama")
    with Engine(base, max_num_seqs=16, max_model_len=64) as engine:
        (got,) = engine.generate(
            [prompts[0].tolist()], chosen[0], num_return_sequences=5, seed=4, logprobs=1, **SAMPLED
        )
        assert engine.stats()["prefill_tokens"] == len(prompts[0])
        (one,) = engine.generate([prompts[0].tolist()], chosen[0], seed=4, **SAMPLED)
    assert one.token_ids == got.token_ids
    assert len(got.texts) == 5
    assert got.usage["completion_tokens"] > len(got.token_ids)
    assert [t.token_id for t in got.logprobs] == got.token_ids


def test_frequencies_of_samples_match_transformers_probabilities():
    base, prompts, chosen, theirs = setup("gpt2")
    prompt, count, k = prompts[0], 4000, 10
    with Engine(base, max_num_seqs=64, max_model_len=32) as engine:
        how = {"do_sample": True, "max_new_tokens": 1, "temperature": 2.0, "top_k": k}
        batch = [{"input_ids": prompt.tolist(), "params": {"seed": i}} for i in range(count)]
        tokens = torch.tensor([g.token_ids[0] for g in engine.generate(batch, chosen[0], **how)])
    with torch.no_grad():
        logits = theirs[0](input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None]).logits[:, -1]
    expected = TopKLogitsWarper(k)(prompt[None], logits / 2.0).softmax(-1)[0].double() * count
    found = torch.bincount(tokens, minlength=len(expected)).double()
    assert found[expected == 0].sum() == 0
    on = expected > 0
    assert on.sum() == k
    assert ((found - expected)[on] ** 2 / expected[on]).sum() < 27.88  # 99.9 % of chi-square with 9 degrees of freedom
