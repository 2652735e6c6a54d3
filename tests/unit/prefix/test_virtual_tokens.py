"""PROMPT_TUNING and P_TUNING adapters: the prefix made of them gives PEFT's logits and tokens, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import causal_lms
import tiny
import virtual
from composed import error, logits
from prefixfast import BaseMismatchError, ConfigError, DataError, Prefix, generate, load
from prefixfast.prefix import virtual_tokens
from virtual import LENGTH, PROMPT, adapter, peft_logits, peft_tokens, reloaded

ROWS = [PROMPT, PROMPT[:4], [1, 60, 61, 62, 63, 64, 65]]
SHAPES, OTHERS = ("gpt2", "llama", "qwen3"), ("opt", "gemma", "gemma2", "gemma3", "mistral", "gpt_neox", "qwen2")
FURTHER = ("phi", "granite", "cohere2", "olmo2")  # scales, parallel layers, windows, norms
CASES = [*((f, k) for f in SHAPES for k in virtual.CONFIGS), *((f, "PROMPT_TUNING") for f in (*OTHERS, *FURTHER))]
CONFIG, WEIGHTS, TABLE = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"


def make(family: str):
    return tiny.make(family) if family in tiny.FAMILIES else causal_lms.make(family)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_logits_and_tokens_are_those_of_peft(tmp_path, family, kind):
    trained = adapter(make(family), tmp_path, kind)
    with load(make(family)) as base:
        prefix = Prefix.from_pretrained(tmp_path, model=base)
        ours = [logits(base, ids, [prefix]) for ids in ROWS]
        alone = logits(base, PROMPT)
        tokens = [g.token_ids for g in generate(ROWS, prefix, model=base, max_new_tokens=6, min_new_tokens=6)]
    theirs = reloaded(make(family), tmp_path)
    for model in (trained, theirs):
        for mine, expected in zip(ours, peft_logits(model, ROWS), strict=True):
            assert error(mine, expected) < 1e-5
    assert error(alone, peft_logits(theirs, ROWS)[0]) > 1e-2
    assert tokens == [peft_tokens(theirs, ids, 6) for ids in ROWS]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "opt", "gemma3"])
def test_a_position_that_is_wrong_by_one_is_seen(tmp_path, family):
    theirs = adapter(make(family), tmp_path)
    expected = peft_logits(theirs, [PROMPT])[0]
    with load(make(family)) as base:
        prefix = Prefix.from_pretrained(tmp_path, model=base)
        for start in (LENGTH - 1, LENGTH + 1):
            wrong = Prefix(prefix.kv, **{**prefix.fields, "pos_start": start})
            assert error(logits(base, PROMPT, [wrong]), expected) > 1e-3


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_windows_slide_over_virtual_tokens_as_in_peft(tmp_path, family):
    length = tiny.WINDOW + 5
    theirs = adapter(make(family), tmp_path, length=length)
    with load(make(family)) as base:
        prefix = Prefix.from_pretrained(tmp_path, model=base)
        assert error(logits(base, PROMPT, [prefix]), peft_logits(theirs, [PROMPT], length)[0]) < 1e-5
        shown = Prefix(prefix.kv, **{**prefix.fields, "window": "always"})
        assert error(logits(base, PROMPT, [shown]), peft_logits(theirs, [PROMPT], length)[0]) > 1e-3


def test_padding_before_the_text_moves_it_in_peft_except_where_positions_count_the_mask(tmp_path):
    for family, same in (("opt", True), ("gpt2", False), ("llama", False)):
        theirs = adapter(make(family), tmp_path / family)
        right, left = (peft_logits(theirs, ROWS, left=left)[1] for left in (False, True))
        with load(make(family)) as base:
            ours = logits(base, ROWS[1], [Prefix.from_pretrained(tmp_path / family, model=base)])
        assert error(ours, right) < 1e-5
        assert (error(ours, left) < 1e-5) is same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_in_half_precision_and_one_virtual_token(tmp_path, dtype):
    adapter(make("llama"), tmp_path, length=1)
    table = load_file(tmp_path / WEIGHTS)[TABLE].to(dtype)
    save_file({TABLE: table}, tmp_path / WEIGHTS)
    theirs = reloaded(make("llama"), tmp_path)
    with load(make("llama")) as base:
        prefix = Prefix.from_pretrained(tmp_path, model=base)
        assert error(logits(base, PROMPT, [prefix]), peft_logits(theirs, [PROMPT], 1)[0]) < 1e-5


def test_a_base_in_bf16(tmp_path):
    theirs = adapter(make("llama"), tmp_path)
    with load(tiny.make("llama", dtype=torch.bfloat16)) as base:
        prefix = Prefix.from_pretrained(tmp_path, model=base)
        assert error(logits(base, PROMPT, [prefix]).float(), peft_logits(theirs, [PROMPT])[0]) < 0.05
        assert prefix.base == base.fingerprint


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING MLP"])
def test_the_prefix_is_one_of_this_base_and_saves_as_prefix_tuning(tmp_path, kind):
    theirs = adapter(make("qwen3"), tmp_path / "theirs", kind)
    with load(make("qwen3")) as base:
        prefix = Prefix.from_pretrained(tmp_path / "theirs", model=base)
        assert (prefix.base, prefix.pos_start, prefix.window, prefix.task) == (base.fingerprint, LENGTH, "slide", None)
    origin = {"imported_from": "peft", "peft_type": kind.split()[0], "num_trained": LENGTH * 32}
    assert prefix.training == origin
    prefix.save_pretrained(tmp_path / "ours")
    again = Prefix.from_pretrained(tmp_path / "ours")  # needs no base any more
    assert (again.digest, again.training, again.base) == (prefix.digest, origin, prefix.base)
    prefix.to_peft(tmp_path / "kv")
    assert json.loads((tmp_path / "kv" / CONFIG).read_text(encoding="utf8"))["peft_type"] == "PREFIX_TUNING"
    as_prefix = PeftModel.from_pretrained(make("qwen3"), tmp_path / "kv").eval()
    with torch.no_grad():
        got = as_prefix(input_ids=torch.tensor([PROMPT])).logits[0]
    assert error(got, peft_logits(theirs, [PROMPT])[0]) < 1e-5
    with pytest.raises(BaseMismatchError), load(tiny.make("qwen3", seed=1)) as other:
        generate([PROMPT], prefix, model=other)


def test_an_adapter_is_not_overwritten_by_the_prefix_made_of_it(tmp_path):
    adapter(make("gpt2"), tmp_path)
    with load(make("gpt2")) as base:
        prefix = Prefix.from_pretrained(tmp_path, model=base)
    with pytest.raises(ConfigError, match="PROMPT_TUNING"):
        prefix.save_pretrained(tmp_path)


# ---- refusals ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    adapter(make("gpt2"), folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def edit(folder: Path, **changes) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf8")) | changes), encoding="utf8")


def test_a_base_is_asked_for_by_the_name_of_the_argument(copy):
    edit(copy, base_model_name_or_path="ann/base")
    with pytest.raises(DataError, match=r"model=.*--model.*'ann/base'"):
        Prefix.from_pretrained(copy)


HARM = {
    "rows": lambda p: edit(p, num_virtual_tokens=LENGTH + 1),
    "no rows": lambda p: edit(p, num_virtual_tokens=0),
    "rows as a text": lambda p: edit(p, num_virtual_tokens="5"),
    "width": lambda p: edit(p, token_dim=31),
    "width 10^400": lambda p: edit(p, token_dim=10**400),
    "width true": lambda p: edit(p, token_dim=True),
    "layers as a text": lambda p: edit(p, num_layers="3"),
    "encoder and decoder": lambda p: edit(p, num_transformer_submodules=2),
    "another task": lambda p: edit(p, task_type="SEQ_2_SEQ_LM"),
    "base as a list": lambda p: edit(p, base_model_name_or_path=["x"]),
    "not a number": lambda p: save_file({TABLE: torch.full((LENGTH, 32), torch.nan)}, p / WEIGHTS),
    "infinite": lambda p: save_file({TABLE: torch.full((LENGTH, 32), torch.inf)}, p / WEIGHTS),
    "three dimensions": lambda p: save_file({TABLE: torch.ones(LENGTH, 32, 1)}, p / WEIGHTS),
    "no dimension": lambda p: save_file({TABLE: torch.tensor(1.0)}, p / WEIGHTS),
    "integers": lambda p: save_file({TABLE: torch.ones(LENGTH, 32, dtype=torch.int32)}, p / WEIGHTS),
    "8-bit floats": lambda p: save_file({TABLE: torch.ones(LENGTH, 32).to(torch.float8_e4m3fn)}, p / WEIGHTS),
    "another name": lambda p: save_file({"embedding.weight": torch.ones(LENGTH, 32)}, p / WEIGHTS),
    "a further tensor": lambda p: save_file({TABLE: torch.ones(LENGTH, 32), "x": torch.ones(1)}, p / WEIGHTS),
    "no tensors": lambda p: (p / WEIGHTS).unlink(),
    "garbage": lambda p: (p / WEIGHTS).write_bytes(b"\xff" * 100),
    "a pickle": lambda p: (p / WEIGHTS).rename(p / "adapter_model.bin"),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_a_damaged_adapter_is_refused(copy, base, harm):
    Prefix.from_pretrained(copy, model=base)
    harm(copy)
    with pytest.raises(DataError) as caught:
        Prefix.from_pretrained(copy, model=base)
    assert caught.value.path is not None
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("length", [160, 200])
def test_an_adapter_that_leaves_no_position_is_refused(copy, base, length):
    edit(copy, num_virtual_tokens=length)
    save_file({TABLE: torch.ones(length, 32)}, copy / WEIGHTS)
    with pytest.raises(ConfigError, match="160 positions"):
        Prefix.from_pretrained(copy, model=base)


def test_an_adapter_of_a_base_of_other_sizes_is_refused(copy, base):
    save_file({TABLE: torch.ones(LENGTH, 48)}, copy / WEIGHTS)
    edit(copy, token_dim=48)
    with pytest.raises(BaseMismatchError, match="48 numbers, this base has 32"):
        Prefix.from_pretrained(copy, model=base)
    save_file({TABLE: torch.ones(LENGTH, 32)}, copy / WEIGHTS)
    edit(copy, token_dim=32, num_layers=12)
    with pytest.raises(BaseMismatchError, match="12 layers, this base has 3"):
        Prefix.from_pretrained(copy, model=base)


@pytest.mark.parametrize("kind", ["gemma3n_text", "ctrl", "gemma4_text"])
def test_a_base_that_needs_the_ids_of_tokens_is_refused(tmp_path, saved, kind):
    edit_to = {"num_layers": None}
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    edit(tmp_path, **edit_to)
    with load(causal_lms.make(kind)) as base, pytest.raises(ConfigError, match=r"PEFT's results.*run it with PEFT"):
        Prefix.from_pretrained(tmp_path, model=base)


def test_the_comparison_with_a_forward_of_the_embeddings_sees_a_wrong_position(copy, base, monkeypatch):
    data = virtual_tokens.PrefixData

    def moved(kv, **fields):
        return data(kv, **{**fields, "pos_start": fields["pos_start"] + 1})

    monkeypatch.setattr(virtual_tokens, "PrefixData", moved)
    with pytest.raises(ConfigError, match="relative error"):
        Prefix.from_pretrained(copy, model=base)


OTHER_TYPES = {
    "LORA": "TunedWeights.from_pretrained in Python",
    "MULTITASK_PROMPT_TUNING": "task_ids",
    "ADAPTION_PROMPT": "run it with PEFT",
    "CPT": "Prefix.from_text",
    "XLORA": "expected PREFIX_TUNING or CARTRIDGE or PROMPT_TUNING or P_TUNING",
}


@pytest.mark.parametrize("kind", OTHER_TYPES)
def test_adapters_of_other_types_are_refused_with_advice(copy, base, kind):
    edit(copy, peft_type=kind)
    with pytest.raises(DataError) as caught:
        Prefix.from_pretrained(copy, model=base)
    assert kind in str(caught.value)
    assert OTHER_TYPES[kind] in str(caught.value)


def test_an_own_folder_does_not_load_the_base(make_prefix, tmp_path):
    make_prefix().save_pretrained(tmp_path / "p")
    assert Prefix.from_pretrained(tmp_path / "p", model="/nowhere").length == 4
