"""What an engine of an encoder-decoder base takes, refuses and frees."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

import seq2seq
from prefixfast import CapacityError, ConfigError, Engine, Model, Prefix, RequestError, load
from prefixfast.engine.arena_sites import prefix_run
from prefixfast.engine.explain import SOURCE_LENGTH, max_source_tokens
from prefixfast.engine.kv_arena import bytes_per_row, check_widths, cross_rows
from prefixfast.model.seq2seq import stacks
from prefixfast.store import PrefixStore

TEXT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def bart():
    with load(seq2seq.make_seq2seq("bart")) as base:
        yield base


@pytest.fixture(scope="module")
def prefix(bart) -> Prefix:
    return seq2seq.random_prefix(bart.hf, {"enc": 17, "self": 5, "cross": 2}, pos_start=5)


def engine(base, **options) -> Engine:
    return Engine(base, **{"max_num_seqs": 8, "max_model_len": 16, "max_num_batched_tokens": 64, **options})


def arena_rows(made: Engine, prefix: Prefix) -> list[torch.Tensor]:
    """Rows of a resident prefix in all tensors of the arena."""
    cache = made.loop.prefix_cache
    start, _ = made.loop.scheduler.prefix_state(cache.numbers[prefix.digest])
    rows = slice(start, start + prefix_run(prefix, made.model.sites).rows)
    return [t[rows] for kv in made.loop.arena.layers for t in kv]


def test_pinned_prefixes_are_loaded_and_evicted_ones_are_gone(bart, prefix):
    with engine(bart) as made:
        before = made.generate([TEXT], prefix, max_new_tokens=6)[0].token_ids
        made.pin(prefix)
        (resident,) = made.resident()
        run = prefix_run(prefix, bart.sites)
        assert (resident.rows, resident.pinned) == (run.rows, True)
        assert resident.nbytes == run.rows * bytes_per_row(bart)
        views = arena_rows(made, prefix)
        assert all(t.nan_to_num().any() for t in views)  # rows between two sites hold what the memory held before
        made.unpin(prefix)
        assert made.evict(prefix)
        assert all(t.eq(0).all() for t in views), "keys of every site are personal data"
        assert made.resident() == []
        assert made.generate([TEXT], prefix, max_new_tokens=6)[0].token_ids == before


def test_prefixes_of_a_store_by_name(bart, prefix, tmp_path):
    store, cross = PrefixStore(tmp_path / "store"), seq2seq.random_prefix(bart.hf, {"cross": 4}, pos_start=0, seed=5)
    store.put("three", prefix)
    store.put("cross", cross)
    with engine(bart) as made:
        expected = made.generate([TEXT, TEXT], [prefix, cross], max_new_tokens=6)
    with engine(bart, store=tmp_path / "store") as made:
        rows = [{"input_ids": TEXT, "prefix": name} for name in ("three", "cross")]
        got = made.generate(rows, max_new_tokens=6)
        assert made.stats()["reads"] == 2
    assert got[0].token_ids == expected[0].token_ids
    assert got[1].token_ids == expected[1].token_ids
    assert [g.usage["prefix_rows"] for g in got] == [prefix.num_rows, 4]


def test_cross_rows_are_those_that_a_request_takes(bart):
    size = bytes_per_row(bart)
    rows = cross_rows(SOURCE_LENGTH)
    assert (cross_rows(1), cross_rows(16), cross_rows(17), rows) == (16, 16, 32, 512)
    with engine(bart) as made:
        text = made.explain()
    assert f"{SOURCE_LENGTH} tokens take {rows} rows, {rows * size} bytes" in text["cross"]
    assert f"at most {64 - 8} tokens" in text["encoder"]
    positions = bart.seq2seq.encoder_positions
    with engine(bart, max_num_batched_tokens=2 * positions) as made:
        assert f"at most {positions} tokens; the positions" in made.explain()["encoder"]
    # An arena that holds exactly these rows and one unit of the decoder takes the text, and none more. The last 64 rows
    # are never used.
    for length, fits in ((48, True), (49, False)):
        with engine(bart, kv_cache_memory=(64 + cross_rows(48) + 16) * size, max_num_seqs=1) as made:
            (got,) = made.generate([[5] * length], max_new_tokens=3, on_error="return")
        assert (got.error is None) == fits, got


def test_rows_are_freed_however_a_request_ends(bart, prefix):
    size = bytes_per_row(bart)
    run = prefix_run(prefix, bart.sites).rows
    room = 80 + cross_rows(run) + 2 * (cross_rows(20) + 16)  # two requests at a time
    with engine(bart, kv_cache_memory=room * size, max_num_seqs=2) as made:
        expected = made.generate([[5] * 20], prefix, max_new_tokens=9)[0].token_ids
        for timeout in (0, None):
            tickets = [made.submit([5] * 20, prefix, max_new_tokens=9, timeout=timeout) for _ in range(6)]
            for ticket in tickets[::2]:
                ticket.cancel()
            for ticket in tickets:
                ticket.result(60)
        failing = made.generate(
            [[5] * 20] * 4, prefix, max_new_tokens=9, logits_processor=[_Fails()], on_error="return"
        )
        assert all(g.finish_reason == "error" for g in failing)
        got = made.generate([[5] * 20] * 4, prefix, max_new_tokens=9)
    assert [g.token_ids for g in got] == [expected] * 4


class _Fails:
    def __call__(self, ids, scores):
        raise ZeroDivisionError


def test_parts_of_an_encoder_forward_change_no_bit(bart, prefix, monkeypatch):
    texts, prefixes = [[5, 6, 7], [8], [9, 5, 6, 4, 4, 7], [6, 5], [7]], [None, prefix, prefix, None, None]
    found, forwards = [], []
    for most in (1024, 7, 1):
        monkeypatch.setattr(stacks, "PART_TOKENS", most)
        with engine(bart) as made:
            made.pin(prefix)
            made.generate([TEXT], prefix, max_new_tokens=1)  # which waits for the prefix
            with seq2seq.counted(bart.hf) as counts:
                rows = made.generate([{"input_ids": t} for t in texts], prefixes, max_new_tokens=6, logprobs=1)
            found.append([(g.token_ids, g.logprobs) for g in rows])
            forwards.append((counts["encoder"], counts["cross"]))
    num_layers = len(bart.sites["cross"])
    assert forwards == [(1, num_layers), (2, num_layers), (5, num_layers)]
    assert found[0] == found[1] == found[2]


def test_too_long_texts(bart, prefix):
    positions = bart.seq2seq.encoder_positions
    with engine(bart) as made:
        with pytest.raises(
            RequestError, match=rf"request 0: the encoder reads at most {positions} tokens, the text has"
        ):
            made.generate([[5] * (positions + 1)], max_new_tokens=2)
        (cut,) = made.generate([[5, 6, 7] * 30], max_source_length=9, max_new_tokens=4)
        assert cut.usage["prompt_tokens"] == 9
        assert cut.token_ids == made.generate([[5, 6, 7] * 3], max_new_tokens=4)[0].token_ids
        (kept,) = made.generate([[5, 6, 7, 8, 2]], max_source_length=3, max_new_tokens=4)
        assert kept.token_ids == made.generate([[5, 6, 2]], max_new_tokens=4)[0].token_ids, "the end token stays"
        with pytest.raises(RequestError, match="request 0: the encoder reads at most"):
            made.score([[5] * (positions + 1)], targets=[[5]])
        with pytest.raises(
            RequestError, match=r"the decoder's start token and 16 new ones exceed the limit of 16; lower"
        ):
            made.generate([TEXT], max_new_tokens=16)
        assert len(made.generate([TEXT], max_new_tokens=15, min_new_tokens=15)[0].token_ids) == 15
        short = Prefix(dict(prefix.kv), pos_start=5, decoding={"max_source_length": 9})
        cut, whole = made.score([[5, 6, 7] * 30, [5, 6, 7] * 3], short, targets=[[5], [5]])
        assert cut.token_logprobs == pytest.approx(whole.token_logprobs, abs=1e-6)
        assert cut.usage["prompt_tokens"] == 9
    with engine(bart, max_num_batched_tokens=20) as made:
        most = max_source_tokens(made.config)
        assert made.generate([[5] * most], max_new_tokens=2)
        with pytest.raises(CapacityError, match="max_num_batched_tokens") as caught:
            made.generate([[5] * (most + 1)], max_new_tokens=2)
        assert caught.value.limit == "encoder_tokens"


def test_the_decoder_starts_where_it_is_told(bart):
    ids = torch.tensor([TEXT])
    hf = seq2seq.make_seq2seq("bart")
    with seq2seq.oracle(hf, None), torch.no_grad():
        expected = hf.generate(
            input_ids=ids, decoder_start_token_id=7, use_cache=False, max_new_tokens=5, do_sample=False
        )
    with engine(bart) as made:
        got, usual = (
            made.generate([TEXT], max_new_tokens=5, logprobs=0, **how)[0] for how in ({"decoder_start_token_id": 7}, {})
        )
        assert got.token_ids == expected[0, 1 : 1 + len(got.token_ids)].tolist()
        assert abs(got.logprobs[0].logprob - usual.logprobs[0].logprob) > 1e-3
        vocabulary = bart.seq2seq.vocab_size
        with pytest.raises(RequestError, match=f"decoder_start_token_id: expected a token id below {vocabulary}"):
            made.generate([TEXT], decoder_start_token_id=vocabulary)


def test_a_base_without_a_start_needs_one():
    hf = seq2seq.make_seq2seq("mbart", decoder_start_token_id=None)
    hf.generation_config.decoder_start_token_id = None
    with load(hf) as base, engine(base) as made:
        with pytest.raises(RequestError, match=r"request 0: .*set decoder_start_token_id to"):
            made.generate([TEXT], max_new_tokens=3)
        kv = seq2seq.random_kv(base.hf, {"cross": 2})
        named = Prefix(kv, pos_start=0, decoding={"decoder_start_token_id": 9})
        assert made.generate([TEXT], named, max_new_tokens=3)[0].token_ids
        assert made.generate([TEXT], decoder_start_token_id=9, max_new_tokens=3)[0].token_ids


def test_what_cannot_be_is_refused_by_name(bart):
    with pytest.raises(ConfigError, match="share_prompts=4: expected 0 for an encoder-decoder base"):
        Engine(bart, share_prompts=4)
    with engine(bart) as made:
        assert "encoder-decoder bases run their decode steps eagerly" in made.explain()["decode step"]
        with pytest.raises(RequestError, match="request 0: expected texts, got a conversation"):
            made.generate([{"messages": [{"role": "user", "content": "a"}]}], max_new_tokens=1)


def test_streams_and_tickets(bart, prefix):
    with engine(bart) as made:
        expected = made.generate([TEXT], prefix, max_new_tokens=6)[0]
        ticket = made.submit(TEXT, prefix, max_new_tokens=6)
        assert ticket.result(60).token_ids == expected.token_ids
        assert np.array_equal(ticket.result(60).usage["prefix_rows"], prefix.num_rows)


def test_a_base_with_rows_of_several_widths_is_refused(bart):
    shape = bart.layers[0]
    for site, other in (("cross", replace(shape, num_kv_heads=2)), ("enc", replace(shape, num_kv_heads=5))):
        sites = {**bart.sites, site: (*bart.sites[site][:-1], other)}
        model = cast("Model", SimpleNamespace(sites=sites, layers=bart.layers))
        with pytest.raises(ConfigError, match=r"with rows of .* as in the decoder's self-attention"):
            check_widths(model)
    check_widths(bart)
    same_width = replace(shape, num_kv_heads=2, head_dim=16, value_dim=16)
    check_widths(cast("Model", SimpleNamespace(sites={**bart.sites, "enc": (same_width,)}, layers=bart.layers)))
