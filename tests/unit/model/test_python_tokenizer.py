"""Tokenizers without a ``tokenizer.json`` form, as those of Marian, M2M100, PLBart and Blenderbot-small are."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import BlenderbotSmallTokenizer

from prefixfast import load, train
from prefixfast.model.tokenizer import Tokenizer
from seq2seq import VOCAB, make_seq2seq

WORDS = ["__start__", "__end__", "__unk__", "__null__", "a", "b", "a@@", "b@@", "ab", "abb", "c", "c@@", ",", "ab@@"]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version\na b</w>\na b\nab b</w>\n")
    return BlenderbotSmallTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def test_ids_and_texts_are_those_of_transformers(hf):
    ours, texts = Tokenizer.from_hf(hf), ["a ab, c", "", "abb abc"]
    assert [ids.tolist() for ids in ours.encode(texts)] == [hf(t).input_ids for t in texts]
    assert [ids.dtype for ids in ours.encode(texts)] == [np.int32] * 3
    assert ours.encode([]) == []
    ids = [[4, 8, 12, 1], [], [13, 10, 2]]
    assert ours.decode(ids) == [hf.decode(i, skip_special_tokens=True, clean_up_tokenization_spaces=False) for i in ids]
    assert ours.decode([[4, 999]]) == ["a"]
    with pytest.raises(UnicodeEncodeError):
        ours.encode(["\ud800"])


@pytest.mark.parametrize("step", [1, 2, 7])
def test_pieces_of_a_stream_are_the_text(hf, step):
    ours, ids = Tokenizer.from_hf(hf), [4, 6, 7, 10, 12, 1, 13, 5, 8]
    stream = ours.stream()
    for _ in range(2):  # the second sequence starts anew
        pieces = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
        assert "".join([*pieces, stream.finish()]) == ours.decode([ids])[0]
        assert any(pieces)


def test_a_base_with_such_a_tokenizer_is_trained_on_texts(hf):
    with load(make_seq2seq("blenderbot-small"), tokenizer=hf) as model:
        got = train(model, [{"document": "a ab", "summary": "abb c"}], prefix_length=2, max_steps=1)
        assert max(got.length_at(site) for site in got.sites) == 2
        assert len(hf) < VOCAB
