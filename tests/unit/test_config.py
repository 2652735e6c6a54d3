"""The four option dataclasses: unknown names, wrong types, wrong ranges, help, precedence, keyword types."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import numpy as np
import pytest

from prefixfast import ConfigError, EngineConfig, GenerationParams, MethodConfig, PrefixConfig, TrainConfig
from prefixfast.config import EngineFields, GenerationFields, ScoreFields, TrainFields
from prefixfast.config.fields import GenerationParamsFields, MethodConfigFields, PrefixConfigFields, TrainConfigFields
from prefixfast.config.sites import BySite

CLASSES = (PrefixConfig, TrainConfig, GenerationParams, EngineConfig)
UNKNOWN = [
    (PrefixConfig, "num_virtual_tokens", "prefix_length"),
    (PrefixConfig, "prefix_projection", "reparameterization='mlp'"),
    (PrefixConfig, "prefix_lenght", "prefix_length"),
    (TrainConfig, "per_device_train_batch_size", "batch_size"),
    (TrainConfig, "gradient_accumulation_steps", "token_budget"),
    (TrainConfig, "epochs", "num_train_epochs"),
    (TrainConfig, "eval_strategy", "eval_steps"),
    (TrainConfig, "load_best_model_at_end", "metric_for_best_model"),
    (TrainConfig, "lr", "learning_rate"),
    (TrainConfig, "learning_rates", "learning_rate"),
    (GenerationParams, "max_tokens", "max_new_tokens"),
    (GenerationParams, "max_length", "max_new_tokens"),
    (GenerationParams, "beam_size", "num_beams"),
    (EngineConfig, "max_num_seq", "max_num_seqs"),
]
WRONG_TYPE = [
    (PrefixConfig, "prefix_length", "10"),
    (PrefixConfig, "prefix_length", 10.0),
    (PrefixConfig, "prefix_length", True),
    (PrefixConfig, "prefix_length", None),
    (PrefixConfig, "prefix_dropout", True),
    (PrefixConfig, "prefix_dropout", "0.1"),
    (PrefixConfig, "prefix_dropout", float("nan")),
    (PrefixConfig, "reparameterization", "MLP"),
    (PrefixConfig, "reparameterization", None),
    (PrefixConfig, "pos_start", 0),
    (PrefixConfig, "prefix_length", "words"),
    (PrefixConfig, "frozen_rows", 1.0),
    (PrefixConfig, "layers", 3),
    (PrefixConfig, "layers", "0,1"),
    (PrefixConfig, "layers", [0, True]),
    (PrefixConfig, "layers", [1.0]),
    (TrainConfig, "token_budget", "all"),
    (TrainConfig, "token_budget", True),
    (TrainConfig, "dtype", "int8"),
    (TrainConfig, "recipe", None),
    (TrainConfig, "report_to", "all"),
    (TrainConfig, "max_steps", 1.5),
    (TrainConfig, "max_steps", False),
    (TrainConfig, "shuffle", 1),
    (TrainConfig, "shuffle", "yes"),
    (TrainConfig, "loss", ["token_mean"]),
    (TrainConfig, "learning_rate", "1e-3"),
    (TrainConfig, "learning_rate", float("nan")),
    (TrainConfig, "overflow", "drop"),
    (GenerationParams, "num_beams", 2.0),
    (GenerationParams, "length_penalty", [1]),
    (GenerationParams, "early_stopping", 1),
    (GenerationParams, "early_stopping", 0),
    (GenerationParams, "early_stopping", "true"),
    (EngineConfig, "max_num_seqs", None),
    (EngineConfig, "kv_cache_memory", "1GB"),
]
WRONG_RANGE = [
    (PrefixConfig, "prefix_length", 0),
    (PrefixConfig, "encoder_hidden_size", 0),
    (PrefixConfig, "prefix_dropout", -0.1),
    (PrefixConfig, "prefix_dropout", 1.0),
    (PrefixConfig, "frozen_rows", -1),
    (PrefixConfig, "frozen_rows", 10),
    (PrefixConfig, "fit_steps", -1),
    (PrefixConfig, "embedding_dim", 0),
    (TrainConfig, "save_steps", 0),
    (TrainConfig, "early_stopping_patience", 0),
    (TrainConfig, "num_train_epochs", 0.0),
    (TrainConfig, "num_train_epochs", float("inf")),
    (TrainConfig, "max_steps", 0),
    (TrainConfig, "batch_size", 0),
    (TrainConfig, "token_budget", 0),
    (TrainConfig, "learning_rate", 0.0),
    (TrainConfig, "learning_rate", float("inf")),
    (TrainConfig, "warmup_steps", -1),
    (TrainConfig, "weight_decay", -0.1),
    (TrainConfig, "max_grad_norm", -1.0),
    (TrainConfig, "max_length", 1),
    (TrainConfig, "eval_steps", 0),
    (TrainConfig, "logging_steps", 0),
    (GenerationParams, "max_new_tokens", 0),
    (GenerationParams, "min_new_tokens", -1),
    (GenerationParams, "num_beams", 0),
    (EngineConfig, "max_model_len", 1),
    (EngineConfig, "max_num_seqs", 0),
    (EngineConfig, "max_num_batched_tokens", 0),
    (EngineConfig, "kv_cache_memory", 0),
    (EngineConfig, "num_threads", 0),
]
RIGHT = [
    (PrefixConfig, "prefix_dropout", 0),
    (PrefixConfig, "prefix_length", "text"),
    (PrefixConfig, "frozen_rows", 9),
    (TrainConfig, "token_budget", "auto"),
    (TrainConfig, "token_budget", 1),
    (TrainConfig, "save_steps", None),
    (TrainConfig, "num_train_epochs", 1),
    (TrainConfig, "max_grad_norm", 0.0),
    (TrainConfig, "learning_rate", None),
    (GenerationParams, "early_stopping", True),
    (GenerationParams, "early_stopping", False),
    (GenerationParams, "early_stopping", "never"),
    (GenerationParams, "early_stopping", None),
    (GenerationParams, "length_penalty", -1),
]


@pytest.mark.parametrize(("cls", "name", "hint"), UNKNOWN)
def test_an_unknown_option_gets_a_hint(cls, name, hint):
    with pytest.raises(ConfigError, match=f"{cls.__name__}: unknown option '{name}'; did you mean {hint}"):
        cls.make(**{name: 1})


@pytest.mark.parametrize("cls", CLASSES)
def test_an_option_without_a_similar_name_gets_the_list(cls):
    with pytest.raises(ConfigError, match=f"unknown option 'zzz'; known are {', '.join(cls.names())}"):
        cls.make(zzz=1)


def test_a_name_that_is_no_string_is_unknown():
    with pytest.raises(ConfigError, match="unknown option '1'"):
        GenerationParams.make({1: 2})


@pytest.mark.parametrize(("cls", "name", "value"), WRONG_TYPE)
def test_a_wrong_type_is_named(cls, name, value):
    with pytest.raises(ConfigError) as caught:
        cls(**{name: value})
    assert str(caught.value).startswith(f"{cls.__name__}.{name}: expected ")
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(("cls", "name", "value"), WRONG_RANGE)
def test_a_wrong_range_is_named(cls, name, value):
    with pytest.raises(ConfigError, match=rf"{cls.__name__}\.{name}: expected .*, got {value!r}"):
        cls(**{name: value})


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (PrefixConfig, {"fit_steps": 5}, "fit_steps: expected reparameterization='mlp' beside it, got 'auto'"),
        (TrainConfig, {"early_stopping_patience": 2}, "early_stopping_patience: expected eval_steps beside it"),
        (
            TrainConfig,
            {"early_stopping_patience": 2, "eval_steps": 1, "metric_for_best_model": "last"},
            "a metric_for_best_model other than 'last'",
        ),
    ],
)
def test_options_that_need_each_other(cls, fields, message):
    with pytest.raises(ConfigError, match=message):
        cls(**fields)


@pytest.mark.parametrize(("cls", "name", "value"), RIGHT)
def test_valid_values_are_taken_as_they_are(cls, name, value):
    assert getattr(cls(**{name: value}), name) is value


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_has_its_help(cls):
    assert [f.name for f in dataclasses.fields(cls) if not f.metadata.get("help", "").strip()] == []


@pytest.mark.parametrize("cls", CLASSES)
def test_options_cannot_be_changed_in_place(cls):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(cls(), cls.names()[0], 1)


def test_make_takes_an_object_or_a_mapping_and_fields_win():
    expected = PrefixConfig(prefix_length=7, prefix_dropout=0.5)
    assert PrefixConfig.make(PrefixConfig(prefix_length=3, prefix_dropout=0.5), prefix_length=7) == expected
    assert PrefixConfig.make({"prefix_length": 3, "prefix_dropout": 0.5}, prefix_length=7) == expected


@pytest.mark.parametrize("config", [5, "paper", ["prefix_length"], TrainConfig()])
def test_make_refuses_other_objects(config):
    with pytest.raises(ConfigError, match="config: expected a PrefixConfig or a mapping, got"):
        PrefixConfig.make(config)


def test_over_prefers_its_own_values():
    mine = GenerationParams(num_beams=3, early_stopping=False, min_new_tokens=0)
    theirs = GenerationParams(num_beams=5, early_stopping=True, min_new_tokens=4, max_new_tokens=9)
    assert mine.over(theirs) == GenerationParams(num_beams=3, early_stopping=False, min_new_tokens=0, max_new_tokens=9)


def test_over_empty_parameters_changes_nothing():
    mine = GenerationParams(num_beams=3, early_stopping="never")
    assert mine.over(GenerationParams()) == mine == GenerationParams().over(mine)


# ---- types of keyword fields ----

FIELDS = [
    (PrefixConfigFields, (PrefixConfig,)),
    (TrainConfigFields, (TrainConfig,)),
    (MethodConfigFields, (MethodConfig,)),
    (GenerationParamsFields, (GenerationParams,)),
    (EngineFields, (EngineConfig,)),
    (ScoreFields, (EngineConfig,)),
    (TrainFields, (MethodConfig, PrefixConfig, TrainConfig)),
    (GenerationFields, (EngineConfig, GenerationParams)),
]
# Values that the constructor takes although the field of the dataclass has a narrower type.
WIDER = {
    "prefix_length": ({"self": 5}, 5),
    "sites": (["self"], ("self",)),
    "layers": (np.array([2, 0]), (0, 2)),
    "bad_words_ids": ([[1, 2], (3,)], ((1, 2), (3,))),
    "stop_strings": ("end", ("end",)),
}


@pytest.mark.parametrize(("fields", "classes"), FIELDS)
def test_keyword_fields_have_the_types_of_the_dataclasses(fields, classes):
    given, hints = get_type_hints(fields), {n: h for c in classes for n, h in get_type_hints(c).items()}
    assert set(given) == {n for c in classes for n in c.names()}
    assert {n: given[n] for n in given if n not in WIDER} == {n: hints[n] for n in given if n not in WIDER}
    for name in set(given) & set(WIDER):
        narrow = {k for k in get_args(hints[name]) if getattr(k, "__origin__", None) not in (tuple, BySite)}
        assert narrow <= set(get_args(given[name])), name


@pytest.mark.parametrize("name", WIDER)
def test_constructors_take_the_wider_types(name):
    value, expected = WIDER[name]
    owner = next(c for c in CLASSES if name in c.names())
    assert getattr(owner(**{name: value}), name) == getattr(owner.make(**{name: value}), name) == expected
