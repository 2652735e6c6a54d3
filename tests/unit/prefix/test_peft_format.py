"""Import and export of PEFT adapters of both types, to the bit; incompatible prefixes are refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file

import tiny
from composed import error, logits
from prefixfast import ConfigError, DataError, Prefix, generate, load

FAMILIES, TYPES = ("gpt2", "llama", "qwen3"), ("PREFIX_TUNING", "CARTRIDGE")
META, CONFIG, WEIGHTS = "prefixfast.json", "adapter_config.json", "adapter_model.safetensors"
PROMPT = list(range(3, 20))


def peft_config(kind: str, **fields: Any) -> Any:
    return {"PREFIX_TUNING": PrefixTuningConfig, "CARTRIDGE": CartridgeConfig}[kind](
        task_type="CAUSAL_LM", num_virtual_tokens=5, **fields
    )


def adapter(folder: Path, family: str, kind: str, **fields: Any) -> Any:
    """Save a PEFT adapter after two steps of training, and return its model."""
    torch.manual_seed(4)
    model = get_peft_model(tiny.make(family), peft_config(kind, **fields))
    optimizer, ids = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5), torch.tensor([PROMPT])
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return model.eval()


def configuration(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text(encoding="utf8"))


@torch.no_grad()
def peft_logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.tensor([PROMPT])).logits[0]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_of_an_adapter_is_exact(tmp_path, family, kind):
    fields = {"num_frozen_tokens": 2} if kind == "CARTRIDGE" else {}
    theirs = adapter(tmp_path / "theirs", family, kind, **fields)
    prefix = Prefix.from_pretrained(tmp_path / "theirs")
    prefix.save_pretrained(tmp_path / "ours")
    Prefix.from_pretrained(tmp_path / "ours").to_peft(tmp_path / "back")
    for folder in ("ours", "back"):
        assert (tmp_path / folder / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
        assert configuration(tmp_path / folder) == configuration(tmp_path / "theirs")
    with load(tiny.make(family)) as base:
        assert error(logits(base, PROMPT, [prefix]), peft_logits(theirs)) < 1e-5
        assert error(logits(base, PROMPT), peft_logits(theirs)) > 1e-2


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_equal_logits_and_tokens(tmp_path, family, kind):
    with load(tiny.make(family)) as base:
        prefix = Prefix.from_text(base, list(range(40, 47)))
        ours = logits(base, PROMPT, [prefix])
        tokens = generate([PROMPT], prefix, model=base, max_new_tokens=8)[0].token_ids
    prefix.to_peft(tmp_path / "p", peft_type=kind)
    theirs = PeftModel.from_pretrained(tiny.make(family), tmp_path / "p").eval()
    assert error(peft_logits(theirs), ours) < 1e-5
    made = theirs.generate(
        input_ids=torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=8,
        do_sample=False,
    )
    assert made[0, len(PROMPT) :].tolist() == tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_exports_keep_the_dtype(tmp_path, make_prefix, kind, dtype):
    prefix = make_prefix(dtype=dtype)
    prefix.to_peft(tmp_path / "p", peft_type=kind)
    assert load_file(tmp_path / "p" / WEIGHTS)["prompt_embeddings"].dtype == dtype
    assert Prefix.from_pretrained(tmp_path / "p").digest == prefix.digest


@pytest.mark.parametrize("kind", TYPES)
def test_an_export_has_the_files_and_keys_of_peft_only(tmp_path, make_prefix, kind):
    prefix = make_prefix(training={"metrics": {"loss": 1.0}}, base={"name": "x/y", "config": {"vocab_size": 3}})
    prefix.save_pretrained(tmp_path / "p")  # the adapter replaces these files
    prefix.to_peft(tmp_path / "p", peft_type=kind)
    assert {p.name for p in (tmp_path / "p").iterdir()} == {CONFIG, WEIGHTS}
    get_peft_model(tiny.make("gpt2"), peft_config(kind)).save_pretrained(tmp_path / "theirs")
    assert configuration(tmp_path / "p").keys() == configuration(tmp_path / "theirs").keys()
    assert configuration(tmp_path / "p")["base_model_name_or_path"] == "x/y"


@pytest.mark.parametrize("frozen", [0, 1, 5])
def test_round_trip_of_frozen_rows(tmp_path, frozen):
    adapter(tmp_path / "theirs", "gpt2", "CARTRIDGE", num_frozen_tokens=frozen) if frozen < 5 else get_peft_model(
        tiny.make("gpt2"), peft_config("CARTRIDGE", num_frozen_tokens=5)
    ).save_pretrained(tmp_path / "theirs")
    prefix = Prefix.from_pretrained(tmp_path / "theirs")
    assert prefix.training == {"imported_from": "peft", "num_frozen_tokens": frozen}
    prefix.save_pretrained(tmp_path / "ours")
    again = Prefix.from_pretrained(tmp_path / "ours")
    assert again.training == prefix.training
    again.to_peft(tmp_path / "back")
    assert configuration(tmp_path / "back")["num_frozen_tokens"] == frozen
    loaded = PeftModel.from_pretrained(tiny.make("gpt2"), tmp_path / "back").prompt_encoder["default"]
    assert torch.equal(loaded.weight, load_file(tmp_path / "theirs" / WEIGHTS)["prompt_embeddings"])


def test_a_cartridge_exports_as_prefix_tuning(tmp_path):
    adapter(tmp_path / "theirs", "gpt2", "CARTRIDGE", num_frozen_tokens=2)
    Prefix.from_pretrained(tmp_path / "theirs").to_peft(tmp_path / "p", peft_type="PREFIX_TUNING")
    assert (tmp_path / "p" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    assert configuration(tmp_path / "p")["peft_type"] == "PREFIX_TUNING"


CANNOT = {
    "text starts at another position than the prefix's length": {"pos_start": 0},
    "sliding windows do not slide over it": {"window": "always"},
    "some layers have no prefix": {"layers": (0, 2)},
    "its numbers are fp64": {"dtype": torch.float64},
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("reason", "fields"), CANNOT.items(), ids=CANNOT)
def test_incompatible_prefixes_are_refused_with_the_reason(tmp_path, make_prefix, kind, reason, fields):
    with pytest.raises(ConfigError, match=reason):
        make_prefix(**fields).to_peft(tmp_path / "p", peft_type=kind)
    assert not (tmp_path / "p").exists()


def test_incompatible_sites_shapes_and_dtypes_are_refused(tmp_path, make_prefix):
    a = make_prefix(layers=(0,)).kv
    cases = {
        "it has sites other than 'self'": {**make_prefix().kv, **{n.replace("self", "cross"): t for n, t in a.items()}},
        "its layers differ in shape": {**a, **make_prefix(layers=(1,), length=2).kv},
        "its tensors differ in dtype": {**a, **make_prefix(layers=(1,), dtype=torch.float16).kv},
    }
    for reason, kv in cases.items():
        with pytest.raises(ConfigError, match=reason):
            Prefix(kv, 4).to_peft(tmp_path / "p")


def test_an_unknown_type_is_refused(tmp_path, make_prefix):
    with pytest.raises(ConfigError, match="peft_type: expected 'PREFIX_TUNING' or 'CARTRIDGE', got 'LORA'"):
        make_prefix().to_peft(tmp_path / "p", peft_type="LORA")


@pytest.mark.parametrize("frozen", [-1, 6, 1.5, "2", True, None])
def test_a_cartridge_with_impossible_frozen_rows_is_refused(tmp_path, frozen):
    adapter(tmp_path, "gpt2", "CARTRIDGE")
    (tmp_path / CONFIG).write_text(
        json.dumps({**configuration(tmp_path), "num_frozen_tokens": frozen}), encoding="utf8"
    )
    with pytest.raises(DataError, match="num_frozen_tokens: expected a number from 0 to 5"):
        Prefix.from_pretrained(tmp_path)


@pytest.mark.parametrize("frozen", [-1, 5, "2", True])
def test_a_prefix_with_impossible_frozen_rows_is_refused(make_prefix, frozen):
    with pytest.raises(DataError, match="num_frozen_tokens: expected a number from 0 to the 4 rows"):
        make_prefix(training={"num_frozen_tokens": frozen})
