"""Tokens of a batch with mixed prefixes against `generate` of transformers and PEFT for each request alone."""

import functools

import pytest
import torch

import tiny
from prefixfast import Engine
from prefixfast.prefix import peft_format as layout
from prefixfast.prefix.prefix import Prefix

LENGTHS, CHOICE = (7, 4, 1, 20, 6, 11), (0, 1, 0, 0, None, 1)
GAP = 1e-4  # different tokens are accepted only if their scores in fp64 are this close


@functools.cache
def setup(family: str):
    make = functools.partial(tiny.make, family)
    g = torch.Generator().manual_seed(11)
    prompts = [torch.randint(3, tiny.VOCAB, (n,), generator=g) for n in LENGTHS]
    tables = [tiny.peft_table(make(), n, seed) for n, seed in ((5, 1), (3, 2))]
    base = make()
    prefixes = [Prefix(layout.from_table(t, *tiny.shapes(base)), pos_start=len(t)) for t in tables]
    theirs = {i: tiny.with_prefix(make(), t) for i, t in enumerate(tables)} | {None: make()}
    return base, prompts, prefixes, theirs


def alone(model, prompt: torch.Tensor, end: int = tiny.EOS, **how) -> list[int]:
    """Tokens of transformers' `generate` for one request, without padding."""
    out = model.generate(input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], do_sample=False, **how)[
        0, len(prompt) :
    ].tolist()
    return out[: out.index(end) + 1] if end in out else out


def sequence_score(model, prompt, tokens, penalty: float) -> float:
    """Length-normalized log-probability in fp64."""
    ids = torch.cat([prompt, torch.tensor(tokens)])[None]
    logp = (
        model.double()(input_ids=ids, attention_mask=torch.ones_like(ids))
        .logits[0, -len(tokens) - 1 : -1]
        .log_softmax(-1)
    )
    model.float()
    return (logp[range(len(tokens)), tokens].sum() / len(tokens) ** penalty).item()


SETTINGS = {
    "greedy": {"num_beams": 1},
    "beam 5": {"num_beams": 5},
    "beam 4, short texts": {"num_beams": 4, "length_penalty": 0.5, "early_stopping": True},
    "beam 3, long texts": {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    "greedy, minimum": {"num_beams": 1, "min_new_tokens": 9},
    "beam 2, minimum": {"num_beams": 2, "min_new_tokens": 6},
}
CASES = [(f, s) for f in tiny.FAMILIES for s in ("greedy", "beam 5")] + [
    (f, s) for f in ("gpt2", "llama") for s in list(SETTINGS)[2:]
]


@pytest.mark.parametrize(("family", "setting"), CASES)
def test_tokens_equal_those_of_each_request_alone(family, setting):
    base, prompts, prefixes, theirs = setup(family)
    how = {**SETTINGS[setting], "max_new_tokens": 16}
    chosen = [None if c is None else prefixes[c] for c in CHOICE]
    with Engine(base, max_num_seqs=64, max_model_len=64) as engine:
        got = engine.generate([p.tolist() for p in prompts], chosen, **how)
    for g, prompt, choice in zip(got, prompts, CHOICE, strict=True):
        expected = alone(theirs[choice], prompt, **how)
        if g.token_ids != expected:
            penalty = how.get("length_penalty", 1.0)
            scores = [sequence_score(theirs[choice], prompt, t, penalty) for t in (g.token_ids, expected)]
            assert abs(scores[0] - scores[1]) < GAP, (g.token_ids, expected, scores)


def test_tokens_of_waiting_requests_equal_those_of_each_request_alone():
    """More requests than decode rows, with beam and greedy rows in one batch."""
    base, prompts, prefixes, theirs = setup("gpt2")
    how = [{"num_beams": 1 + i % 3, "max_new_tokens": 5 + i % 7} for i in range(3 * len(prompts))]
    batch = [{"input_ids": p.tolist(), "params": h} for p, h in zip(prompts * 3, how, strict=True)]
    chosen = [None if c is None else prefixes[c] for c in CHOICE * 3]
    with Engine(base, max_num_seqs=6, max_model_len=48, max_num_batched_tokens=30) as engine:
        got = engine.generate(batch, chosen)
        for g, prompt, choice, h in zip(got, prompts * 3, CHOICE * 3, how, strict=True):
            assert g.token_ids == alone(theirs[choice], prompt, **h)
        assert engine.loop.scheduler.num_running == engine.loop.scheduler.num_waiting == 0


def test_composed_prefixes_equal_one_longer_prefix():
    """The sequence [A, B] is the prefix with the rows of A, then those of B. Text starts at the larger pos_start."""
    base, prompts, (a, b), _ = setup("llama")
    joined = {n: torch.cat([a.kv[n], b.kv[n]]) for n in a.kv}
    both = Prefix(joined, pos_start=max(a.pos_start, b.pos_start))
    with Engine(base, max_num_seqs=8, max_model_len=64) as engine:
        ids = [p.tolist() for p in prompts]
        composed = engine.generate(ids, [[a, b]] * len(ids), max_new_tokens=12)
        single = engine.generate(ids, both, max_new_tokens=12)
        other = engine.generate(ids, [[b, a]] * len(ids), max_new_tokens=12)
    assert [g.token_ids for g in composed] == [g.token_ids for g in single]
    # The order changes no softmax in exact arithmetic, since keys are stored after RoPE.
    assert [g.token_ids for g in composed] == [g.token_ids for g in other]
    assert composed[0].usage["prefix_rows"] == a.length + b.length
