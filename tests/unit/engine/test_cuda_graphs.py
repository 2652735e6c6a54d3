"""Decode steps on static memory, with tokens that are read one step late.

On a CPU the steps run eagerly instead of being captured. All else is as on a GPU.
"""

from dataclasses import replace

import pytest
import torch

import prefixfast
import tiny
from mixes import prefixes_of
from prefixfast import Engine
from prefixfast.attention.plan import section
from prefixfast.config import EngineConfig
from prefixfast.engine import cuda_graphs, decode_batch
from prefixfast.engine import loop as loop_module
from prefixfast.engine.cuda_graphs import eager_reason
from prefixfast_kernels.tile_selection import DecodeSizes

END_IDS = list(range(2, 12))  # so many end tokens that requests end early, at different times


def make(family: str):
    base = tiny.make(family)
    base.generation_config.eos_token_id = END_IDS
    return base


def mix(base):
    """Requests with prompts of different lengths and different prefixes, one of them with beams."""
    g = torch.Generator().manual_seed(1)
    own = prefixes_of(base, 3)
    chosen = [None, own[1], [own[0], own[2]], own[1], own[4], [own[5], own[0], own[3]], own[1], None]
    batch = [
        {"input_ids": torch.randint(12, tiny.VOCAB, (n,), generator=g).tolist()} for n in (3, 20, 1, 7, 15, 2, 30, 4)
    ]
    for i, item in enumerate(batch):
        item["params"] = {"max_new_tokens": 2 + 2 * i, "num_beams": 3 if i == 2 else 1}
    batch[3]["params"]["min_new_tokens"] = 7
    return batch, chosen


@pytest.fixture(scope="module")
def expected():
    """Tokens of each family's mix by the eager steps of a CPU."""
    out = {}
    for family in ("gpt2", "gemma2", "llama"):
        base = make(family)
        with Engine(base, max_num_seqs=5, max_model_len=64) as engine:
            out[family] = [g.token_ids for g in engine.generate(*mix(base))]
    return out


@pytest.fixture
def static(expected, monkeypatch):
    """Engines whose decode steps run on static memory, one step ahead."""
    monkeypatch.setattr(loop_module, "eager_reason", lambda *_: None)
    return expected


def attached(base, backend: str):
    """A base model with the decode tables of the triton kernels on any backend."""
    model = prefixfast.load(base, backend=backend)
    if backend != "triton":
        model.backend = replace(model.backend, decode=DecodeSizes(16, 4, 256, 0, 0, 0))
    return model


@pytest.mark.parametrize(("family", "backend"), [("gpt2", "torch"), ("gemma2", "torch"), ("gemma2", "triton")])
def test_static_steps_give_the_same_tokens(family, backend, static):
    count = 8
    if backend == "triton":
        pytest.importorskip("triton")
        count = 4  # its interpreter is slow
    base = make(family)
    batch, chosen = (x[:count] for x in mix(base))
    with attached(base, backend) as model, Engine(model, max_num_seqs=5, max_model_len=64) as engine:
        for prefix in {id(p): p for own in chosen if own for p in (own if isinstance(own, list) else [own])}.values():
            engine.pin(prefix)  # loaded before the first step, so that the rows of a step depend on no thread's speed
        results = engine.generate(batch, chosen)
        assert [r.token_ids for r in results] == static[family][:count]
        made = engine.loop.runner.graphs.steps
        assert {choose for _, choose in made} == {True, False}, "steps with and without chosen tokens"
        if backend == "torch":
            assert {r.finish_reason for r in results} == {"stop", "length"}
            assert {rows for rows, _ in made} >= {4, 5}, "several padded numbers of rows"
            before = dict(made)
            assert [r.token_ids for r in engine.generate(batch, chosen)] == static[family]
            same = [made[key] is step for key, step in before.items() if made[key].layout == step.layout]
            assert all(same), "no layout is captured twice"
        assert not engine.loop.unread
        assert not engine.loop.committed
        assert not engine.loop.outputs.sequences


def test_tables_are_captured_with_padding_rows_in_every_view(static):
    base = make("gpt2")
    with attached(base, "torch") as model, Engine(model, max_num_seqs=5, max_model_len=64) as engine:
        engine.generate(*mix(base))
        found = engine.loop.runner.graphs
        layouts = [s.layout for s in found.steps.values()]
        assert {len(layout.views) for layout in layouts} == {2}, "a prefix of the mix has no rows in some layers"
        for layout in layouts:
            fresh = found._make(layout, choose_tokens=True)
            for view in layout.views:
                assert (section(fresh.tables, view["work"])[:, 0] == -1).all()
                assert (section(fresh.tables, view["row"]) == 5).all()
                assert (section(fresh.tables, view["lens"]) == 1).all()


def test_tokens_are_wrong_if_read_after_the_next_step_overwrote_them(static, monkeypatch):
    class LateCopy:
        def __init__(self, source) -> None:
            self.source = source

        def values(self) -> list[int]:
            return self.source.tolist()

    monkeypatch.setattr(decode_batch, "HostCopy", LateCopy)
    base = make("gpt2")
    with attached(base, "torch") as model, Engine(model, max_num_seqs=5, max_model_len=64) as engine:
        assert [r.token_ids for r in engine.generate(*mix(base))] != static["gpt2"]


def failing_compiler(_graph, _inputs):
    msg = "no compiler here"
    raise RuntimeError(msg)


# "eager" traces the whole step as inductor does. "aot_eager" would copy the KV arena, run the step on the copy and copy
# it back over what the loader's thread has written meanwhile; inductor writes in place.
@pytest.mark.parametrize("compiler", ["eager", failing_compiler], ids=["works", "fails"])
def test_compiled_steps_give_the_same_tokens(compiler, static, monkeypatch, caplog):
    monkeypatch.setattr(cuda_graphs, "COMPILER", compiler)
    base = make("llama")
    how = {"max_num_seqs": 5, "max_model_len": 64, "prepack": False, "compile_decode": True}
    with attached(base, "torch") as model, Engine(model, **how) as engine:
        assert [r.token_ids for r in engine.generate(*mix(base))] == static["llama"]
        assert (engine.loop.runner.graphs.compiled is not None) == (compiler == "eager")
    assert ("not compiled" in caplog.text) == (compiler != "eager")


def test_a_step_starts_before_the_tokens_of_the_previous_step_are_read(monkeypatch):
    events = []
    base = make("gpt2")
    with Engine(base, max_num_seqs=2, max_model_len=64) as engine:
        engine.loop.run_ahead = True
        forward, read = engine.model.forward, decode_batch.HostCopy.values
        monkeypatch.setattr(engine.model, "forward", lambda *args: (events.append("start"), forward(*args))[1])
        monkeypatch.setattr(decode_batch.HostCopy, "values", lambda self: (events.append("read"), read(self))[1])
        (result,) = engine.generate([[50, 51]], max_new_tokens=8, min_new_tokens=8)
        assert len(result.token_ids) == 8
    assert events == ["start", *["start", "read"] * 7, "read"]


def test_a_request_that_ends_early_is_decoded_once_more():
    base = make("gpt2")
    with Engine(base, max_num_seqs=2, max_model_len=64) as engine:
        (plain,) = engine.generate([[50, 51]], max_new_tokens=40)
        assert plain.finish_reason == "stop"
        once = engine.stats()["decoded_rows"]
        engine.loop.run_ahead = True
        assert engine.generate([[50, 51]], max_new_tokens=40)[0].token_ids == plain.token_ids
        assert engine.stats()["decoded_rows"] == 2 * once + 1


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_a_dropped_request_has_all_its_tokens(reason):
    base = make("gpt2")
    with Engine(base, max_num_seqs=2, max_model_len=64) as engine:
        full = engine.generate([[50, 51]], max_new_tokens=40, min_new_tokens=40)[0].token_ids
        engine.loop.run_ahead = True
        ticket = engine.submit(
            [50, 51], max_new_tokens=40, min_new_tokens=40, timeout=0.02 if reason == "deadline" else None
        )
        if reason == "cancelled":
            ticket.cancel()
        got = ticket.result(60)
        assert got.finish_reason in (reason, "length")
        assert got.token_ids == full[: len(got.token_ids)]
        assert not engine.loop.committed
        assert engine.generate([[50, 51]], max_new_tokens=40, min_new_tokens=40)[0].token_ids == full


def test_reasons_for_eager_steps():
    with prefixfast.load(tiny.make("gpt2")) as model, Engine(model, max_num_seqs=2, max_model_len=16) as engine:
        assert eager_reason(model, engine.config) == "CUDA graphs need a GPU"
        assert eager_reason(model, EngineConfig(enforce_eager=True)) == "enforce_eager=True"
        assert engine.loop.runner.graphs is None
