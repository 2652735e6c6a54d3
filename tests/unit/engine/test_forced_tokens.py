"""Forced tokens, sequences of the source that are not repeated, and where a base's defaults of both come from."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from transformers import BartConfig, BlenderbotConfig, GenerationConfig, GPT2Config, LogitsProcessorList, MBartConfig
from transformers.generation import logits_process as theirs

from prefixfast import Engine, GenerationParams, RequestError
from prefixfast.data.builtin_tasks import PLAIN
from prefixfast.engine.decode_batch import DecodeBatch
from prefixfast.engine.request import Request
from prefixfast.engine.sampling_params import (
    BUILT_IN,
    UNSET,
    ParamSources,
    base_defaults,
    resolve_params,
    warn_unsupported_defaults,
)
from prefixfast.model.base import Model

VOCAB, EOS, START, SOURCE = 40, 2, 1, (7, 8, 9, 7, 8, 11)


def request(**params) -> Request:
    ids = np.array([START], np.int32)
    resolved = GenerationParams.make(BUILT_IN, **params)
    made = Request(index=0, id=None, ids=ids, prompt_ids=ids, prefixes=(), params=resolved, task=PLAIN)
    return replace(made, encoder_ids=np.array(SOURCE, np.int32))


def processors(new: int, *, first: int = -1, last: int = -1, ngram: int = 0, least: int = 0) -> LogitsProcessorList:
    """Those that transformers' `generate` makes, in its order."""
    made = LogitsProcessorList()
    if ngram:
        made.append(theirs.EncoderNoRepeatNGramLogitsProcessor(ngram, torch.tensor([SOURCE])))
    if least:
        made.append(theirs.MinNewTokensLengthLogitsProcessor(1, least, torch.tensor([EOS])))
    if first >= 0:
        made.append(theirs.ForcedBOSTokenLogitsProcessor(first))
    if last >= 0:
        made.append(theirs.ForcedEOSTokenLogitsProcessor(1 + new, last))
    return made


class Halved(theirs.LogitsProcessor):
    """A processor of the caller, which sees the scores of forced tokens and changes them."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert (scores == 0).sum() == 1 or (scores != 0).all()
        return scores / 2 - 1


CASES = {
    "first": {"first": 5},
    "last": {"last": EOS},
    "another last": {"last": 6},
    "both": {"first": 0, "last": EOS},
    "both and a minimum": {"first": EOS, "last": EOS, "least": 9},
    "source": {"ngram": 2},
    "source of one": {"ngram": 1, "first": 9},
}


@pytest.mark.parametrize("new", [1, 2, 5])
@pytest.mark.parametrize("own", [False, True], ids=["", "own processor"])
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers_processors(case, own, new):
    how = CASES[case]
    names = {"first": "forced_bos_token_id", "last": "forced_eos_token_id"}
    names |= {"ngram": "encoder_no_repeat_ngram_size", "least": "min_new_tokens"}
    made = request(max_new_tokens=new, **{names[n]: v for n, v in how.items()})
    expected_processors = processors(new, **{**how, "least": min(new, how.get("least", 0))})
    made = replace(made, params=replace(made.params, min_new_tokens=min(new, made.params.min_new_tokens)))
    if own:
        made = replace(made, processors=LogitsProcessorList([Halved()]))
        expected_processors.append(Halved())
    batch = DecodeBatch(torch.zeros(5, 64, dtype=torch.int32), [EOS])
    for row, number in ((1, 3), (2, 4)):  # the second row forces nothing
        batch.start(number, made if row == 1 else request(max_new_tokens=new), row)
    g = torch.Generator().manual_seed(new)
    ids, changed = [START], False
    for step in range(new):
        logits = 3 * torch.randn(2, VOCAB, generator=g)
        logits[0, 7 + step % 2] += 20  # the first tokens of the source, none of which is forced
        theirs_now = expected_processors(torch.tensor([ids]), logits[:1].clone())
        (tokens,) = batch.choose_tokens(logits.clone(), np.array([1, 2]), 8)
        got = tokens.values.values()
        assert got == [int(theirs_now.argmax()), int(logits[1].argmax())]
        changed |= got[0] != int(logits[0].argmax())
        ids.append(got[0])
    assert changed or (how.get("ngram") == 2 and new == 1)


def test_a_sample_takes_a_forced_token():
    batch = DecodeBatch(torch.zeros(4, 64, dtype=torch.int32), [EOS])
    params = {"do_sample": True, "seed": 3, "temperature": 0.7, "top_p": 0.5}
    batch.start(1, request(max_new_tokens=3, forced_bos_token_id=5, forced_eos_token_id=EOS, **params), 0)
    g = torch.Generator().manual_seed(0)
    drawn = [
        batch.choose_tokens(torch.randn(1, VOCAB, generator=g), np.array([0]), 8)[0].values.values()[0]
        for _ in range(3)
    ]
    assert drawn[0] == 5
    assert drawn[2] == EOS


def model(config, **generation) -> Model:
    made = GenerationConfig.from_model_config(config)
    made.update(**generation)
    return cast(
        "Model",
        SimpleNamespace(
            hf=SimpleNamespace(config=config, generation_config=made), seq2seq=config.is_encoder_decoder or None
        ),
    )


def test_defaults_of_a_base_are_those_of_its_generation_config(caplog):
    lengths = {"max_length": 62, "min_length": 11, "forced_bos_token_id": 0, "encoder_no_repeat_ngram_size": 3}
    bart = model(BartConfig(), **lengths)
    found = base_defaults(bart)
    assert (found.max_new_tokens, found.min_new_tokens) == (61, 10)
    assert (found.forced_bos_token_id, found.forced_eos_token_id) == (0, 2)
    assert (found.decoder_start_token_id, found.encoder_no_repeat_ngram_size) == (2, 3)
    # `max_new_tokens` takes precedence over `max_length`, as in transformers.
    assert base_defaults(model(BartConfig(), max_length=62, max_new_tokens=5)).max_new_tokens == 5
    assert base_defaults(model(BlenderbotConfig())).encoder_no_repeat_ngram_size == 3
    assert base_defaults(model(MBartConfig())).decoder_start_token_id is None
    start = model(BartConfig(), decoder_start_token_id=7)
    assert base_defaults(start).decoder_start_token_id == 7
    start.hf.generation_config.decoder_start_token_id = None
    assert base_defaults(start).decoder_start_token_id == 2, "that of the model's config"
    assert base_defaults(model(BartConfig(), forced_eos_token_id=[4])).forced_eos_token_id == 4
    caplog.set_level("WARNING", "prefixfast")
    warn_unsupported_defaults(bart)
    assert not caplog.records
    assert base_defaults(model(BartConfig(), forced_eos_token_id=[4, 5])).forced_eos_token_id is None
    warn_unsupported_defaults(model(GPT2Config(), **lengths))
    assert [r.message.count("forced_eos_token_id") + r.message.count("min_length") for r in caplog.records] == [1, 1]
    assert base_defaults(model(GPT2Config(), **lengths)).forced_bos_token_id is None


def test_the_order_of_precedence_and_minus_one_forces_none():
    base = base_defaults(model(BartConfig(), forced_bos_token_id=0))
    decoding = {"forced_bos_token_id": 9, "max_source_length": 512}

    def resolved(call=UNSET, prefixes=()):
        return resolve_params(ParamSources(call, None, prefixes, base), 0, 1, 99)

    assert resolved().forced_bos_token_id == 0
    assert resolved(prefixes=[decoding]).forced_bos_token_id == 9
    assert resolved(prefixes=[decoding]).max_source_length == 512
    assert resolved(GenerationParams(forced_bos_token_id=-1), [decoding]).forced_bos_token_id == -1


@pytest.mark.parametrize("place", ["call", "row", "prefix"])
@pytest.mark.parametrize(
    "name", ["forced_bos_token_id", "forced_eos_token_id", "decoder_start_token_id", "max_source_length"]
)
def test_a_decoder_only_base_refuses_them_by_name(base, make_prefix, name, place):
    call, row, prefix = {}, {"input_ids": [5, 6]}, None
    if place == "call":
        call = {name: 3}
    elif place == "row":
        row["params"] = {name: 3}
    else:
        prefix = make_prefix(decoding={name: 3})
    with Engine(base) as engine:
        with pytest.raises(RequestError, match=rf"request 0: {name}=3: expected an encoder-decoder base"):
            engine.generate([row], prefix, max_new_tokens=2, **call)
        if name.startswith("forced"):
            assert engine.generate([[5, 6]], max_new_tokens=2, **{name: -1})
