"""Generation with an encoder-decoder base against transformers' `generate` on the brute-force oracle."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import seq2seq
from prefixfast import Engine, Model, Prefix, RequestError, generate, load
from prefixfast.engine.engine import end_ids

NEW = 14
LENGTHS = (9, 4, 1, 17, 12)  # tokens of the texts
ALL = {"enc": 3, "self": 5, "cross": 2}
OTHER = {"enc": 17, "cross": 1}
LATE = [pytest.param(n, marks=() if n in ("bart", "t5") else pytest.mark.long) for n in seq2seq.NAMES]
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy with a minimum": {"min_new_tokens": 6, "no_repeat_ngram_size": 2},
    "greedy from a token to a token": {"forced_bos_token_id": 7, "forced_eos_token_id": 8},
    "beams": {"num_beams": 6},
    "short beams": {"num_beams": 6, "length_penalty": 0.8, "min_new_tokens": 4, "early_stopping": True},
    "long beams": {"num_beams": 6, "length_penalty": 2.0, "no_repeat_ngram_size": 3},
    "forced beams": {"num_beams": 6, "forced_bos_token_id": 7, "forced_eos_token_id": 2, "repetition_penalty": 1.2},
    "beams without tokens of the text": {"num_beams": 4, "encoder_no_repeat_ngram_size": 1, "early_stopping": "never"},
}


# Widths of 64, with which prepacked matrix products give the same bits for any number of rows.
WIDE = {
    "bart": {"d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 128},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 64, "vocab_size": 128},
}


class Setup:
    """A base, the same model unattached, texts and prefixes of a family."""

    def __init__(self, name: str, **config: int) -> None:
        self.hf = seq2seq.make_seq2seq(name, **config)
        self.base: Model = load(seq2seq.make_seq2seq(name, **config))
        self.texts = seq2seq.random_texts(LENGTHS, seed=3)
        start = 5 if name in seq2seq.DISTANCES else 0
        make = functools.partial(seq2seq.random_prefix, self.hf)
        a, b = make(ALL, pos_start=5, seed=1), make(OTHER, pos_start=start, seed=2)
        c = make({"self": 4}, pos_start=4, seed=3)
        self.prefixes: list[Prefix | None] = [a, None, b, c, a]
        self.composed = [c, a]

        self.known: dict[tuple[Any, ...], list[int]] = {}

    def alone(self, text: Tensor, prefix: Prefix | None, **how: Any) -> list[int]:
        """New tokens of transformers for one request, cut after an end token."""
        how = {"max_new_tokens": NEW, "num_beams": 1, **how}
        key = (*text.tolist(), None if prefix is None else prefix.digest, repr(sorted(how.items())))
        if key not in self.known:
            self.known[key] = theirs(self.hf, text, prefix, **how)
        return self.known[key]


def theirs(hf: PreTrainedModel, text: Tensor, prefix: Prefix | None, **how: Any) -> list[int]:
    with seq2seq.oracle(hf, prefix), torch.no_grad():
        out = hf.generate(input_ids=text[None], use_cache=False, do_sample=False, **how)
    row, ends = out[0, 1:].tolist(), end_ids(hf, None)
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)


def concatenated(parts: list[Prefix]) -> Prefix:
    """The prefix with the rows of all parts, the first part's first."""
    names = {name for p in parts for name in p.kv}
    kv = {name: torch.cat([p.kv[name] for p in parts if name in p.kv]) for name in names}
    return Prefix(kv, pos_start=max(p.pos_start for p in parts))


@functools.cache
def setup(name: str) -> Setup:
    return Setup(name)


def engine(base: Model, **options: Any) -> Engine:
    return Engine(base, **{"max_num_seqs": 32, "max_model_len": 32, **options})


def of_families(cases: Sequence[str], of_t5: Sequence[str]) -> list[Any]:
    """Family and case: all cases of BART and some of T5 are short tests, those of the other families are long."""

    def is_short(name: str, case: str) -> bool:
        return name == "bart" or (name == "t5" and case in of_t5)

    return [
        pytest.param(name, case, marks=() if is_short(name, case) else pytest.mark.long, id=f"{name}-{case}")
        for name in seq2seq.NAMES
        for case in cases
    ]


@pytest.mark.parametrize(("name", "case"), of_families(list(DECODING), ("greedy", "forced beams")))
def test_tokens_are_those_of_transformers(name, case):
    s, how = setup(name), DECODING[case]
    expected = [s.alone(t, p, **how) for t, p in zip(s.texts, s.prefixes, strict=True)]
    with engine(s.base) as made:
        got = made.generate([t.tolist() for t in s.texts], s.prefixes, max_new_tokens=NEW, **how)
    assert [g.token_ids for g in got] == expected
    assert len({t for row in expected for t in row}) >= 8, "texts of one token show little"
    assert [g.usage["prompt_tokens"] for g in got] == list(LENGTHS)
    assert [g.usage["prefix_rows"] for g in got] == [10, 0, 18, 4, 10]


@pytest.mark.parametrize("name", LATE)
def test_rows_of_every_site_are_read(name):
    s = setup(name)
    text, how = s.texts[0].tolist(), {"max_new_tokens": NEW, "logprobs": 0}
    with engine(s.base) as made:
        bare = made.generate([text], **how)[0].logprobs[0].logprob
        for site in seq2seq.SITES:
            start = ALL["self"] if site == "self" else 0
            one = seq2seq.random_prefix(s.hf, {site: ALL[site]}, pos_start=start, seed=4)
            (got,) = made.generate([text], one, **how)
            assert got.token_ids == s.alone(s.texts[0], one)
            assert abs(got.logprobs[0].logprob - bare) > 1e-3


@pytest.mark.parametrize(
    "config",
    [{"encoder_attention_heads": 2}, {"encoder_layers": 5}, {"encoder_layers": 1, "decoder_layers": 3}],
    ids=["other heads", "three folds", "a deep decoder"],
)
def test_encoders_of_another_shape_than_the_decoder(config):
    s = Setup("bart", **config)
    how = {"logprobs": 0, "max_new_tokens": NEW}
    with engine(s.base) as made:
        got = made.generate([t.tolist() for t in s.texts], s.prefixes, **how)
        swapped = made.generate([s.texts[0].tolist()], s.prefixes[2], **how)[0]
    assert [g.token_ids for g in got] == [s.alone(t, p) for t, p in zip(s.texts, s.prefixes, strict=True)]
    for g, text, prefix in zip((got[0], swapped), (s.texts[0],) * 2, (s.prefixes[0], s.prefixes[2]), strict=True):
        ids = torch.tensor([2, *g.token_ids[:-1]])
        with torch.no_grad():
            logp = seq2seq.logits_of(s.hf, text, ids, dict(prefix.kv), prefix.pos_start).log_softmax(-1)
        expected = logp[range(len(ids)), g.token_ids].tolist()
        assert [t.logprob for t in g.logprobs] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("name", [p if p == "bart" else pytest.param(p, marks=pytest.mark.long) for p in seq2seq.NAMES])
def test_requests_that_come_and_go(name):
    """Few decode rows, a small step and a small arena: requests wait, prefixes are evicted and rows are reused."""
    s = setup(name)
    each = [DECODING[case] for case in ("greedy", "beams", "greedy with a minimum", "short beams", "long beams")]
    wanted = [s.alone(t, p, **{"num_beams": 1, **how}) for t, p, how in zip(s.texts, s.prefixes, each, strict=True)]
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 40, "max_model_len": 16}
    rows = 80 + 16 * 13
    row_bytes = 2 * sum(x.num_kv_heads * x.head_dim for x in s.base.layers) * 4
    with engine(s.base, kv_cache_memory=rows * row_bytes, **options) as made:
        tickets = []
        for i in (3, 0, 4, 1, 2, 0, 1, 3, 2, 4) * 2:
            item = {"input_ids": s.texts[i].tolist(), "params": {"max_new_tokens": NEW, **each[i]}}
            tickets.append((i, made.submit(item, s.prefixes[i])))
            if len(tickets) % 7 == 0:
                tickets[-1][1].cancel()
        for place, (i, ticket) in enumerate(tickets, start=1):
            result = ticket.result(120)
            if result.finish_reason != "cancelled":
                assert result.token_ids == wanted[i], (place, i)
        stats = made.stats()
    assert stats["evictions"] > 0, "the arena must be too small for all prefixes"
    assert stats["steps"] > 40


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_composed_prefixes_are_their_concatenation(name):
    s = setup(name)
    joined, text = concatenated(s.composed), s.texts[0]
    with engine(s.base) as made:
        for how in ({}, {"num_beams": 3}):
            (got,) = made.generate([text.tolist()], [s.composed], max_new_tokens=NEW, **how)
            assert got.token_ids == s.alone(text, joined, **how)
            assert got.usage["prefix_rows"] == sum(p.num_rows for p in s.composed)


@pytest.mark.parametrize("name", LATE)
def test_the_encoder_runs_once_a_request(name):
    s = setup(name)
    depth = len(s.base.sites["cross"])
    text = s.texts[0].tolist()
    how = {"num_beams": 4, "max_new_tokens": 20, "min_new_tokens": 20}
    with engine(s.base) as made:
        with seq2seq.counted(s.base.hf) as counts:
            made.generate([text], s.prefixes[0], **how)
        assert counts == {"encoder": 1, "cross": depth}
        assert made.stats()["decoded_rows"] == 4 * 19
        made.generate([text] * 3, s.prefixes[:3], max_new_tokens=1)  # loads the prefixes
        before = made.stats()["prefill_tokens"]
        with seq2seq.counted(s.base.hf) as counts:  # three requests in one step
            made.generate([text, text[:3], text[1:]], s.prefixes[:3], **how)
        assert counts == {"encoder": 1, "cross": depth}
        assert made.stats()["prefill_tokens"] - before == 9 + 3 + 8 + 3, "texts and start tokens"


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_sample_is_the_same_alone_and_in_a_batch(name):
    s = Setup(name, **WIDE[name])
    how = {"do_sample": True, "temperature": 1.3, "top_k": 20, "max_new_tokens": NEW, "logprobs": 2}
    mixed = [{"input_ids": t.tolist(), "params": {"seed": i}} for i, t in enumerate(s.texts)]
    with engine(s.base) as made:
        alone = [made.generate([m], [p], **how)[0] for m, p in zip(mixed, s.prefixes, strict=True)]
        batch = [*mixed[::-1], {"input_ids": [9] * 11}, {"input_ids": [8], "params": {"do_sample": False}}]
        together = made.generate(batch, [*s.prefixes[::-1], None, s.prefixes[2]], **how)[:5][::-1]
        tickets = [made.submit(m, p, **how) for m, p in zip(mixed, s.prefixes, strict=True)]
        assert [t.result(60).token_ids for t in tickets] == [g.token_ids for g in alone]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    assert [g.logprobs for g in together] == [g.logprobs for g in alone], "to the bit"
    assert len({tuple(g.token_ids) for g in alone}) == len(alone)


def test_encoder_rows_in_several_runs_give_the_same_bits():
    """Pinned prefixes leave two holes of 80 rows and one of 64 to a text of 150 tokens, in which 64, 64 and 22 lie."""
    base = load(seq2seq.make_seq2seq("bart", **WIDE["bart"], max_position_embeddings=256))
    pins = [seq2seq.random_prefix(base.hf, {"self": 80}, pos_start=80, seed=i) for i in range(5)]
    text = [5 + i % 90 for i in range(150)]
    options = {"max_num_batched_tokens": 256, "max_model_len": 16}
    row_bytes = 2 * sum(x.num_kv_heads * x.head_dim for x in base.layers) * 4
    with engine(base, **options) as roomy, engine(base, kv_cache_memory=(64 + 464) * row_bytes, **options) as made:
        for pin in pins:
            made.pin(pin)
            made.generate([[5]], pin, max_new_tokens=1)
        for pin in pins[1::2]:
            made.unpin(pin)
            made.evict(pin)
        for how in ({"logprobs": 2}, {"num_beams": 2}):
            (expected,), (got,) = (e.generate([text], pins[0], max_new_tokens=NEW, **how) for e in (roomy, made))
            assert (got.token_ids, got.logprobs) == (expected.token_ids, expected.logprobs)
        assert made.stats()["evictions"] == 0, "the pinned prefixes stay where they are"


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_several_samples_share_one_encoder_run(name):
    s = setup(name)
    how = {"do_sample": True, "max_new_tokens": NEW, "seed": 4, "min_new_tokens": NEW}
    with engine(s.base) as made:
        (one,) = made.generate([s.texts[0].tolist()], s.prefixes[0], **how)
        with seq2seq.counted(s.base.hf) as counts:
            (several,) = made.generate([s.texts[0].tolist()], s.prefixes[0], num_return_sequences=3, **how)
    assert counts == {"encoder": 1, "cross": len(s.base.sites["cross"])}
    assert several.token_ids == one.token_ids
    assert several.usage["completion_tokens"] == 3 * NEW


def test_the_first_text_of_beams_is_the_best_and_the_others_follow():
    s, how = setup("bart"), {"num_beams": 4, "num_return_sequences": 3}
    with seq2seq.oracle(s.hf, s.prefixes[0]), torch.no_grad():
        out = s.hf.generate(
            input_ids=s.texts[0][None], use_cache=False, do_sample=False, max_new_tokens=NEW, output_scores=True,
            return_dict_in_generate=True, **how,
        )  # fmt: skip
    with engine(s.base) as made:
        (got,) = made.generate([s.texts[0].tolist()], s.prefixes[0], max_new_tokens=NEW, **how)
    rows = [row[1:].tolist() for row in out.sequences]
    assert got.token_ids == [t for t in rows[0] if t != 1][: len(got.token_ids)]
    assert got.score == pytest.approx(out.sequences_scores[0].item(), abs=1e-4)


@pytest.mark.parametrize("name", LATE)
def test_scores_are_log_probabilities_of_the_oracle(name):
    s = setup(name)
    targets = [t[: 1 + i % 3].tolist() for i, t in enumerate(seq2seq.random_texts([6] * 5, seed=8))]
    with engine(s.base, max_num_batched_tokens=24) as made:
        got = made.score([t.tolist() for t in s.texts], s.prefixes, targets=targets)
    with engine(s.base) as made:
        best = made.generate([t.tolist() for t in s.texts], s.prefixes, max_new_tokens=6)
        if not s.base.seq2seq.wraps:  # there the last label is the start
            free = [b.token_ids[:5] for b in best]  # the sixth can be a forced end
            assert all(g.is_greedy for g in made.score([t.tolist() for t in s.texts], s.prefixes, targets=free))
            assert not any(g.is_greedy for g in got)
    for score, text, prefix, target in zip(got, s.texts, s.prefixes, targets, strict=True):
        ids = torch.from_numpy(s.base.seq2seq.decoder_ids(target).copy()).long()
        kv, start = ({}, 0) if prefix is None else (dict(prefix.kv), prefix.pos_start)
        with torch.no_grad():
            logp = seq2seq.logits_of(s.hf, text, ids[:-1], kv, start).log_softmax(-1)
        assert score.token_logprobs == pytest.approx(logp[range(len(target)), target].tolist(), abs=2e-5)
        assert score.usage["prompt_tokens"] == len(text)
        assert score.token_ids == target


def test_a_padding_token_in_a_target_is_scored_where_the_base_reads_it():
    s = setup("bart")
    pad, text = s.base.seq2seq.pad, s.texts[0]
    with torch.no_grad():
        target = [5, pad, 6]
        read = torch.tensor([[s.base.seq2seq.start, *target[:-1]]])
        logp = s.hf(input_ids=text[None], decoder_input_ids=read).logits[0].log_softmax(-1)
    with engine(s.base) as made:
        (got,) = made.score([text.tolist()], targets=[target])
    assert got.token_logprobs == pytest.approx(logp[range(3), target].tolist(), abs=2e-5)
    s = setup("m2m_100")
    pad = s.base.seq2seq.pad
    with engine(s.base) as made:
        (last,) = made.score([text.tolist()], targets=[[5, pad]])  # which the decoder does not read
        assert last.token_ids == [5, pad]
        with pytest.raises(RequestError, match=f"request 0: target: the padding token {pad} inside a text"):
            made.score([text.tolist()], targets=[target])


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"decoder_start_token_id": 1}])
def test_a_padding_token_in_the_answer_takes_no_position_in_m2m100(how):
    s = setup("m2m_100")
    pad, text = s.base.seq2seq.pad, s.texts[0]
    how = {"forced_bos_token_id": pad, "max_new_tokens": 6, **how}
    (got,) = generate([text.tolist()], model=s.base, **how)
    expected = s.hf.generate(input_ids=text[None], do_sample=False, **how)[0, 1:].tolist()
    assert got.token_ids == expected[: len(got.token_ids)]
    assert got.token_ids[0] == pad
