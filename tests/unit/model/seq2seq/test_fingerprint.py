"""Fingerprints of encoder-decoder models, by which a prefix recognizes its base."""

from __future__ import annotations

import pytest
import torch

from prefixfast import load
from prefixfast.model.fingerprint import fingerprint, is_seq2seq, num_layers
from seq2seq import attention_modules, make_seq2seq


@pytest.mark.parametrize("name", ["bart", "m2m_100", "t5", "umt5"])
def test_depths_are_those_of_each_stack(name):
    found = fingerprint(make_seq2seq(name), None)
    assert is_seq2seq(found)
    assert [num_layers(found, site) for site in ("enc", "self", "cross")] == [3, 2, 2]


@pytest.mark.parametrize("site", ["enc", "self", "cross"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_weights_of_every_layer_of_each_stack_count(name, site):
    hf = make_seq2seq(name)
    before = fingerprint(hf, None)
    for module in attention_modules(hf)[site]:
        weight = (module.q_proj if name == "bart" else module.q).weight
        with torch.no_grad():
            weight.add_(1)
            changed = fingerprint(hf, None)
            weight.sub_(1)
        assert changed["config"] == before["config"]
        assert changed["weights"] != before["weights"]


@pytest.mark.parametrize("name", ["bart", "marian"])
def test_the_bias_of_the_logits_counts(name):
    hf = make_seq2seq(name)
    before = fingerprint(hf, None)
    with load(hf) as model:
        assert model.fingerprint["weights"] == before["weights"]
    hf.final_logits_bias[0, 77] += 1
    changed = fingerprint(hf, None)
    assert changed["weights"] != before["weights"]
    assert changed["config"] == before["config"]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("bart", "decoder_layers"),
        ("bart", "decoder_attention_heads"),
        ("bart", "scale_embedding"),
        ("t5", "num_decoder_layers"),
        ("t5", "d_kv"),
        ("t5", "relative_attention_max_distance"),
    ],
)
def test_every_size_of_the_decoder_counts(name, field):
    hf = make_seq2seq(name)
    value = getattr(hf.config, field)
    other = make_seq2seq(name, **{field: (not value) if isinstance(value, bool) else 2 * value})
    assert fingerprint(hf, None)["config"] != fingerprint(other, None)["config"]
