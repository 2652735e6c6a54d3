"""Folders of trained weights: what a write replaces, and options that an adapter's two files must agree on."""

from __future__ import annotations

import json

import pytest
import torch

import tiny
from composed import error
from prefixfast import ConfigError, DataError, Prefix, TunedWeights, load, score, train
from token_rows import rows

META, CONFIG = "prefixfast.json", "adapter_config.json"
FILES = {
    "full": [META, "tuned.safetensors"],
    "lora": [CONFIG, "adapter_model.safetensors", META],
    "prefix": [CONFIG, "adapter_model.safetensors", META],
    "infix": ["prefix.safetensors", META],
}
RANDOM = {"init": "random", "reparameterization": "none", "prefix_length": 2}
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def base():
    with load(tiny.make("llama")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def made(base):
    """A result of each method."""
    own = {"prefix": RANDOM, "infix": RANDOM}
    return {m: train(base, rows(0, 3), method=m, max_steps=2, learning_rate=0.1, **own.get(m, {})) for m in FILES}


def files(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(("old", "new"), [("full", "prefix"), ("lora", "infix"), ("prefix", "full"), ("infix", "lora")])
def test_the_other_kind_is_replaced_only_if_asked(made, tmp_path, old, new):
    (tmp_path / "notes.txt").write_text("stays")
    made[old].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"holds (a prefix|weights of method '(full|lora)'), which the"):
        made[new].save_pretrained(tmp_path)
    assert type(made[old]).from_pretrained(tmp_path).digest == made[old].digest
    made[new].save_pretrained(tmp_path, overwrite=True)
    assert type(made[new]).from_pretrained(tmp_path).digest == made[new].digest
    assert files(tmp_path) == sorted([*FILES[new], "notes.txt"])


@pytest.mark.parametrize(("old", "new"), [("full", "lora"), ("lora", "full"), ("prefix", "infix"), ("infix", "prefix")])
def test_the_same_kind_is_replaced_without_a_rest(made, tmp_path, old, new):
    for method in (old, new):
        made[method].save_pretrained(tmp_path)
    assert files(tmp_path) == sorted(FILES[new])


def test_adapters_of_other_programs_are_never_replaced(made, tmp_path):
    made["prefix"].to_peft(tmp_path / "prefix")
    with pytest.raises(ConfigError, match="holds a PEFT adapter of type PREFIX_TUNING"):
        made["full"].save_pretrained(tmp_path / "prefix")
    made["lora"].save_pretrained(tmp_path / "lora")
    with pytest.raises(ConfigError, match="holds weights of method 'lora'"):
        made["prefix"].to_peft(tmp_path / "lora")
    (tmp_path / "lora" / META).unlink()
    for method in ("prefix", "lora"):
        with pytest.raises(ConfigError, match="holds a PEFT adapter of type 'LORA'"):
            made[method].save_pretrained(tmp_path / "lora", overwrite=True)


def test_a_run_replaces_the_other_kind_if_asked(base, made, tmp_path):
    made["full"].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="overwrite=True"):
        train(base, rows(0, 3), max_steps=1, output_dir=tmp_path, **RANDOM)
    prefix = train(base, rows(0, 3), max_steps=1, output_dir=tmp_path, overwrite=True, **RANDOM)
    assert Prefix.from_pretrained(tmp_path).digest == prefix.digest
    assert "tuned.safetensors" not in files(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"lora_alpha": 40},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 1}},
        {"target_modules": "q_proj"},
        {"target_modules": ["k_proj", "q_proj"]},
        {"layers_to_transform": [0]},
        {"exclude_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_files_of_an_adapter_with_different_options_are_refused(made, tmp_path, changed):
    made["lora"].save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    reordered = {"target_modules": config["target_modules"][::-1], "lora_dropout": 0.1}
    (tmp_path / CONFIG).write_text(json.dumps(config | reordered))
    assert TunedWeights.from_pretrained(tmp_path).digest == made["lora"].digest
    (tmp_path / CONFIG).write_text(json.dumps(config | changed))
    with pytest.raises(DataError, match="have different options"):
        TunedWeights.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"layer_replication": [[0, 2], [1, 3]]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"loftq_config": {"loftq_bits": 4}},
        {"lora_dropout": 0.5},
        {"lora_alpha": 0},
        {"r": 2.0},
        {"r": None},
        {"target_modules": r"((\w|\.)+)+_projX"},
        {"target_modules": []},
        {"target_modules": [1]},
        {"target_modules": None},
        {"layers_to_transform": [0]},
    ],
    ids=str,
)
def test_options_of_lora_are_those_that_are_computed_right(made, tmp_path, changed):
    a, b = torch.zeros(2, 8), torch.zeros(8, 2)
    tensors = {f"model.layers.0.self_attn.q_proj.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
    assert TunedWeights(tensors, "lora", LORA | {"target_modules": "all-linear"}).method == "lora"
    with pytest.raises(DataError, match="options: "):
        TunedWeights(tensors, "lora", LORA | changed)
    made["lora"].save_pretrained(tmp_path)
    meta = json.loads((tmp_path / META).read_text())
    (tmp_path / META).write_text(json.dumps(meta | {"options": meta["options"] | changed}))
    with pytest.raises(DataError, match="options: ") as caught:
        TunedWeights.from_pretrained(tmp_path)
    assert str(caught.value).count(META) == 1


def test_a_pattern_of_layers_is_stored_as_names(monkeypatch, tmp_path):
    from peft.utils import constants

    known = {"llama": r".*\.(q_proj|v_proj)"}
    monkeypatch.setattr(constants, "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", known)
    with load(tiny.make("llama")) as own:
        weights = train(own, rows(0, 3), method="lora", max_steps=1)
        weights.save_pretrained(tmp_path)
        again = TunedWeights.from_pretrained(tmp_path)
        scores = [score(rows(0, 2), w, model=own)[0].logprob for w in (weights, again)]
    assert len(weights.options["target_modules"]) == 2 * 3
    assert scores[0] == scores[1]


def test_a_base_is_given_back_with_its_configuration():
    from prefixfast.model.tuned.lora import applied_lora

    with load(tiny.make("llama")) as own:
        before, right = own.hf.config.to_dict(), score(rows(0, 2), model=own)[0].logprob
        fields = LORA | {"layer_replication": [[0, 2], [1, 3]]}
        with pytest.raises(ConfigError), applied_lora(own, {"model.x.lora_A.weight": torch.zeros(2, 2)}, fields):
            pass
        assert own.hf.config.to_dict() == before
        assert error(torch.tensor(score(rows(0, 2), model=own)[0].logprob), torch.tensor(right)) == 0


def test_adapters_without_a_shape_are_refused(base):
    weights = TunedWeights({"0.down.bias": torch.tensor(1.0)}, "adapter")
    with pytest.raises(ConfigError, match="do not fit this base"):
        score(rows(0, 1), weights, model=base)
