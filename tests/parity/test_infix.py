"""Infixes in training, generation and scoring equal transformers' own forward with a mask and positions by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import infixes
import prefixfast
import tiny
from prefixfast import Engine, Prefix, train
from prefixfast.attention.plan import PrefixUse, training_plan
from prefixfast.errors import BaseMismatchError, ConfigError, RequestError
from prefixfast.integrations.hf_generate import HFCache
from prefixfast.prefix.kv import concat_kv, row_table

FAMILIES = ("gpt2", "opt", "llama", "qwen3", "gpt_neox")
LENGTHS, SPLITS = (9, 6, 1, 22, 7, 12, 8), (5, 0, 0, 20, 6, 3, 4)
G = torch.Generator().manual_seed(1)
TEXTS = [torch.randint(3, tiny.VOCAB, (n,), generator=G).tolist() for n in LENGTHS]
NEW = 6


@pytest.fixture(params=FAMILIES)
def pair(request):
    """Attached base and the same model with transformers' own attention."""
    own = tiny.make(request.param, dtype=torch.float64)
    own.set_attn_implementation("sdpa")
    with prefixfast.load(tiny.make(request.param, dtype=torch.float64)) as base:
        yield base, own


def mixture(base) -> list[Prefix]:
    """Infixes, one in a part of the layers, and prefixes."""
    return [
        infixes.make(base, 5, 1),
        infixes.make(base, 3, 2, layers=(0, 2)),
        infixes.make(base, 4, 3, position="prefix"),
        infixes.make(base, 2, 4, pos_start=0),
        infixes.make(base, 6, 5, position="prefix", layers=(1,), pos_start=0),
    ]


def uses(base) -> list[list[int]]:
    """Prefixes of each text: each kind alone, none, two infixes and, with learned positions, both kinds."""
    both = [4, 2, 1] if base.handle.infix.place == prefixfast.attention.plan.INFIX else [4, 2]
    return [[0], [1], [0], [3], [], [0, 1], both]


def packed(base, prefixes, chosen, *, splits=SPLITS, backend=None, grad=False):
    """Logits of all texts in one forward, and keys and values of all prefixes."""
    kv = [tuple(t.requires_grad_(grad) for t in kv) for kv in concat_kv(prefixes, base.layers, base.dtype, base.device)]
    use = PrefixUse(
        np.cumsum([0, *map(len, chosen)], dtype=np.int32), np.array(list(itertools.chain(*chosen)), np.int32)
    )
    plan = training_plan(
        np.array([len(t) for t in TEXTS], np.int32),
        use,
        row_table(prefixes, base),
        kv,
        backend=backend or base.backend,
        last_prompt_token=np.array(splits, np.int32),
    )
    return base.forward(plan, torch.tensor(list(itertools.chain(*TEXTS)))), kv


def error(got, expected) -> float:
    return float(((got - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_mixed_packed_forward_equals_each_text_alone(pair, backend):
    base, own = pair
    prefixes, chosen = mixture(base), uses(base)
    got, kv = packed(base, prefixes, chosen, backend=prefixfast.attention.ops.Backend(backend), grad=True)
    rows = infixes.leaves(prefixes, len(base.layers), grad=True)
    parts = [
        infixes.logits(own, [prefixes[i] for i in mine], ids, split, [rows[i] for i in mine])
        for ids, split, mine in zip(TEXTS, SPLITS, chosen, strict=True)
    ]
    expected = torch.cat(parts)
    assert error(got, expected) < 1e-6
    weight = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(2))
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    for i, pair_of_layer in enumerate(kv):
        for j, t in enumerate(pair_of_layer):
            wanted = torch.cat([own_rows[i][j].grad for own_rows in rows if own_rows[i] is not None])
            assert error(t.grad, wanted) < 1e-6, (i, j)


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_triton_equals_torch_through_a_model(family):
    pytest.importorskip("triton")
    runs = []
    for backend in ("torch", "triton"):
        with prefixfast.load(tiny.make(family), backend=backend) as base:
            got, kv = packed(base, mixture(base), uses(base), grad=True)
            got.logsumexp(-1).sum().backward()
            runs.append([got, *(t.grad for pair in kv for t in pair)])
    assert all(error(a, b) < 1e-5 for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("mistake", ["seen by all", "one token late", "positions of a prefix"])
def test_a_planted_mistake_is_found(pair, mistake):
    base, own = pair
    infix = infixes.make(base, 5, 1)
    wrong = {"seen by all": 0, "one token late": 6}.get(mistake, 5)
    splits = [min(wrong, n - 1) for n in LENGTHS]
    prefixes = [infixes.make(base, 5, 1, pos_start=6) if mistake == "positions of a prefix" else infix]
    got, _ = packed(base, prefixes, [[0], *[[]] * (len(TEXTS) - 1)], splits=splits)
    expected = infixes.logits(own, [infix], TEXTS[0], 5)
    assert error(got[: len(TEXTS[0])], expected) > 1e-3


def test_generation_equals_the_oracle(pair):
    base, own = pair
    prefixes, chosen = mixture(base), uses(base)
    given = [[prefixes[i] for i in mine] for mine in chosen]
    expected = [infixes.greedy(own, mine, ids, NEW) for mine, ids in zip(given, TEXTS, strict=True)]
    for tokens in (512, 8):  # the prompts of a step at once, and in chunks
        with Engine(base, max_num_batched_tokens=tokens, max_num_seqs=4) as engine:
            outputs = engine.generate(TEXTS, given, max_new_tokens=NEW, min_new_tokens=NEW)
            assert [list(o.token_ids) for o in outputs] == expected
    beams = [infixes.beams(own, mine, ids, 4, 3) for mine, ids in zip(given, TEXTS, strict=True)]
    with Engine(base, max_num_seqs=8) as engine:
        outputs = engine.generate(TEXTS, given, max_new_tokens=4, min_new_tokens=4, num_beams=3)
        assert [list(o.token_ids) for o in outputs] == beams


def test_scores_equal_the_oracle(pair):
    base, own = pair
    prefixes, chosen = mixture(base), uses(base)
    given = [[prefixes[i] for i in mine] for mine in chosen]
    targets = [[7, 8, 9], [10], [11, 12], [13], [14], [15, 16], [17]]
    scores = prefixfast.score(TEXTS, given, model=base, targets=targets)
    for score, mine, prompt, target in zip(scores, given, TEXTS, targets, strict=True):
        logits = infixes.logits(own, mine, prompt + target[:-1], len(prompt) - 1)[-len(target) :]
        expected = logits.log_softmax(-1)[range(len(target)), target]
        assert score.token_logprobs == pytest.approx(expected.tolist(), abs=1e-5)


def test_hf_generate_equals_the_oracle(pair):
    base, own = pair
    chosen = [infixes.make(base, 5, 1), None, infixes.make(base, 4, 3, position="prefix")]
    prompts = [TEXTS[0], TEXTS[4], TEXTS[5]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    with HFCache(base, chosen, max_len=64) as cache:
        out = base.hf.generate(ids, attention_mask=mask, past_key_values=cache, **how)
    expected = [infixes.greedy(own, [c] if c else [], p, NEW) for c, p in zip(chosen, prompts, strict=True)]
    assert out[:, longest:].tolist() == expected


HOW = {"learning_rate": 2e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "batch_size": 4, "max_steps": 5}
ROWS = [
    {"input_ids": ids, "labels": [-100] * (split + 1) + ids[split + 1 :]}
    for ids, split in zip(TEXTS, SPLITS, strict=True)
    if split < len(ids) - 1
][:4]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_equals_the_oracle(family):
    """Losses and rows of five steps, packed with prefixes of another run, equal AdamW on the oracle's leaves."""
    own = tiny.make(family, dtype=torch.float64)
    own.set_attn_implementation("sdpa")
    own.requires_grad_(False)
    with prefixfast.load(tiny.make(family, dtype=torch.float64)) as base:
        start, below = infixes.make(base, 4, 1), infixes.make(base, 3, 2)
        for before in ([], [below]):
            rows = infixes.leaves([start], len(base.layers), grad=True)
            frozen = infixes.leaves(before, len(base.layers))
            optimizer = torch.optim.AdamW([t for kv in rows[0] for t in kv], lr=2e-2, weight_decay=0.01)
            for _ in range(5):
                lost, count = 0.0, 0
                for row in ROWS:
                    ids, labels = row["input_ids"], torch.tensor(row["labels"])
                    first = int((labels >= 0).nonzero()[0])
                    logits = infixes.logits(own, [*before, start], ids, first - 1, [*frozen, *rows])
                    lost += F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
                    count += int((labels >= 0).sum())
                optimizer.zero_grad()
                (lost / count).backward()
                torch.nn.utils.clip_grad_norm_([t for kv in rows[0] for t in kv], 1.0)
                optimizer.step()
            how = {**HOW, "init": start, "reparameterization": "none", "weight_decay": 0.01, "max_grad_norm": 1.0}
            made = train(base, ROWS, on_top_of=before[0] if before else None, **how)
            assert made.position == "infix"
            for i, kv in enumerate(rows[0]):
                for x, t in zip("kv", kv, strict=True):
                    assert error(made.kv[f"self.{i}.{x}"], t) < 1e-5


def test_infixes_of_a_run_are_those_of_each_alone():
    with prefixfast.load(tiny.make("llama", dtype=torch.float64)) as base:
        how = {"position": "infix", "prefix_length": 4, "init": "random", "prefix_dropout": 0.1, "frozen_rows": 1}
        for kind in ({"reparameterization": "none"}, {"reparameterization": "mlp", "encoder_hidden_size": 8}):
            data = {"a": ROWS, "b": ROWS[1:], "c": ROWS[:2]}
            run = train(base, data, **{**HOW, **how, **kind})
            for name, rows in data.items():
                alone = train(base, rows, **{**HOW, **how, **kind})
                assert alone.position == "infix"
                assert all(error(run[name].kv[n], t) < 1e-6 for n, t in alone.kv.items())
            first = train(base, ROWS, **{**HOW, **how, **kind, "position": "prefix"})
            assert any(error(run["a"].kv[n], t) > 1e-3 for n, t in first.kv.items()), "the place changes the training"


def test_the_method_infix_is_the_position_infix():
    with prefixfast.load(tiny.make("gpt2", dtype=torch.float64)) as base:
        how = {**HOW, "prefix_length": 4, "init": "random", "reparameterization": "none"}
        runs = [train(base, ROWS, **how, **options) for options in ({"method": "infix"}, {"position": "infix"})]
        assert runs[0].digest == runs[1].digest
        assert (runs[0].position, runs[0].training["method"]) == ("infix", "infix")
        with pytest.raises(ConfigError, match="method 'infix' does not read it"):
            train(base, ROWS, **how, method="infix", position="prefix")
        with pytest.raises(ConfigError, match="position: the prefix in init has 'prefix', got 'infix'"):
            train(base, ROWS, max_steps=1, method="infix", init=infixes.make(base, 3, 1, position="prefix"))
        assert train(base, ROWS, max_steps=1, init=runs[0]).position == "infix"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_of_one_token_sees_an_infix_as_a_prefix(family):
    with prefixfast.load(tiny.make(family)) as base:
        kinds = [infixes.make(base, 5, 1, position=position) for position in ("infix", "prefix")]
        same = [prefixfast.generate([[9]], kind, model=base, max_new_tokens=5)[0].token_ids for kind in kinds]
        longer = [prefixfast.generate([[9, 8, 7]], kind, model=base, max_new_tokens=5)[0].token_ids for kind in kinds]
        assert same[0] == same[1]
        assert longer[0] != longer[1]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompts_before_an_infix_are_not_shared(family):
    with prefixfast.load(tiny.make(family)) as base:
        infix = infixes.make(base, 5, 1)
        prompts = [[*TEXTS[3][:14], i] for i in (5, 6, 7)]
        runs = []
        for options in ({}, {"share_prompts": 4}):
            with Engine(base, **options) as engine:
                runs.append([o.token_ids for o in engine.generate(prompts, infix, max_new_tokens=5)])
        assert runs[0] == runs[1]


def test_what_is_not_shown_to_be_right_is_refused():
    with prefixfast.load(tiny.make("mistral")) as base:
        with pytest.raises(ConfigError, match="sliding windows"):
            train(base, ROWS, position="infix")
        with pytest.raises(BaseMismatchError, match="sliding windows"):
            prefixfast.generate([[5, 6]], infixes.make(base, 3, 1), model=base, max_new_tokens=2)
    with prefixfast.load(tiny.make("llama")) as base:
        both = [infixes.make(base, 3, 2, position="prefix"), infixes.make(base, 3, 1)]
        with pytest.raises(RequestError, match="request 1: a prefix and an infix"):
            prefixfast.generate([[5, 6], [5, 6]], [None, both], model=base, max_new_tokens=2)
        with pytest.raises(RequestError, match="a prefix and an infix"):
            prefixfast.score([[5, 6]], [both], model=base, targets=[[7]])
        with pytest.raises(ConfigError, match="a prefix and an infix"), HFCache(base, [both], max_len=16) as cache:
            base.hf.generate(torch.tensor([[5, 6]]), past_key_values=cache, max_new_tokens=2)
        with pytest.raises(ConfigError, match="a prefix and an infix"):
            train(base, ROWS, on_top_of=both[0], position="infix")
        with pytest.raises(ConfigError, match="which no prefix follows"):
            Prefix.from_text(base, [5, 6, 7], after=both[1])
        turns = {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [-100, 6, -100, -100, 9, 10]}
        with pytest.raises(prefixfast.errors.DataError, match="one target of a row"):
            train(base, [turns], position="infix", max_steps=1)
        with pytest.raises(RequestError, match="one target of a row"):
            prefixfast.score([turns], both[1], model=base)
