"""The proof at load: faults that it refuses, with the reason, and models that it leaves as they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

import causal_lms
import tiny
from prefixfast import ConfigError
from prefixfast.attention import hf_interface, ops
from prefixfast.attention.plan import Plan
from prefixfast.model import packed_forward
from prefixfast.model.attach import attach
from prefixfast.model.proof import packed, serving
from prefixfast.model.proof.precision import float32_weights

LISTED = ("gpt2", "llama", "mistral", "gemma3")
WINDOWED = ("mistral", "gemma2", "gemma3")


def refusal(model: Any) -> str:
    """Error message of `attach`."""
    with pytest.raises(ConfigError, match="cannot attach") as caught:
        attach(model)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_listed_family_passes_in_every_dtype(family, dtype):
    model = tiny.make(family, dtype=dtype)
    before = [(p.data_ptr(), p.dtype, p._version) for p in model.parameters()]
    attach(model).detach()
    assert [(p.data_ptr(), p.dtype, p._version) for p in model.parameters()] == before


# ---- planted mistakes ----


def drop_prefix(monkeypatch: Any) -> None:
    """Packed forwards see a prefix of zeros."""
    real = ops.attn

    def attn(q: Any, k: Any, v: Any, pk: Any, pv: Any, tables: list[torch.Tensor], *rest: Any) -> Any:
        return real(q, k, v, *(None if t is None else t.mul(0) for t in (pk, pv)), tables, *rest)

    monkeypatch.setattr(ops, "attn", attn)


def ignore_window_in_decode(monkeypatch: Any) -> None:
    real = hf_interface._decode_attention
    monkeypatch.setattr(
        hf_interface,
        "_decode_attention",
        lambda plan, layer, q, options, bias: real(plan, layer, q, (options[0], 0, options[2]), bias),
    )


def ignore_window_in_packed_forwards(monkeypatch: Any) -> None:
    real = ops.attn
    monkeypatch.setattr(ops, "attn", lambda *args: real(*args[:9], 0, *args[10:]))


def write_to_the_slot_before(monkeypatch: Any) -> None:
    """The key and value of a decode step land in the slot of the token before."""
    real = serving.decode_plan

    def decode_plan(*args: Any) -> Plan:
        plan = real(*args)
        assert plan.slots is not None
        return replace(plan, slots=plan.slots - 1)

    monkeypatch.setattr(serving, "decode_plan", decode_plan)


def double_scores(monkeypatch: Any) -> None:
    """Scores are twice as large, as in a model that scales them outside of the attention interface."""
    real = hf_interface._packed_attention
    monkeypatch.setattr(
        hf_interface,
        "_packed_attention",
        lambda plan, layer, qkv, options, bias: real(plan, layer, qkv, (2 * options[0], *options[1:]), bias),
    )


def positions_from_zero(monkeypatch: Any) -> None:
    """Tokens after every prefix begin at position 0."""
    real = packed.prefix_rows
    monkeypatch.setattr(packed, "prefix_rows", lambda rows, n: real([r._replace(pos_start=0) for r in rows], n))


def forget_earlier_chunks(monkeypatch: Any) -> None:
    """A chunk of a prompt sees its own tokens only."""
    real = serving.prefill_plan
    monkeypatch.setattr(serving, "prefill_plan", lambda *args: replace(real(*args), key_slots=None))


MISTAKES: list[tuple[str, Callable[[Any], None], str]] = [
    *((family, drop_prefix, "a prefix of a text") for family in LISTED),
    *((family, write_to_the_slot_before, "decode") for family in LISTED),
    *((family, double_scores, "one sequence") for family in LISTED),
    *((family, positions_from_zero, "a prefix of a text") for family in LISTED),
    *((family, ignore_window_in_decode, "decode") for family in WINDOWED),
    *((family, ignore_window_in_packed_forwards, "a prefix longer than the sliding window") for family in WINDOWED),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "plant", "named"), MISTAKES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_planted_mistake_is_refused_for_a_listed_family(family, plant, named, dtype, monkeypatch):
    model = tiny.make(family, dtype=dtype)
    plant(monkeypatch)
    assert named in refusal(model)
    monkeypatch.undo()
    attach(model).detach()


def test_a_chunk_that_does_not_see_the_ones_before_is_refused(monkeypatch):
    forget_earlier_chunks(monkeypatch)
    assert "chunked prefill" in refusal(tiny.make("llama"))


def test_a_wrong_position_of_every_token_is_refused(monkeypatch):
    real = packed_forward.model_inputs
    monkeypatch.setattr(
        packed_forward, "model_inputs", lambda plan, ids: real(replace(plan, position_ids=plan.position_ids + 1), ids)
    )
    assert "one sequence" in refusal(tiny.make("gpt2"))


# ---- windows as numbers ----


def gemma3(mask: int | None, passed: int | None) -> Any:
    """Model whose mask has one window, and whose layers pass another; layer 1 has none."""
    model = tiny.make("gemma3")
    model.config.sliding_window = mask
    for layer in model.model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = passed
    return model


@pytest.mark.parametrize("window", [12, 600, 5000])
def test_a_window_that_differs_from_that_of_the_mask_is_refused(window):
    attach(gemma3(window, window)).detach()
    reason = refusal(gemma3(window, window + 1))
    assert f"layer 0 passes a window of {window + 1} tokens to attention, its own mask hides all but {window}" in reason
    assert "layer 1" not in reason
    reason = refusal(gemma3(window, None))
    assert f"layer 2 passes no window to attention, its own mask hides all but {window} keys" in reason


def test_a_window_that_the_mask_ignores_is_refused():
    model = gemma3(tiny.WINDOW, tiny.WINDOW)
    model.config.layer_types = ["full_attention"] * 3
    assert "layer 0 passes a window of 12 tokens to attention, its own mask hides no key" in refusal(model)


# ---- refused types, each with its reason ----

STATE = ("falcon_h1", "bamba", "jamba", "zamba2", "granitemoehybrid", "recurrent_gemma", "mamba", "qwen3_next", "rwkv")
HALVES = ("bart", "mbart", "pegasus", "marian", "whisper", "blenderbot", "bigbird_pegasus", "trocr", "prophetnet")
MASK_ONLY = ("phimoe", "qwen2_moe")
NO_KEYWORDS = ("stablelm", "nemotron")


@pytest.mark.parametrize("kind", STATE)
def test_state_beside_attention_is_refused(kind):
    reason = refusal(causal_lms.make(kind))
    assert "keep a recurrent state beside attention" in reason or "names layers of the kind" in reason


@pytest.mark.parametrize("kind", HALVES)
def test_half_of_an_encoder_decoder_is_refused(kind):
    assert "it is a part of an encoder-decoder model" in refusal(causal_lms.make(kind))


@pytest.mark.parametrize("kind", MASK_ONLY)
def test_a_window_in_the_mask_alone_is_refused(kind):
    assert f"passes no window to attention, its own mask hides all but {causal_lms.WINDOW} keys" in refusal(
        causal_lms.make(kind)
    )


@pytest.mark.parametrize("kind", NO_KEYWORDS)
def test_layers_that_drop_keyword_arguments_are_refused(kind):
    assert "its layers do not pass keyword arguments on to attention" in refusal(causal_lms.make(kind))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_router_logits_change_nothing(kind):
    attach(causal_lms.make(kind, output_router_logits=True)).detach()


@pytest.mark.parametrize("error", [KeyError("x"), AttributeError("x"), IndexError("x"), AssertionError("x")], ids=repr)
def test_an_error_of_the_models_own_code_becomes_a_refusal(error, monkeypatch):
    model = tiny.make("llama")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(type(model.model), "forward", fail)
    assert type(error).__name__ in refusal(model)


def test_the_decoder_of_a_saved_encoder_decoder_is_refused(tmp_path):
    config = transformers.BartConfig(
        vocab_size=tiny.VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        encoder_ffn_dim=48,
    )
    transformers.BartForConditionalGeneration(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "it is a part of an encoder-decoder model" in refusal(model)


def test_a_model_without_a_number_of_positions_is_refused():
    model = tiny.make("llama")
    vars(model.config)["max_position_embeddings"] = None
    assert "max_position_embeddings" in refusal(model)


# ---- precision ----


def test_weights_in_half_precision_are_fp32_inside_and_come_back():
    model = tiny.make("llama", dtype=torch.bfloat16)
    other = tiny.make("llama", dtype=torch.bfloat16)
    other.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    before = [id(p) for p in model.parameters()]
    with float32_weights(model) as precision:
        assert precision.limit < 1e-2
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert [id(p) for p in model.parameters()] == before
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("unit", [1000, 40_000, 2**30])
def test_a_model_without_memory_for_all_copies_is_compared_module_by_module(unit, monkeypatch):
    monkeypatch.setattr("prefixfast.model.proof.precision.free_memory", lambda _: 0)
    monkeypatch.setattr("prefixfast.model.proof.precision.UNIT_BYTES", unit)
    model = tiny.make("llama", dtype=torch.bfloat16)
    attach(model).detach()
    drop_prefix(monkeypatch)
    assert "a prefix" in refusal(model)
