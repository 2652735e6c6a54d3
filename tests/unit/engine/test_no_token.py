"""Logits of which no token follows, NaN or -infinity everywhere, fail their request and leave the others alone."""

import pytest
import torch

from prefixfast import Engine, Prefix, RequestError, score

CHOICES = {
    "greedy": {},
    "log-probabilities": {"logprobs": 1},
    "penalty": {"repetition_penalty": 1.3},
    "sampling": {"do_sample": True, "seed": 1},
    "samples": {"do_sample": True, "seed": 1, "num_return_sequences": 2},
    "beams": {"num_beams": 3},
}
PROMPTS = ["ab", "cde", "f"]
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def overflowing(make_prefix):
    """Prefix of finite numbers whose products are not."""
    return Prefix({n: torch.full_like(t, 3e38) for n, t in make_prefix(1).kv.items()}, pos_start=4)


@pytest.mark.parametrize("run_ahead", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_logits_that_are_nan_fail_their_request_only(base, overflowing, choice, run_ahead):
    how = {"max_new_tokens": 5, "progress": False, **CHOICES[choice]}
    with Engine(base, max_num_seqs=12, max_model_len=64) as engine:
        engine.loop.run_ahead = run_ahead
        expected = engine.generate(PROMPTS, **how)
        got = engine.generate(PROMPTS, [None, overflowing, None], on_error="return", **how)
        assert [g.finish_reason == "error" for g in got] == [False, True, False]
        assert [got[i].texts for i in (0, 2)] == [expected[i].texts for i in (0, 2)]
        with pytest.raises(RequestError):
            engine.submit("cde", overflowing, max_new_tokens=5, **CHOICES[choice]).result(30)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("choice", CHOICES)
def test_a_processor_that_excludes_every_token_after_some_fails_its_request(base, choice, value):
    def exclude(ids, scores):
        return torch.full_like(scores, value) if ids.shape[1] > len("cde") + 1 else scores

    how = {"max_new_tokens": 5, "min_new_tokens": 5, **CHOICES[choice]}
    with Engine(base, max_num_seqs=12, max_model_len=64) as engine:
        other = engine.submit("ab", **how)
        with pytest.raises(RequestError):
            engine.submit("cde", logits_processor=[exclude], **how).result(30)
        assert other.result(30).texts == engine.generate(["ab"], progress=False, **how)[0].texts


def test_a_processor_may_force_a_token_with_infinity(base):
    def force(ids, scores):
        scores[:, 7] = float("inf")
        return scores

    with Engine(base, max_model_len=64) as engine:
        assert engine.submit("ab", max_new_tokens=3, logits_processor=[force]).result(30).token_ids == [7, 7, 7]


def test_scores_that_are_nan_are_an_error(base, overflowing):
    with pytest.raises(RequestError) as caught:
        score(["ab", "cd"], [None, overflowing], targets=["e", "f"], model=base)
    assert caught.value.index == 1
