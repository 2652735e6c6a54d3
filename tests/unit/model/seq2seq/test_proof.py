"""The proof of encoder-decoder models at load: faults that it refuses, and models that it leaves as they were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from prefixfast import ConfigError
from prefixfast.attention import hf_interface
from prefixfast.attention.plan import Plan
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan
from prefixfast.model.attach import attach
from prefixfast.model.proof import seq2seq_cases, seq2seq_serving
from prefixfast.model.seq2seq import families, head
from prefixfast.model.seq2seq.families import t5
from seq2seq import NAMES, make_seq2seq

BARTS, T5S, TWO = ("bart", "m2m_100"), ("t5", "umt5"), ("bart", "t5")


def refusal(model: Any) -> str:
    """Error message of `attach`."""
    with pytest.raises(ConfigError, match="cannot attach") as caught:
        attach(model)
    return str(caught.value)


DTYPES = [(name, torch.float32) for name in NAMES]
DTYPES += [(name, dtype) for name in ("bart", "t5") for dtype in (torch.bfloat16, torch.float64)]


@pytest.mark.parametrize(("name", "dtype"), DTYPES, ids=str)
def test_every_family_and_dtype_passes(name, dtype):
    model = make_seq2seq(name).to(dtype)
    before = [(p.data_ptr(), p.dtype, p._version) for p in model.parameters()]
    attach(model).detach()
    assert [(p.data_ptr(), p.dtype, p._version) for p in model.parameters()] == before


@pytest.mark.parametrize("depths", [(1, 3), (4, 1), (5, 2)], ids=str)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_stacks_of_other_depths_pass(name, depths):
    fields = ("num_layers", "num_decoder_layers") if name == "t5" else ("encoder_layers", "decoder_layers")
    attach(make_seq2seq(name, **dict(zip(fields, depths, strict=True)))).detach()


def test_an_encoder_with_other_heads_of_the_same_width_passes():
    attach(make_seq2seq("bart", encoder_attention_heads=2)).detach()


# ---- planted mistakes ----


def swap_self_and_cross(patch: Any) -> None:
    """Prefix rows of the decoder's self-attention and of cross-attention change places."""
    real, other = seq2seq_cases.PackedSeq2Seq._site_prefixes, {"self": "cross", "cross": "self"}
    patch.setattr(
        seq2seq_cases.PackedSeq2Seq, "_site_prefixes", lambda own, site, given: real(own, other.get(site, site), given)
    )


def drop_encoder_rows(patch: Any) -> None:
    real = seq2seq_cases.prefix_rows

    def prefix_rows(rows: Any, depth: int) -> Any:
        return real([r._replace(length=0) if depth == 3 else r for r in rows], depth)

    patch.setattr(seq2seq_cases, "prefix_rows", prefix_rows)  # the encoder has 3 layers, the decoder 2


def shift_bias(patch: Any) -> None:
    """The bias of every distance is that of the next one."""
    real = t5._buckets
    patch.setattr(t5, "_buckets", lambda module: real(module).roll(1))


def shift_bias_of_texts_after_prefixes(patch: Any) -> None:
    """Prefix rows count as distance between the tokens after them."""
    real = hf_interface._packed_attention

    def attention(plan: Plan, layer: int, qkv: Any, options: Any, bias: Any) -> Any:
        moved = bias is not None and plan.prefix is not None
        return real(plan, layer, qkv, options, bias.roll(3, 1).contiguous() if moved else bias)

    patch.setattr(hf_interface, "_packed_attention", attention)


def change_plans(patch: Any, module: Any, maker: str, change: Callable[[Seq2SeqPlan], Seq2SeqPlan]) -> None:
    real = getattr(module, maker)
    patch.setattr(module, maker, lambda *args, **how: change(real(*args, **how)))


def shift_encoder_positions(patch: Any) -> None:
    """Encoder texts start after the prefix."""

    def change(plan: Seq2SeqPlan) -> Seq2SeqPlan:
        assert plan.encoder is not None
        return replace(plan, encoder=replace(plan.encoder, position_ids=plan.encoder.position_ids + 1))

    change_plans(patch, seq2seq_cases, "seq2seq_training_plan", change)


def positions_from_zero(patch: Any) -> None:
    real = seq2seq_cases.prefix_rows
    patch.setattr(seq2seq_cases, "prefix_rows", lambda rows, n: real([r._replace(pos_start=0) for r in rows], n))


def shift_prefix_rows(patch: Any) -> None:
    """Prefix rows stand one further away from the text."""

    def change(plan: Seq2SeqPlan) -> Seq2SeqPlan:
        for packed in plan.decoder.packed or ():
            packed.use[:, 1] -= 1
            packed.user_pos.sub_(1)
        return plan

    change_plans(patch, seq2seq_cases, "seq2seq_training_plan", change)


def neighbours_encoder_in_prefill(patch: Any) -> None:
    """Cross-attention of a prefill sees the encoder tokens of another request."""

    def change(plan: Seq2SeqPlan) -> Seq2SeqPlan:
        for packed in plan.cross.packed or ():
            packed.seg[:, 2:] = packed.seg[:, 2:].roll(1, 0)
        return plan

    change_plans(patch, seq2seq_serving, "seq2seq_prefill_plan", change)


def neighbours_encoder_in_decode(patch: Any) -> None:
    """Cross-attention of a decode step sees the encoder rows of another request."""

    def change(plan: Seq2SeqPlan) -> Seq2SeqPlan:
        for tables in plan.cross.decode or ():
            tables.block.copy_(tables.block.roll(1, 0))
        return plan

    change_plans(patch, seq2seq_serving, "seq2seq_decode_plan", change)


def write_to_the_slot_before(patch: Any) -> None:
    def change(plan: Seq2SeqPlan) -> Seq2SeqPlan:
        assert plan.decoder.slots is not None
        return replace(plan, decoder=replace(plan.decoder, slots=plan.decoder.slots - 1))

    change_plans(patch, seq2seq_serving, "seq2seq_decode_plan", change)


def write_encoder_rows_to_the_row_before(patch: Any) -> None:
    def change(plan: Seq2SeqPlan) -> Seq2SeqPlan:
        assert plan.cross.slots is not None
        return replace(plan, cross=replace(plan.cross, slots=plan.cross.slots - 1))

    change_plans(patch, seq2seq_serving, "seq2seq_prefill_plan", change)


def first_fold_only(patch: Any) -> None:
    """Encoder layers that share tensors read the rows of the first of them."""
    patch.setattr(Plan, "view", lambda _, __: 0)


def no_logits_bias(patch: Any) -> None:
    patch.setattr(head, "logits_bias", lambda _: None)


def no_wrap(patch: Any) -> None:
    changed = {**families.FAMILIES, "mbart": families.FAMILIES["bart"]}
    for module in ("facts", "families"):
        patch.setattr(f"prefixfast.model.seq2seq.{module}.FAMILIES", changed)


MISTAKES: list[tuple[str, Callable[[Any], None], str]] = [
    *((name, swap_self_and_cross, "a prefix at three sites") for name in TWO),
    *((name, drop_encoder_rows, "a prefix of the encoder") for name in TWO),
    *((name, shift_bias, "packed texts") for name in T5S),
    *((name, shift_bias_of_texts_after_prefixes, "a prefix of a text") for name in T5S),
    *((name, shift_prefix_rows, "a prefix of a text") for name in T5S),
    *((name, shift_encoder_positions, "a prefix of the encoder") for name in BARTS),
    *((name, positions_from_zero, "a prefix of a text") for name in BARTS),
    *((name, neighbours_encoder_in_prefill, "prefill") for name in TWO),
    *((name, neighbours_encoder_in_decode, "decode") for name in TWO),
    *((name, write_to_the_slot_before, "decode") for name in TWO),
    *((name, write_encoder_rows_to_the_row_before, "decode") for name in TWO),
    *((name, first_fold_only, "prefill") for name in TWO),
    ("bart", no_logits_bias, "its logits are not those of its output layer"),
    ("mbart", no_wrap, "decoder tokens of labels"),
]


@pytest.mark.parametrize(("name", "plant", "named"), MISTAKES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_planted_mistake_is_refused(name, plant, named, monkeypatch):
    plant(monkeypatch)
    assert named in refusal(make_seq2seq(name))


@pytest.mark.parametrize("plant", [swap_self_and_cross, neighbours_encoder_in_decode, write_to_the_slot_before])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_planted_mistake_is_refused_in_half_precision(name, plant, monkeypatch):
    plant(monkeypatch)
    assert "its results differ from its own forward" in refusal(make_seq2seq(name).to(torch.bfloat16))


@pytest.mark.parametrize("unit", [15_000, 2**30])  # layers of a block, and whole stacks
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_model_without_memory_for_all_copies_is_compared_module_by_module(name, unit, monkeypatch):
    monkeypatch.setattr("prefixfast.model.proof.precision.free_memory", lambda _: 0)
    monkeypatch.setattr("prefixfast.model.proof.precision.UNIT_BYTES", unit)
    attach(make_seq2seq(name).to(torch.bfloat16)).detach()
    swap_self_and_cross(monkeypatch)
    assert "a prefix at three sites" in refusal(make_seq2seq(name).to(torch.bfloat16))


@pytest.mark.parametrize("error", [KeyError("x"), AttributeError("x"), IndexError("x")], ids=repr)
def test_an_error_of_the_models_own_code_becomes_a_refusal(error, monkeypatch):
    model = make_seq2seq("bart")

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(type(model.model.decoder), "forward", fail)
    assert type(error).__name__ in refusal(model)


def test_a_model_with_few_positions_is_refused():
    assert "expected at least 20 positions of BartEncoder, got 12" in refusal(
        make_seq2seq("bart", max_position_embeddings=12)
    )
