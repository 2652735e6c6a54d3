"""Suite ``seq2seq`` on a tiny BART: contenders agree, files are written, differences stop the suite."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from prefixfast import load
from prefixfast.bench import seq2seq
from prefixfast.bench.harness import WrongResultError
from prefixfast.bench.seq2seq import ALL, DECODER, PEFT, PEFT_LOOP, Settings, TextCheck, check_no_fallback, run
from prefixfast.bench.seq2seq_contenders import Seconds, Texts, peft_generate, peft_model, score
from prefixfast.bench.seq2seq_inputs import SOURCE_TOKENS, TARGET_TOKENS, Workload, make_base, site_prefixes
from prefixfast.config.sites import SITES
from prefixfast.engine.engine import Engine

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


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def made(request):
    """Check of texts, decoder prefixes, a prefix of three sites, and texts of PEFT with the decoder prefixes."""
    hf = make_base(request.param, **TINY)
    sources = WORK.sources(TINY["vocab_size"])
    with load(copy.deepcopy(hf)) as model, Engine(model, max_num_seqs=4, max_model_len=16) as engine:
        prefixes = site_prefixes(model, WORK.prefix, WORK.users, ("self",))
        every = site_prefixes(model, WORK.prefix, 1, SITES)
        pairs = zip(prefixes, sources, strict=True)
        texts = [peft_generate(peft_model(hf, p)[0], [s], WORK).tokens[0] for p, s in pairs]
        yield TextCheck(hf, engine, sources, prefixes), prefixes, every, Texts(texts, Seconds(0, 0))


def test_a_site_has_the_same_rows_beside_other_sites(made):
    _, prefixes, every, _ = made
    assert every[0].sites == SITES
    assert all(torch.equal(t, every[0].kv[n]) for n, t in prefixes[0].kv.items())


def test_texts_of_another_prefix_stop_the_suite(made):
    check, prefixes, _, texts = made
    if check.plain.dtype == torch.bfloat16:

        def with_another(rows, prefix, **how):
            return check.engine.score(rows, prefixes[1], **how)

        wrong, own = replace(check, engine=SimpleNamespace(score=with_another)), texts
    else:
        wrong, own = check, Texts([texts.tokens[0], [5] * WORK.new, texts.tokens[2]], texts.seconds)
    assert check.check(texts, texts) < 0.5
    with pytest.raises(WrongResultError, match="expected the log-probability"):
        wrong.check(own, texts)


def test_scores_are_those_of_the_prefix(made):
    check, prefixes, _, texts = made
    own, other = (score(check.plain, check.sources[0], prefixes[i], texts.tokens[0]) for i in (0, 1))
    assert own != pytest.approx(other, abs=1e-3)


def test_a_fallback_stops_the_suite():
    check_no_fallback({"attn": "torch (merged)", "attn_decode": "rust"})
    with pytest.raises(WrongResultError, match="reference; no Triton"):
        check_no_fallback({"attn": "torch (merged)", "attn_decode": "reference; no Triton"})
