"""Decoder tokens of labels against transformers."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import numpy as np
import pytest
import torch

import seq2seq
from prefixfast.model.seq2seq.tokens import Seq2Seq

WRAPPING = ("mbart", "plbart")
LABELS = ([5, 6, 7, 2], [9], [5, -100, 7, 2], [0, 0, 4, 0])


def shifted(hf: Any, labels: list[int]) -> list[int]:
    """Decoder inputs of labels by transformers."""
    given = torch.tensor([labels])
    if hasattr(hf, "_shift_right"):
        return hf._shift_right(given)[0].tolist()
    shift = sys.modules[type(hf).__module__].shift_tokens_right
    tokens = (hf.config.pad_token_id, hf.config.decoder_start_token_id)
    return shift(given, *tokens[: len(inspect.signature(shift).parameters) - 1])[0].tolist()


@pytest.mark.parametrize("name", seq2seq.NAMES)
def test_decoder_ids_are_the_shifted_labels_of_transformers(name):
    hf = seq2seq.make_seq2seq(name)
    config = hf.config
    facts = Seq2Seq(config.decoder_start_token_id, name in WRAPPING, config.pad_token_id, 99, 64, False)
    for labels in LABELS:
        ids = facts.decoder_ids(labels)
        assert ids.dtype == np.int32
        assert ids[:-1].tolist() == shifted(hf, labels)
        assert ids[1:].tolist() == [config.pad_token_id if t == -100 else t for t in labels]
