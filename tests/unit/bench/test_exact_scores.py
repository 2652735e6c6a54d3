"""Settings and tokens of the contenders: the base's generation_config decides nothing, wrong tokens stop a suite."""

from __future__ import annotations

import copy

import pytest
import torch

import tiny
from prefixfast import Engine, Prefix, load
from prefixfast.bench.contenders import Bases, RunSettings, mixed_by_hand, peft_contender, peft_or_plain
from prefixfast.bench.decoding import Decoding, set_aside
from prefixfast.bench.exact_scores import GAP, ExactScores, Text, check_same_tokens
from prefixfast.bench.generate import Workload, measure
from prefixfast.bench.generate_points import ONE_BY_ONE, ONE_FOR_ALL
from prefixfast.bench.harness import WrongResultError
from prefixfast.bench.random_base import random_prefixes

PROMPTS = torch.randint(3, tiny.VOCAB, (4, 9), generator=torch.Generator().manual_seed(1)).tolist()
# Fields that change the speed or the tokens of a contender which inherits them.
FIELDS = {
    "use_cache": False,
    "num_beams": 3,
    "do_sample": True,
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": list(range(3, 60)),
    "min_new_tokens": 1,
    "max_length": 11,
}


def hostile(family: str, dtype: torch.dtype = torch.float32):
    """A tiny base whose generation_config would change every contender."""
    base = tiny.make(family).to(dtype).eval()
    for name, value in FIELDS.items():
        setattr(base.generation_config, name, value)
    return base


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("length", [0, 5])
def test_a_base_that_turns_its_cache_off_is_generated_with_one(family, length):
    with load(tiny.make(family)) as model:
        decoding = Decoding.exactly(6, model)
        prefix = random_prefixes(model, length, 1)[0] if length else None
    own = peft_or_plain(hostile(family), prefix, decoding)
    seen = []
    base = own if prefix is None else own.get_base_model()
    base.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    contender = peft_contender(own, PROMPTS, 0, decoding)
    assert [len(t) for t in contender.call()] == [6] * 4
    assert seen == [(4, 9), *[(4, 1)] * 5]
    assert contender.settings == RunSettings("float32", "sdpa", True, 4, str(decoding))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_contender_inherits_from_the_generation_config(family):
    plain = hostile(family)
    assert set(set_aside(plain)) == set(FIELDS)
    with load(hostile(family)) as model:
        bases = Bases(model, plain)
        points = measure(bases, [0, 4], [1, 4], Workload(4, 9, 7, 2), rounds=1, shown=False)
    assert {p.settings.use_cache for p in points} == {True}
    assert {(p.key.contender, p.settings.batch) for p in points} >= {(ONE_BY_ONE, 1), (ONE_FOR_ALL, 4)}
    assert {p.settings.decoding for p in points} == {"do_sample=False, num_beams=1, exactly 7 new tokens, end tokens 2"}
    assert plain.generation_config.use_cache is False, "the user's base stays as it is"


def scores_of(base, prefixes, new: int = 8) -> ExactScores:
    decoding = Decoding(max_new_tokens=new, min_new_tokens=new, end_ids=(tiny.EOS,))
    return ExactScores(base, PROMPTS, prefixes.__getitem__, decoding)


def texts(name: str, tokens) -> list[Text]:
    return [Text(name, i, i, tuple(t)) for i, t in enumerate(tokens)]


@pytest.fixture(params=["gpt2", "llama"])
def family(request):
    return request.param


@pytest.fixture
def prefixes(family):
    with load(tiny.make(family)) as model:
        return random_prefixes(model, 5, 4)


def test_a_tie_is_no_difference_and_a_worse_token_is_one(family, prefixes):
    base = tiny.make(family)
    scores = scores_of(base, prefixes)
    good = texts("one", mixed_by_hand(base, prefixes, PROMPTS, scores.decoding)())
    assert check_same_tokens([*good, *(t._replace(contender="two") for t in good)], scores, "P=5") == 0
    ends = [(t, t._replace(contender="two", tokens=(*t.tokens[:-1], 7 if t.tokens[-1] != 7 else 8))) for t in good]
    with pytest.raises(WrongResultError, match=r"P=5: two: token 7 of request 0 is .* worse than the best one in fp64"):
        check_same_tokens(ends[0], scores, "P=5")
    # The output layer cannot tell the two last tokens apart.
    last, other = ends[0][0].tokens[-1], ends[0][1].tokens[-1]
    head = base.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    head.weight.data[other] = head.weight.data[last]
    assert check_same_tokens(ends[0], scores_of(base, prefixes), "P=5") < GAP


def test_an_end_token_is_worse_than_any_other(family, prefixes):
    base = tiny.make(family)
    scores = scores_of(base, prefixes)
    good = texts("one", mixed_by_hand(base, prefixes, PROMPTS, scores.decoding)())[0]
    wrong = good._replace(contender="two", tokens=(*good.tokens[:3], tiny.EOS, *good.tokens[4:]))
    with pytest.raises(WrongResultError, match="token 3 of request 0 is inf worse"):
        check_same_tokens([good, wrong], scores, "P=5")


def dropped(p: Prefix) -> Prefix:
    return Prefix({n: torch.zeros_like(t) if n.endswith("v") else t for n, t in p.kv.items()}, pos_start=p.length)


def shifted(p: Prefix) -> Prefix:
    return Prefix({n: t.roll(1, 0) if n.endswith("v") else t for n, t in p.kv.items()}, pos_start=p.length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", [dropped, shifted, None])
def test_a_wrong_prefix_is_noticed_in_every_dtype(family, prefixes, dtype, fault):
    base = tiny.make(family).to(dtype)
    scores = scores_of(base, prefixes)
    used = prefixes if fault is None else [fault(p) for p in prefixes]
    with load(copy.deepcopy(base)) as model, Engine(model, max_num_seqs=4, max_model_len=32) as engine:
        found = engine.generate(PROMPTS, used, progress=False, **scores.decoding.params())
    ours = texts("prefixfast", [g.token_ids for g in found])
    theirs = texts("by hand", mixed_by_hand(base, prefixes, PROMPTS, scores.decoding)())
    if fault is None:
        check_same_tokens([*ours, *theirs], scores, "P=5")
    else:
        with pytest.raises(WrongResultError, match=r"P=5: prefixfast: token \d of request \d"):
            check_same_tokens([*ours, *theirs], scores, "P=5")
