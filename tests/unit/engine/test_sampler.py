"""Sampling: kept tokens are those of transformers, frequencies match probabilities, rows are independent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prefixfast.config import GenerationParams
from prefixfast.counter_rng import uniform
from prefixfast.engine import sampler as sampler_module
from prefixfast.engine.sampler import Sampler, keep_min_p, keep_top_k, keep_top_p, sample_inverse_cdf

CHI_999 = {9: 27.88, 19: 43.82}  # 99.9 % points of chi-square by degrees of freedom


@pytest.mark.parametrize("vocab", [7, 300, 3000])
@pytest.mark.parametrize("k", [0, 1, 5, 10_000])
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize("low", [0.0, 0.05, 1.0])
def test_kept_tokens_are_those_of_transformers(vocab, k, p, low):
    g = torch.Generator().manual_seed(vocab)
    scores = torch.randn(4, vocab, generator=g) * torch.tensor([0.01, 1.0, 3.0, 10.0])[:, None]
    warpers = LogitsProcessorList([TemperatureLogitsWarper(0.7)])
    warpers += [TopKLogitsWarper(k)] if k else []
    warpers += [TopPLogitsWarper(p)] if p < 1 else []
    warpers += [MinPLogitsWarper(low)] if low else []
    expected = warpers(torch.zeros(4, 1, dtype=torch.long), scores.clone())
    ours = keep_min_p(
        keep_top_p(keep_top_k(scores / 0.7, torch.full((4,), k)), torch.full((4,), p)), torch.full((4,), low)
    )
    # Where a running sum is within rounding of p, either side may keep the token.
    sums = (scores / 0.7).softmax(-1).sort(-1, descending=True)[0].double().cumsum(-1)
    if ((sums - p).abs().amin(-1) > 1e-6).all() or p == 1:
        assert torch.equal(ours, expected)
    assert (ours.isfinite().sum(-1) - expected.isfinite().sum(-1)).abs().max() <= 1


def test_top_p_of_a_flat_distribution_sorts_the_whole_vocabulary(monkeypatch):
    scores = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    whole = keep_top_p(scores, torch.tensor([0.99, 0.01, 0.5]))
    monkeypatch.setattr(sampler_module, "TOP_P_CANDIDATES", 5000)
    assert torch.equal(whole, keep_top_p(scores, torch.tensor([0.99, 0.01, 0.5])))
    assert whole.isfinite().sum(-1).tolist()[0] > 1024


def test_equally_likely_tokens_are_kept_together():
    scores = torch.zeros(1, 600)
    assert keep_top_k(scores, torch.tensor([3])).isfinite().all()
    assert keep_top_p(scores, torch.tensor([0.5])).isfinite().all()


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(0, 1), min_size=1, max_size=700), u=st.floats(0, 1, exclude_max=True))
def test_the_drawn_token_is_where_the_running_sum_exceeds_u(weights, u):
    total = sum(weights)
    if total < 1e-3:
        return
    p = torch.tensor([weights], dtype=torch.float64) / total
    token = int(sample_inverse_cdf(p, torch.tensor([u])))
    sums = torch.cat([torch.zeros(1), p[0].cumsum(0)])
    assert p[0, token] > 0
    assert sums[token] - 1e-9 <= u <= sums[token + 1] + 1e-9


def test_a_token_of_probability_zero_is_never_drawn():
    p = torch.tensor([[0.0, 0.4, 0.6, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    for u in (0.0, 1 - 2**-53, 1.0):
        assert all(
            p[i, t] > 0 for i, t in enumerate(sample_inverse_cdf(p, torch.full((3,), u, dtype=torch.float64)).tolist())
        )


def draw_many(params, count, vocab=20):
    """Draws of one row from fixed scores, each at its own step."""
    sampler, scores = (
        Sampler(1, torch.device("cpu")),
        torch.randn(1, vocab, generator=torch.Generator().manual_seed(3)) * 2,
    )
    sampler.set_row(0, params, 0)
    at = torch.zeros(count, dtype=torch.long)
    return sampler.draw(scores.expand(count, -1), at, torch.arange(count)), scores


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5])
@pytest.mark.parametrize(("fields", "cells"), [({"top_k": 0}, 20), ({"top_k": 10, "temperature": 1.7}, 10)])
def test_frequencies_match_probabilities(seed, fields, cells):
    params = GenerationParams(
        seed=seed, temperature=fields.get("temperature", 1.0), top_p=1.0, min_p=0.0, top_k=fields["top_k"]
    )
    count = 20_000
    tokens, scores = draw_many(params, count)
    kept = keep_top_k(scores / params.temperature, torch.tensor([params.top_k]))
    expected = kept.softmax(-1)[0].double() * count
    found = torch.bincount(tokens, minlength=20).double()
    assert found[expected == 0].sum() == 0
    on = expected > 5
    rest_found, rest_expected = found[~on].sum(), expected[~on].sum()
    chi = ((found[on] - expected[on]) ** 2 / expected[on]).sum() + (
        (rest_found - rest_expected) ** 2 / rest_expected if rest_expected > 1 else 0
    )
    assert chi < CHI_999[cells - 1]


def test_random_numbers_are_uniform_and_independent():
    u = uniform(torch.arange(200)[:, None], torch.arange(500)[None])
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert ((counts - u.numel() / 20) ** 2 / (u.numel() / 20)).sum() < CHI_999[19]
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        assert (
            abs(float(((a - 0.5) * (b - 0.5)).mean()) * 12) < 0.015
        )  # correlation; three standard deviations are 0.01 for 100,000 numbers
    assert len(u.unique()) == u.numel()


def test_a_row_draws_the_same_tokens_in_any_batch():
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(6, 2000, generator=g) * 3
    settings_ = [
        GenerationParams(
            seed=i,
            temperature=0.5 + i / 3,
            top_k=(0, 3, 50, 1500, 0, 7)[i],
            top_p=(1.0, 0.3, 0.95, 1.0, 0.8, 0.99)[i],
            min_p=0.0 if i % 2 else 0.01,
        )
        for i in range(6)
    ]
    sampler = Sampler(6, torch.device("cpu"))
    for i, p in enumerate(settings_):
        sampler.set_row(i, p, 0)
    together = [sampler.draw(scores, torch.arange(6), torch.full((6,), c)).tolist() for c in range(20)]
    for i in range(6):
        alone = [int(sampler.draw(scores[i : i + 1], torch.tensor([i]), torch.tensor([c]))) for c in range(20)]
        assert alone == [step[i] for step in together]
    assert len({tuple(step[i] for step in together) for i in range(6)}) == 6


def test_samples_of_one_request_differ():
    sampler, scores = Sampler(2, torch.device("cpu")), torch.zeros(2, 1000)
    for row in (0, 1):
        sampler.set_row(row, GenerationParams(seed=5, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0), row)
    tokens = torch.stack([sampler.draw(scores, torch.arange(2), torch.full((2,), c)) for c in range(10)])
    assert (tokens[:, 0] != tokens[:, 1]).any()
