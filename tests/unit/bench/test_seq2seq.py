"""Suite ``seq2seq`` on a tiny BART: contenders agree, files are written, differences stop the suite."""

import copy
import json

import pytest
import torch

from prefixfast import load
from prefixfast.bench import seq2seq
from prefixfast.bench.harness import WrongResultError
from prefixfast.bench.seq2seq import ALL, DECODER, PEFT, PEFT_LOOP, Settings, check_no_fallback, check_texts, run
from prefixfast.bench.seq2seq_contenders import Seconds, Texts, peft_generate, peft_model, score
from prefixfast.bench.seq2seq_inputs import SOURCE_TOKENS, TARGET_TOKENS, Workload, make_base, site_prefixes
from prefixfast.config.sites import SITES

# Six layers, of which PEFT's default table has three pairs.
WORK = Workload(users=3, prefix=4, source=12, new=6, beams=3, one_by_one=2, batch=10, steps=3)
TINY = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 6,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 512,
}
SETTINGS = Settings(dtype="float32", rounds=2, command="prefixfast bench seq2seq")


def test_the_suite_measures_equal_results(tmp_path, capsys):
    points = run(tmp_path, SETTINGS, WORK, **TINY)
    names = [("generate", DECODER), ("generate", ALL), ("generate", PEFT)]
    names += [("train", DECODER), ("train", ALL), ("train", PEFT_LOOP)]
    assert [(p.kind, p.contender) for p in points] == names
    assert [p.tokens for p in points[:3]] == [18, 18, 12]
    assert {p.tokens for p in points[3:]} == {3 * (sum(SOURCE_TOKENS) + sum(TARGET_TOKENS))}
    assert all(len(p.seconds) == 2 and p.rate > 0 for p in points)
    _, head, *rows = (json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines())
    assert [r["contender"] for r in rows] == [name for _, name in names]
    assert float(head["engine"]["largest difference of scores"]) <= seq2seq.GAP
    assert f"| {PEFT} |" in capsys.readouterr().out


def test_rows_have_each_length_of_scitldr():
    rows = Workload().rows(64)
    assert tuple(len(r["input_ids"]) for r in rows) == SOURCE_TOKENS
    assert sorted(len(r["labels"]) for r in rows) == sorted(TARGET_TOKENS)


@pytest.fixture(scope="module")
def made():
    """Base, sources, decoder prefixes and texts of PEFT with them."""
    hf = make_base("float32", **TINY)
    with load(copy.deepcopy(hf)) as model:
        prefixes = site_prefixes(model, WORK.prefix, WORK.users, ("self",))
        every = site_prefixes(model, WORK.prefix, 1, SITES)
    sources = WORK.sources(TINY["vocab_size"])
    texts = [peft_generate(peft_model(hf, p)[0], [s], WORK).tokens[0] for p, s in zip(prefixes, sources, strict=True)]
    return hf, sources, prefixes, every, Texts(texts, Seconds(0, 0))


def test_a_site_has_the_same_rows_beside_other_sites(made):
    _, _, prefixes, every, _ = made
    assert every[0].sites == SITES
    assert all(torch.equal(t, every[0].kv[n]) for n, t in prefixes[0].kv.items())


def test_other_texts_stop_the_suite(made):
    hf, sources, prefixes, _, texts = made
    assert check_texts(hf, sources, prefixes, texts, texts) == 0
    wrong = Texts([texts.tokens[0], [5] * WORK.new, texts.tokens[2]], texts.seconds)
    with pytest.raises(WrongResultError, match="request 1"):
        check_texts(hf, sources, prefixes, wrong, texts)


def test_scores_are_those_of_the_prefix(made):
    hf, sources, prefixes, _, texts = made
    own, other = (score(hf, sources[0], prefixes[i], texts.tokens[0]) for i in (0, 1))
    assert own != pytest.approx(other, abs=1e-3)


def test_a_fallback_stops_the_suite():
    check_no_fallback({"attn": "torch (merged)", "attn_decode": "rust"})
    with pytest.raises(WrongResultError, match="reference; no Triton"):
        check_no_fallback({"attn": "torch (merged)", "attn_decode": "reference; no Triton"})
