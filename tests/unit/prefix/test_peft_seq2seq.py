"""PEFT adapters of encoder-decoder models: both layouts in, one out, equal logits, and the refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import DynamicCache, EncoderDecoderCache

import seq2seq
import tiny
from prefixfast import BaseMismatchError, ConfigError, DataError, Prefix, check_fits, generate, load
from sites import make_prefix, packed_logits

CONFIG, WEIGHTS, META = "adapter_config.json", "adapter_model.safetensors", "prefixfast.json"
KINDS = {"PREFIX_TUNING": PrefixTuningConfig, "CARTRIDGE": CartridgeConfig}
DEPTHS = {"bart": ("encoder_layers", "decoder_layers"), "flan-t5": ("num_layers", "num_decoder_layers")}
SOURCE, TARGET = seq2seq.random_texts([7, 4])


def make(name: str, depths: tuple[int, int]) -> Any:
    return seq2seq.make_seq2seq(name, **dict(zip(DEPTHS[name], depths, strict=True)))


def peft_config(name: str, kind: str, **fields: Any) -> Any:
    sizes = {"token_dim": 24, "num_attention_heads": 4} if name == "flan-t5" else {}  # PEFT takes d_model by itself
    return KINDS[kind](task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5, **sizes, **fields)


def peft_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=SOURCE[None], decoder_input_ids=TARGET[None]).logits[0]


def oracle_logits(name: str, depths: tuple[int, int], prefix: Prefix) -> torch.Tensor:
    hf = make(name, depths)
    with torch.no_grad():
        return seq2seq.logits_of(hf, SOURCE, TARGET, dict(prefix.kv), prefix.pos_start)


def adapter(folder: Path, name: str, depths: tuple[int, int], kind: str = "PREFIX_TUNING", **fields: Any) -> Any:
    """Save a random adapter of PEFT, and return its model."""
    model = get_peft_model(make(name, depths), peft_config(name, kind, **fields))
    with torch.no_grad():
        for p in model.prompt_encoder.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    model.save_pretrained(folder)
    return model.eval()


IMPORTS = [
    ("bart", (4, 4), 2, {}),
    ("bart", (3, 3), 2, {}),
    ("bart", (4, 2), 2, {}),
    ("bart", (3, 2), 1, {}),
    ("bart", (2, 4), 1, {"num_layers": 4}),
    ("flan-t5", (3, 3), 2, {}),
    ("flan-t5", (3, 2), 1, {"num_layers": 2}),
]


@pytest.mark.parametrize(("name", "depths", "submodules", "fields"), IMPORTS)
def test_adapters_of_both_layouts_give_their_logits(tmp_path, caplog, name, depths, submodules, fields):
    theirs = adapter(tmp_path / "theirs", name, depths, num_transformer_submodules=submodules, **fields)
    own = theirs.get_prompt
    if submodules == 1:  # PEFT gives cross-attention the cache of self-attention, in which it sees later tokens
        theirs.get_prompt = lambda *given, **more: EncoderDecoderCache(own(*given, **more), DynamicCache())
    prefix = Prefix.from_pretrained(tmp_path / "theirs")
    count = fields.get("num_layers", depths[0])
    assert (prefix.sites, prefix.layers, prefix.pos_start) == (("self",), tuple(range(count)), 5)
    assert prefix.training == {"imported_from": "peft", "peft_submodules": submodules, "peft_layers": count}
    assert ("cross-attention too" in caplog.text) == (submodules == 1)
    table = load_file(tmp_path / "theirs" / WEIGHTS)["prompt_embeddings"].view(5, count, 2, 4, -1)
    for i in range(count):
        pair = 2 * i % count if submodules == 2 else i
        assert torch.equal(prefix.kv[f"self.{i}.k"], table[:, pair, 0])
        assert torch.equal(prefix.kv[f"self.{i}.v"], table[:, pair, 1])
    expected = peft_logits(theirs)
    with load(make(name, depths)) as base:
        check_fits(base, prefix)
        assert torch.allclose(packed_logits(base, [prefix], SOURCE, TARGET), expected, atol=5e-5)
    assert torch.allclose(oracle_logits(name, depths, prefix), expected, atol=5e-5)
    moved = Prefix({n: prefix.kv[n.replace("self.0", "self.1")] for n in prefix.kv}, pos_start=5)
    assert not torch.allclose(oracle_logits(name, depths, moved), expected, atol=1e-3)
    # Saved here, the same prefix is an adapter with a pair of its own for each layer.
    prefix.save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / CONFIG).read_text(encoding="utf8"))
    assert (config["num_transformer_submodules"], config["num_layers"]) == (2, count + 1 - count % 2)
    assert Prefix.from_pretrained(tmp_path / "ours").digest == prefix.digest
    again = PeftModel.from_pretrained(make(name, depths), tmp_path / "ours").eval()
    assert torch.allclose(peft_logits(again), expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DEPTHS)
def test_a_decoder_prefix_gives_its_logits_in_peft(tmp_path, name, kind):
    depths = (3, 2)
    hf = make(name, depths)
    with load(make(name, depths)) as base:
        kv = seq2seq.random_kv(hf, {"self": 5})
        prefix = Prefix(kv, pos_start=5, base=base.fingerprint)
        logits = packed_logits(base, [prefix], SOURCE, TARGET)
        text = generate([SOURCE.tolist()], prefix, model=base, max_new_tokens=6)[0].token_ids
    prefix.to_peft(tmp_path / "p", peft_type=kind)
    config = json.loads((tmp_path / "p" / CONFIG).read_text(encoding="utf8"))
    heads, dim = prefix.shapes["self.0.k"][1:]
    expected = {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2, "num_layers": 3, "token_dim": heads * dim}
    assert expected.items() <= config.items()
    theirs = PeftModel.from_pretrained(make(name, depths), tmp_path / "p").eval()
    assert torch.allclose(logits, peft_logits(theirs), atol=5e-5)
    assert torch.allclose(peft_logits(theirs), oracle_logits(name, depths, prefix), atol=5e-5)
    made = theirs.generate(input_ids=SOURCE[None], attention_mask=torch.ones(1, 7, dtype=torch.long), max_new_tokens=6)
    with seq2seq.oracle(hf, prefix):
        alone = hf.generate(input_ids=SOURCE[None], max_new_tokens=6, use_cache=False)
    assert made.tolist() == alone.tolist()
    assert made[0, 1:].tolist()[: len(text)] == text
    assert len(text) == 6 or made[0, 1 + len(text)] in (hf.config.eos_token_id, hf.config.pad_token_id)


def test_an_adapter_of_fewer_layers_than_the_decoder_is_refused(tmp_path):
    adapter(tmp_path, "bart", (2, 2))
    with load(make("bart", (2, 4))) as base, pytest.raises(BaseMismatchError, match="for how many it was made"):
        check_fits(base, Prefix.from_pretrained(tmp_path))


def test_frozen_rows_of_an_encoder_decoder_cartridge_are_kept(tmp_path):
    theirs = adapter(tmp_path / "theirs", "bart", (2, 2), "CARTRIDGE", num_frozen_tokens=2)
    prefix = Prefix.from_pretrained(tmp_path / "theirs")
    assert prefix.training == {
        "imported_from": "peft",
        "num_frozen_tokens": 2,
        "peft_submodules": 2,
        "peft_layers": 2,
    }
    prefix.save_pretrained(tmp_path / "ours")
    again = Prefix.from_pretrained(tmp_path / "ours")
    assert (again.digest, again.training) == (prefix.digest, prefix.training)
    loaded = PeftModel.from_pretrained(make("bart", (2, 2)), tmp_path / "ours").eval()
    assert torch.allclose(peft_logits(loaded), peft_logits(theirs), atol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "pos_start", "reason"),
    [
        ({"enc": 3}, 0, "it has sites other than 'self'"),
        ({"self": 5, "cross": 2}, 5, "it has sites other than 'self'"),
        ({"self": 5}, 0, "text starts at another position"),
    ],
)
def test_what_peft_cannot_hold_is_refused(tmp_path, lengths, pos_start, reason):
    prefix = make_prefix(lengths, pos_start=pos_start, base={"config": {"is_encoder_decoder": True}})
    with pytest.raises(ConfigError, match=reason):
        prefix.to_peft(tmp_path / "p")
    prefix.save_pretrained(tmp_path / "p")
    assert not (tmp_path / "p" / CONFIG).exists()


@pytest.mark.parametrize(
    "change",
    [
        {"num_transformer_submodules": 3},
        {"num_transformer_submodules": True},
        {"num_transformer_submodules": 2, "task_type": "CAUSAL_LM"},
        {"num_transformer_submodules": 2, "task_type": None},
        {"task_type": "FEATURE_EXTRACTION"},
        {"task_type": ["SEQ_2_SEQ_LM"]},
    ],
)
def test_other_layouts_are_refused(tmp_path, change):
    adapter(tmp_path, "bart", (2, 2))
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf8"))
    (tmp_path / CONFIG).write_text(json.dumps({**config, **change}), encoding="utf8")
    with pytest.raises(DataError, match="expected task_type CAUSAL_LM with num_transformer_submodules 1, or SEQ_2_SEQ"):
        Prefix.from_pretrained(tmp_path)


def test_virtual_tokens_of_a_decoder_only_base_do_not_fit(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(tiny.make("gpt2"), config).save_pretrained(tmp_path)
    with load(make("bart", (2, 2))) as base, pytest.raises(BaseMismatchError, match="this base has an encoder"):
        Prefix.from_pretrained(tmp_path, model=base)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_virtual_tokens_of_an_encoder_are_refused_with_the_reason(tmp_path, kind):
    adapter(tmp_path, "bart", (2, 2))
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf8"))
    (tmp_path / CONFIG).write_text(json.dumps({**config, "peft_type": kind}), encoding="utf8")
    with pytest.raises(DataError, match=f"{kind} of an encoder-decoder model: the encoder reads its virtual tokens"):
        Prefix.from_pretrained(tmp_path)
