"""Commands on an encoder-decoder base: generate, score, try and doctor work, chat says why it does not."""

from __future__ import annotations

import json

import pytest

import seq2seq
import tiny
from prefixfast import Engine, Prefix, generate, load, score
from prefixfast.engine.kv_arena import bytes_per_row

FAST = ("--dtype", "float32", "--max-new-tokens", 6, "--max-num-seqs", 4)


@pytest.fixture(scope="module")
def bart(tmp_path_factory, tokenizer):
    """Folder of a saved tiny BART with the tokenizer of the tiny models, whose ids are those of its configuration."""
    path = tmp_path_factory.mktemp("bases") / "tiny-bart"
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": tiny.EOS, "decoder_start_token_id": tiny.EOS}
    seq2seq.make_seq2seq("bart", vocab_size=tiny.VOCAB, **ids).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prefix(bart, tmp_path_factory):
    """Folder of a prefix with rows at three sites."""
    path = tmp_path_factory.mktemp("prefixes") / "ann"
    with load(bart, dtype="float32") as base:
        kv = seq2seq.random_kv(base.hf, seq2seq.LENGTHS, seed=3, scale=3.0)
        Prefix(kv, pos_start=5, base=base.fingerprint).save_pretrained(path)
    return path


def test_generate_and_try(cli, bart, prefix):
    own, how = Prefix.from_pretrained(prefix), {"model": str(bart), "max_new_tokens": 6, "dtype": "float32"}
    expected = [str(g) for g in generate(["abc"] * 2, [None, own], **how)]
    assert expected[0] != expected[1]
    done = cli("try", bart, "abc", "--prefix", prefix, *FAST, "--json")
    assert done.code == 0, done.err
    records = json.loads(done.out)
    assert [r["text"] for r in records] == expected
    assert [r["usage"]["prefix_rows"] for r in records] == [0, 10]
    assert [r["usage"]["prompt_tokens"] for r in records] == [3, 3]


def test_score(bart, prefix):
    rows, own = [{"prompt": "abc", "completion": "de"}], Prefix.from_pretrained(prefix)
    how = {"model": str(bart), "dtype": "float32"}
    (with_end,) = score(rows, own, end_token=True, **how)
    (without,) = score(rows, own, **how)
    (given,) = score(["abc"], own, targets=["de"], **how)
    assert with_end.token_ids == [*without.token_ids, tiny.EOS]
    assert with_end.token_logprobs[:2] == pytest.approx(without.token_logprobs, abs=1e-5)
    assert given.token_logprobs == without.token_logprobs
    assert without.usage == {"prompt_tokens": 3, "completion_tokens": 2, "prefix_rows": 10}


def test_doctor(cli, bart):
    done = cli("doctor", bart, "--dtype", "float32", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["layers"] == {"enc": 3, "self": 2, "cross": 2}
    assert found["positions"] == "64 of the encoder, 64 of the decoder"
    with load(bart, dtype="float32") as base:
        row = bytes_per_row(base)
    assert row == 2 * 2 * 4 * 8 * 4  # 2 layers of keys and values, 4 heads of 8, in fp32
    assert found["source text of 512, rows in an engine"] == 512
    assert found["source text of 512, bytes in an engine"] == 512 * row
    assert found["prefix of 10, numbers"] == 10 * (3 + 2 + 2) * 2 * 4 * 8


def test_compare_refuses_sites_that_the_base_does_not_have(cli, folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"document": f"mill {i}", "summary": f"m {i}"}) + "\n" for i in range(5)))
    words = ("--model", folder, "-o", tmp_path / "out", "--metrics", "lengths", "--dry-run")
    done = cli("compare", rows, *words, "--methods", "prefix,prefix-enc")
    assert done.code == 1
    assert "method 'prefix-enc': PrefixConfig.sites: expected 'self', got 'enc'" in done.err


def test_chat_is_refused_by_name(cli, bart):
    done = cli("chat", "--model", bart, *FAST)
    assert done.code == 1
    assert "chat: expected a decoder-only base, got an encoder-decoder one (bart)" in done.err


def test_a_stream_has_the_text_of_the_result(bart, prefix):
    own = Prefix.from_pretrained(prefix)
    with Engine(str(bart), dtype="float32", max_num_seqs=2) as engine:
        expected = engine.generate(["abc"], own, max_new_tokens=6)[0].text
        assert "".join(engine.stream("abc", own, max_new_tokens=6)) == expected
        assert "".join(engine.stream("abc", own, max_new_tokens=6, forced_bos_token_id=40)) != expected
