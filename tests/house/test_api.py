"""The public API has the functions, methods, options, commands and errors that version 0.1 promises."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import typer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import prefixfast
import tiny
from prefixfast import load
from prefixfast.cli import app
from prefixfast.training.recipes import read_recipe

ANY = object()  # the default is not promised

# ---- functions and methods with their parameters ----

FUNCTIONS = {
    "load": lambda model, *, tokenizer=None, dtype="auto", device="auto", revision=None, backend="auto",
        trust_remote_code=False, local_files_only=False: ...,
    "unload": lambda: ...,
    "train": lambda model, data, *, task=None, prefix_column=None, encoding=None, split=None, eval_data=None,
        init=ANY, init_text=None, on_top_of=None, objective="sft", sweep=None, overrides=None, store=None,
        output_dir=None, resume=False, overwrite=False, on_error="isolate", callbacks=(), prefix_config=None,
        config=None, **fields: ...,
    "generate": lambda batch, prefixes=None, *, model=None, store=None, params=None, on_error="raise",
        progress=None, **fields: ...,
    "score": lambda batch, prefixes=None, *, targets=None, model=None, store=None: ...,
    "evaluate": lambda outputs, references, *, task, metrics=None, split=None: ...,
    "Folder": lambda path: ...,
    "Engine": lambda model, *, store=None, config=None, **fields: ...,
    "PrefixStore": lambda path, *, read_only=False, keep_versions=2: ...,
}  # fmt: skip
MEMBERS = {
    "Engine": (
        "generate stream agenerate astream score submit cancel pin unpin evict resident stats explain "
        "close __enter__ __exit__"
    ),
    "Prefix": (
        "length requires digest nbytes num_stored num_trained save_pretrained from_pretrained push_to_hub "
        "to_peft from_text concat inspect"
    ),
    "Folder": "__getitem__ __iter__ __len__ __contains__ keys items values",
    "PrefixStore": (
        "put get info versions rollback delete verify import_dir export_dir __getitem__ __iter__ __len__ "
        "__contains__ keys items values"
    ),
    "TrainRun": "best plot report __getitem__ __iter__ __len__",
    "Generation": "__str__",
    "Metrics": "__getitem__ __iter__ __len__ table to_json",
    "MetricValue": "__str__",
}
FIELDS = {
    "Metrics": "task num_texts values_by_name missing",
    "MetricValue": "value text tool better",
    "Prefix": "kv pos_start base task decoding training",
    "TrainRun": "failed metrics",
    "Generation": "index id text texts token_ids finish_reason score logprobs prefix_digest usage error",
}


def listed(names: str, default: Any = ANY) -> dict[str, Any]:
    return dict.fromkeys(names.split(), default)


# ---- options with their defaults, and their literal values ----

OPTIONS: dict[str, dict[str, Any]] = {
    "MethodConfig": listed("adapter_size lora_rank lora_alpha num_examples") | {"method": "prefix"},
    "PrefixConfig": listed("embedding_dim sites layers")
    | {
        "prefix_length": 10,
        "reparameterization": "auto",
        "encoder_hidden_size": 512,
        "prefix_dropout": 0.0,
        "frozen_rows": 0,
        "pos_start": "after",
    },
    "TrainConfig": listed(
        "num_train_epochs max_steps batch_size learning_rate lr_scheduler_type warmup_steps weight_decay "
        "max_grad_norm max_length gradient_checkpointing dtype "
        "seed eval_steps save_steps metric_for_best_model early_stopping_patience report_to logging_steps"
    )
    | {"recipe": "default", "loss": "token_mean", "token_budget": "auto", "overflow": "error"},
    "GenerationParams": listed(
        "max_new_tokens min_new_tokens num_beams do_sample temperature top_k top_p min_p repetition_penalty "
        "no_repeat_ngram_size length_penalty early_stopping encoder_no_repeat_ngram_size "
        "forced_bos_token_id forced_eos_token_id decoder_start_token_id "
        "bad_words_ids stop_strings num_return_sequences seed logprobs",
        None,
    ),
    "EngineConfig": listed(
        "dtype device revision backend max_model_len max_num_seqs max_num_batched_tokens "
        "gpu_memory_utilization prefix_memory host_prefix_memory "
        "enforce_eager num_threads seed"
    )
    | {"prefix_dtype": "auto"},
}
WORDS = {
    ("PrefixConfig", "pos_start"): {"after", "zero"},
    ("TrainConfig", "loss"): {"token_mean", "sequence_sum"},
    ("TrainConfig", "overflow"): {"error", "truncate", "skip"},
    ("EngineConfig", "prefix_dtype"): {"auto", "float32", "bfloat16"},
}
RECIPES = {"default", "paper", "low-data"}
HINTED = {
    "num_virtual_tokens": "PrefixConfig",
    "per_device_train_batch_size": "TrainConfig",
    "max_tokens": "GenerationParams",
}

# ---- errors and the command line ----

ERRORS = {
    "ConfigError": ValueError,
    "DataError": ValueError,
    "BaseMismatchError": ValueError,
    "UnknownPrefixError": KeyError,
    "RequestError": ValueError,
    "CapacityError": RuntimeError,
}
OPTION_FLAGS = {
    "train": ("TrainConfig", "PrefixConfig", "MethodConfig"),
    "generate": ("GenerationParams", "EngineConfig"),
    "score": ("EngineConfig",),
}
COMMANDS = {
    "train": "model data --prompt --target --table --output --dry-run --config --print-config",
    "generate": "requests --output --config --print-config",
    "score": "--output --config --print-config",
    "eval": "outputs references --task --metrics --split --output --json",
    "data check": "path --task --prompt --target --table",
    "doctor": "model",
    **{
        f"prefixes {name}": "store" for name in ("list", "show", "inspect", "add", "rm", "rollback", "verify", "export")
    },
    "convert": "source target --recursive --verify",
    **{f"bench {name}": "" for name in ("generate", "train", "kernels", "tokenize")},
}


def commands(command: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    if not hasattr(command, "commands"):
        return {" ".join(path): command}
    return {
        name: found for word, own in command.commands.items() for name, found in commands(own, (*path, word)).items()
    }


def takes(command: Any) -> set[str]:
    return {word for p in command.params for word in ([p.name] if p.param_type_name == "argument" else p.opts)}


def missing_parameters(name: str, promised: Any) -> set[str]:
    real, wanted = inspect.signature(getattr(prefixfast, name)).parameters, inspect.signature(promised).parameters
    same = {
        n for n, p in wanted.items() if n in real and real[n].kind == p.kind and p.default in (ANY, real[n].default)
    }
    return {f"{name}({n})" for n in wanted if n not in same}


def takes_a_peft_model() -> bool:
    model = get_peft_model(tiny.make("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    try:
        load(model).close()
    except prefixfast.ConfigError:
        return False
    return True


def absent() -> set[str]:
    """Promised names that do not exist."""
    found = {m for name, promised in FUNCTIONS.items() for m in missing_parameters(name, promised)}
    found |= {
        f"{owner}.{n}"
        for owner, names in MEMBERS.items()
        for n in names.split()
        if not hasattr(getattr(prefixfast, owner), n)
    }
    fields = {
        owner: {f.name: f.default for f in dataclasses.fields(getattr(prefixfast, owner))}
        for owner in (*FIELDS, *OPTIONS)
    }
    found |= {f"{owner}.{n}" for owner, names in FIELDS.items() for n in names.split() if n not in fields[owner]}
    found |= {
        f"{owner}.{n}"
        for owner, own in OPTIONS.items()
        for n, d in own.items()
        if n not in fields[owner] or d not in (ANY, fields[owner][n])
    }
    there = commands(typer.main.get_command(app))
    found |= {name for name in COMMANDS if name not in there}
    found |= {
        f"{name} {word}"
        for name, words in COMMANDS.items()
        if name in there
        for word in words.split()
        if word not in takes(there[name])
    }
    for name, configs in OPTION_FLAGS.items():
        flags = {f"--{f.replace('_', '-')}" for c in configs for f in fields[c]}
        found |= {f"{name} {flag}" for flag in flags - takes(there[name])}
    return found | (set() if takes_a_peft_model() else {"load(PeftModel)"})


def test_every_promised_name_exists():
    assert absent() == set()


@pytest.mark.parametrize(("owner", "name"), WORDS)
def test_options_take_the_promised_values(owner, name):
    hint = get_type_hints(getattr(prefixfast, owner))[name]
    words = {w for h in (hint, *get_args(hint)) if get_origin(h) is Literal for w in get_args(h)}
    assert words == WORDS[owner, name]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_the_recipes_are_there(recipe):
    assert read_recipe(recipe, "e2e") is not None


@pytest.mark.parametrize("name", HINTED)
def test_names_of_other_libraries_get_a_hint(name):
    with pytest.raises(prefixfast.ConfigError, match="did you mean"):
        getattr(prefixfast, HINTED[name]).make(**{name: 1})


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_also_the_built_in_ones(name):
    assert issubclass(getattr(prefixfast, name), (ERRORS[name],))
    assert issubclass(getattr(prefixfast, name), prefixfast.PrefixFastError)


def test_errors_carry_path_line_and_index():
    error = prefixfast.DataError("m", path="p", line=3)
    assert (error.path, error.line, prefixfast.RequestError("m", index=2).index) == ("p", 3, 2)


@pytest.mark.parametrize("name", ["Folder", "Metrics", "PrefixStore", "TrainRun"])
def test_mappings(name):
    assert issubclass(getattr(prefixfast, name), Mapping)


@pytest.mark.parametrize(
    "given", [str, Path, AutoModelForCausalLM.from_pretrained, load], ids=["text", "path", "transformers", "Model"]
)
def test_ways_to_give_a_base(given, folder):
    with load(given(folder)) as base:
        assert base.vocab_size == tiny.VOCAB
        assert base.tokenizer is not None


def test_a_bare_row_or_a_flat_list_is_no_batch(folder):
    with load(folder) as base:
        for batch in ({"prompt": "a"}, [5, 6]):
            with pytest.raises(prefixfast.ConfigError, match="batch"):
                prefixfast.generate(batch, model=base, max_new_tokens=1)
