"""A composed request gives the same bits whatever its engine has met, loaded or evicted before."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

import tiny
from prefixfast import Engine, Prefix, _rust, load
from prefixfast.attention import cpu_decode

IDS = [5, 9, 11, 30]
COMPOSED = [(0, 1), (1, 0), (2, 0, 1), (0, 0), (1, 2, 1)]


@pytest.fixture(scope="module")
def prefixes() -> list[Prefix]:
    """Prefixes of different lengths for a tiny Llama; the last one leaves a layer out."""
    g = torch.Generator().manual_seed(0)

    def make(rows: int, layers: tuple[int, ...]) -> Prefix:
        kv = {f"self.{i}.{x}": torch.randn(rows, 2, 8, generator=g) * 0.7 for i in layers for x in "kv"}
        return Prefix(kv, pos_start=rows)

    return [make(9, (0, 1, 2)), make(70, (0, 1, 2)), make(20, (0, 2))]


@pytest.fixture(scope="module", params=["auto", "torch"])
def model(request):
    with load(tiny.make("llama"), dtype="float32", backend=request.param) as loaded:
        yield loaded


def results(engine, compositions, prefixes):
    """Token ids and log-probabilities of a batch with one request for each composition."""
    batch = [IDS[: 2 + i % 3] for i in range(len(compositions))]
    own = [[prefixes[p] for p in numbers] for numbers in compositions]
    made = engine.generate(batch, own, max_new_tokens=4, logprobs=2)
    return [(g.token_ids, g.logprobs) for g in made]


@pytest.mark.parametrize("path", _rust.attend_paths())
def test_engines_that_met_prefixes_in_other_orders(model, prefixes, path, monkeypatch):
    monkeypatch.setattr(cpu_decode, "decode", functools.partial(cpu_decode.decode, path=path))
    together, alone = [], []
    for order in itertools.permutations(range(3)):
        with Engine(model, max_num_seqs=16) as engine:
            for p in order:
                engine.generate([IDS], prefixes[p], max_new_tokens=2)
            together.append(results(engine, COMPOSED + COMPOSED[:2] + [(1,), ()], prefixes))
            alone.append([results(engine, [numbers], prefixes) for numbers in COMPOSED])
    assert all(other == together[0] for other in together[1:])
    assert all(other == alone[0] for other in alone[1:])
    assert together[0][0] != together[0][1], "another composition gives another result, so the test can fail"


def test_eviction_and_reload(model, prefixes):
    with Engine(model) as engine:
        before = [results(engine, [numbers], prefixes) for numbers in COMPOSED]
        for p in (0, 2):
            engine.evict(prefixes[p])
        engine.generate([IDS], prefixes[2], max_new_tokens=2)
        assert [results(engine, [numbers], prefixes) for numbers in COMPOSED] == before


def test_scores(model, prefixes):
    """The first request of a batch numbers its prefixes first."""
    p, q, _ = prefixes
    with Engine(model) as engine:
        scores = [engine.score([IDS] * 3, [own, [p, q], [q, p]], targets=[[7, 8, 9]] * 3) for own in ([p], [q], [q, p])]
    for other in scores[1:]:
        assert [s.token_logprobs for s in other[1:]] == [s.token_logprobs for s in scores[0][1:]]


def test_a_prefix_composed_with_itself_equals_its_concatenation(model, prefixes):
    with Engine(model) as engine:
        for own in ([0, 0], [1, 0, 1], [0, 0, 0]):
            joined = prefixes[own[0]].concat(*(prefixes[p] for p in own[1:]))
            composed = [prefixes[p] for p in own]
            for batch, parts in (([IDS], [composed, [joined]]), ([IDS] * 2, [composed, [joined]])):
                texts = [engine.generate(batch, [p] * len(batch), max_new_tokens=5) for p in parts]
                assert [g.token_ids for g in texts[0]] == [g.token_ids for g in texts[1]]
            scores = engine.score([IDS] * 2, [composed, joined], targets=[[7, 8, 9]] * 2)
            assert scores[0].token_logprobs == pytest.approx(scores[1].token_logprobs, abs=1e-4)
            assert scores[0].usage["prefix_rows"] == joined.length
        (found,) = [r for r in engine.resident() if r.digest == prefixes[1].digest]
        assert found.requests == 0
