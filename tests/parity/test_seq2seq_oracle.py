"""The brute-force oracle of tests/seq2seq.py: it is transformers' own forward without a prefix, and sees each site."""

from __future__ import annotations

import pytest
import torch

import seq2seq
from seq2seq import FAST, LENGTHS, NAMES, brute_force, counted, logits_of, make_seq2seq, random_kv, random_texts

ENCODER, DECODER = random_texts([9, 6])


def own_logits(hf):
    return hf(input_ids=ENCODER[None], decoder_input_ids=DECODER[None], use_cache=False).logits[0]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_without_a_prefix_it_is_the_models_own_forward(name):
    hf = make_seq2seq(name)
    torch.testing.assert_close(logits_of(hf, ENCODER, DECODER, {}, 0), own_logits(hf), atol=1e-5, rtol=1e-4)
    assert hf.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_tensor_and_the_position_change_the_logits(name):
    hf = make_seq2seq(name)
    kv = random_kv(hf, LENGTHS)
    whole = logits_of(hf, ENCODER, DECODER, kv, 5)
    for tensor in kv:
        changed = logits_of(hf, ENCODER, DECODER, {**kv, tensor: -kv[tensor]}, 5)
        assert (changed - whole).abs().max() > 1e-2, tensor
    moved = (logits_of(hf, ENCODER, DECODER, kv, 0) - whole).abs().max()
    assert moved == 0 if name in seq2seq.DISTANCES else moved > 1e-2


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.long) for n in NAMES])
@torch.no_grad()
def test_texts_have_different_tokens(name):
    hf = make_seq2seq(name)
    with brute_force(hf, random_kv(hf, LENGTHS), 5), counted(hf) as counts:
        texts = [
            hf.generate(input_ids=ids[None], max_new_tokens=20, use_cache=False)[0].tolist()
            for ids in random_texts([9, 14, 5])
        ]
    assert len({token for text in texts for token in text}) >= 10
    assert min(len(set(text)) for text in texts) >= 3
    assert counts["encoder"] == 3
    assert counts["cross"] == 2 * sum(len(text) - 1 for text in texts)  # a forward without a cache repeats them
