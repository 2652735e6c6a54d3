"""Every encoder-decoder type of the installed transformers: computed as transformers computes it, or refused.

The table of docs/models.md is compared with what was found. With ``PREFIXFAST_WRITE_MODELS=1`` the test writes it.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

import causal_lms
from oracles import ROOT
from prefixfast import ConfigError
from prefixfast.attention.seq2seq_plan import plain_seq2seq_plan
from prefixfast.model.load import load
from prefixfast.model.seq2seq.families import FAMILIES
from seq2seq import NAMES, logits_of, make_seq2seq, random_texts

PAGE = ROOT / "docs" / "models.md"
BLOCK = re.compile(r"(?<=<!-- seq2seq -->\n).*?(?=<!-- end seq2seq -->)", re.DOTALL)
TYPES = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
RIGHT, OTHER = "right", "not an encoder-decoder model: a decoder with a further input"
BERT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def refused_config(kind: str) -> PretrainedConfig:
    """Configuration of a type that is refused by its name, small where its class takes small sizes."""
    config = CONFIG_MAPPING[kind]
    if kind == "encoder-decoder":
        encoder, decoder = transformers.BertConfig(**BERT), transformers.BertConfig(**BERT)
        return config.from_encoder_decoder_configs(encoder, decoder)
    try:
        return config(**causal_lms.known(config, causal_lms.OWN.get(kind, {})))
    except Exception:  # a class that checks its sizes against each other
        return config()


def verdict(kind: str) -> str:
    """Whether a type is right, or the reason why it is refused. Fails if an accepted type computes something else."""
    if not CONFIG_MAPPING[kind]().is_encoder_decoder and kind != "encoder-decoder":
        return OTHER
    if kind in FAMILIES:
        hf, own = make_seq2seq(kind), make_seq2seq(kind)
        encoder, decoder = random_texts([9, 6])
        with load(hf) as model, torch.no_grad():
            found = model.forward(*plain(model, encoder, decoder))
        torch.testing.assert_close(found, logits_of(own, encoder, decoder, {}, 0), atol=1e-4, rtol=1e-3)
        return RIGHT
    with torch.device("meta"):  # the reason does not depend on the weights
        refused = getattr(transformers, TYPES[kind])(refused_config(kind)).eval()
    with pytest.raises(ConfigError, match="cannot attach") as caught:
        load(refused)
    return "refused: " + str(caught.value).partition("): ")[2]


def plain(model: Any, encoder: torch.Tensor, decoder: torch.Tensor) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Arguments of a forward of one request without a prefix."""
    return plain_seq2seq_plan([len(decoder)], [len(encoder)], backend=model.backend), decoder, encoder


def test_the_page_says_of_every_type_whether_it_is_right_or_why_it_is_refused():
    found = {kind: verdict(kind) for kind in sorted(TYPES)}
    assert set(FAMILIES) <= set(TYPES)
    assert {name.removeprefix("flan-") for name in NAMES} == set(FAMILIES)
    counts = [sum(v.startswith(k) for v in found.values()) for k in (RIGHT, "refused", OTHER)]
    table = (
        f"transformers {transformers.__version__}: {counts[0]} types are right, {counts[1]} are refused, {counts[2]} "
        "are no encoder-decoder models.\n\n| type | result |\n| --- | --- |\n"
    ) + "".join(f"| `{kind}` | {result} |\n" for kind, result in found.items())
    text = PAGE.read_text(encoding="utf8")
    if os.environ.get("PREFIXFAST_WRITE_MODELS"):
        PAGE.write_text(BLOCK.sub(lambda _: table, text), encoding="utf8")
    elif (match := BLOCK.search(text)) is None or match[0] != table:
        pytest.fail(f"docs/models.md differs from what was found; write it with PREFIXFAST_WRITE_MODELS=1\n{table}")
