"""PEFT adapters that hold keys and values of self-attention: PREFIX_TUNING and CARTRIDGE.

Both store one table ``prompt_embeddings`` of shape ``[P, L * 2 * H * D]``. Row p, viewed as ``[L, 2, H, D]``, holds key
and value of every layer. The text starts at position P, and keys are stored after RoPE. A CARTRIDGE has
``num_frozen_tokens``, the number of leading rows that training does not change.

An adapter of an encoder-decoder model (task_type SEQ_2_SEQ_LM) has rows for the decoder's self-attention alone. With
``num_transformer_submodules`` 2, the default, PEFT doubles the table and reads it four by four, so that layer l of the
decoder reads pair ``2 l mod L``. With an odd L every layer has a pair of its own, which is how adapters are written
here. With ``num_transformer_submodules`` 1 layer l reads pair l. PEFT 0.21.2 with transformers 5 then has one cache for
self-attention and cross-attention, whose queries see the prefix and all tokens of the decoder, later ones included.

Shape letters: P prefix rows, L layers, H key-value heads, D head dimension.

Source:
    PEFT 0.21.2, ``get_prompt`` and ``get_prompt_embedding_to_save`` in ``peft_model.py``, and ``tuners/cartridge``.
    tests/unit/prefix/test_peft_format.py checks that tensors are equal to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

from prefixfast.errors import DataError
from prefixfast.model import fingerprint
from prefixfast.model.fingerprint import layout_of, num_layers
from prefixfast.prefix.names import layers_of

if TYPE_CHECKING:
    from torch import Tensor

PeftType = Literal["PREFIX_TUNING", "CARTRIDGE"]
TYPES: tuple[PeftType, ...] = get_args(PeftType)
CONFIG, WEIGHTS, TABLE = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
NO_INFIX = "it stands before the last prompt token, and PEFT puts all rows before the first"
COMMON_CONFIG = {
    "auto_mapping": None,
    "inference_mode": True,
    "modules_to_save": None,
    "peft_version": "0.21.2",
    "revision": None,
}
# Keys of Prefix.training for an encoder-decoder adapter, which does not name the layers of its base model.
SUBMODULES, NUM_LAYERS = "peft_submodules", "peft_layers"


def peft_incompatibility(
    kv: Mapping[str, Tensor], pos_start: int, window: str, base: Mapping[str, Any] | None = None
) -> str | None:
    """Reason why PEFT cannot hold a prefix exactly, None if it can.

    Args:
        kv: Tensors ``self.{layer}.k`` and ``.v`` of shape ``[P, H, D]``.
        pos_start: Position of the first token after the prefix.
        window: Treatment of the prefix by sliding windows, ``"slide"`` or ``"always"``.
        base: Fingerprint of the base model, None if unknown.
    """
    layout = layout_of(base)
    if layout is not None and isinstance(layout["peft"], str):
        return layout["peft"]
    expected = rows_by_layer(kv, base)
    is_elsewhere = {pos_start} != {len(t) for t in kv.values()}
    wide = next((i for i in layers_of(kv) if layout is not None and i not in expected), None)
    reasons = {
        "it has sites other than 'self'": any(not name.startswith("self.") for name in kv),
        f"PEFT has no rows for layer {wide}, whose heads are larger than the adapter's": wide is not None,
        "PEFT has no rows for layer 0, whose heads are larger than the adapter's, and starts the text at position 0": (
            layout is not None and 0 not in expected
        ),
        "its layers differ in shape": not _has_shapes(kv, expected),
        "its tensors differ in dtype": len({t.dtype for t in kv.values()}) != 1,
        "its numbers are fp64": any(str(t.dtype) == "torch.float64" for t in kv.values()),
        "some layers have no prefix": set(kv) != {f"self.{i}.{x}" for i in expected for x in "kv"},
        "text starts at another position than the prefix's length": is_elsewhere,
        "sliding windows do not slide over it": window != "slide",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def is_seq2seq(base: Mapping[str, Any] | None, training: Mapping[str, Any]) -> bool:
    """Whether a prefix is one of an encoder-decoder model.

    Args:
        base: Fingerprint of the base model, None if unknown.
        training: Origin of the prefix, which names the layout of an imported adapter.
    """
    return fingerprint.is_seq2seq(base) or SUBMODULES in training


def rows_by_layer(kv: Mapping[str, Tensor], base: Mapping[str, Any] | None) -> dict[int, tuple[int, int]]:
    """Number of heads and head dim of each layer in which PEFT uses the rows of an adapter.

    PEFT leaves out layers that read the keys of another layer, and layers whose heads are larger than the adapter's.

    Args:
        kv: Tensors by name, which give the heads where the fingerprint does not.
        base: Fingerprint of the base model, None if unknown.
    """
    layout = layout_of(base)
    if layout is None:
        row = next(iter(kv.values())).shape[1:]
        return dict.fromkeys(range(num_layers(base) or len(kv) // 2), (row[0], row[1]))
    return {
        i: (heads, dim)
        for i, (heads, dim, _, source) in enumerate(layout["layers"])
        if source == i and heads <= int(layout["peft"][0]) and dim <= int(layout["peft"][1])
    }


def _has_shapes(kv: Mapping[str, Tensor], expected: Mapping[int, tuple[int, int]]) -> bool:
    """Whether all tensors have one length, and those of the expected layers the expected heads."""
    named = {f"self.{i}.{x}": row for i, row in expected.items() for x in "kv"}
    return len({len(t) for t in kv.values()}) == 1 and all(
        t.shape[1:] == named.get(n, t.shape[1:]) for n, t in kv.items()
    )


def cut(kv: Mapping[str, Tensor], base: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Rows that PEFT uses of an adapter's tensors, cut to the heads of each layer; all rows if the layers are alike.

    Args:
        kv: Tensors of all layers, as `read` gives them.
        base: Fingerprint of the base model, None if unknown.
    """
    if layout_of(base) is None:
        return dict(kv)
    expected = rows_by_layer(kv, base)
    return {
        f"self.{i}.{x}": kv[f"self.{i}.{x}"][:, :heads, :dim].contiguous()
        for i, (heads, dim) in expected.items()
        for x in "kv"
        if f"self.{i}.{x}" in kv
    }


def without_spare_layer(
    kv: Mapping[str, Tensor], base: Mapping[str, Any] | None, training: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Tensors of an adapter that was written here, without the pair that makes its number of layers odd.

    Args:
        kv: Tensors of all pairs, as `read` gives them.
        base: Fingerprint of the base model, None if unknown.
        training: Origin of the prefix, which has the number of layers of an imported adapter.
    """
    if not is_seq2seq(base, training):
        return dict(kv)
    count = num_layers(base) or training.get(NUM_LAYERS)
    return {name: t for name, t in kv.items() if count is None or int(name.split(".")[1]) < count}


def to_table(kv: Mapping[str, Tensor], base: Mapping[str, Any] | None = None, *, seq2seq: bool = False) -> Tensor:
    """Table ``[P, L * 2 * H * D]`` of the tensors ``self.{layer}.k`` and ``.v`` of shape ``[P, H, D]``.

    Numbers that PEFT does not use, of layers without rows or beyond the heads of a layer, are 0.

    Args:
        kv: Tensors by name.
        base: Fingerprint of the base model, None if unknown.
        seq2seq: Whether the base model is an encoder-decoder model.
    """
    first, (layers, heads, dim) = next(iter(kv.values())), _table_sizes(kv, base, seq2seq=seq2seq)
    table = first.new_zeros(len(first), layers, 2, heads, dim)
    for i in layers_of(kv):
        for j, t in enumerate((kv[f"self.{i}.k"], kv[f"self.{i}.v"])):
            table[:, (1 + seq2seq) * i % layers, j, : t.shape[1], : t.shape[2]] = t
    return table.flatten(1)


def _table_sizes(kv: Mapping[str, Tensor], base: Mapping[str, Any] | None, *, seq2seq: bool) -> tuple[int, int, int]:
    """Number of layers, of heads, and head dim of an adapter's table."""
    if seq2seq:
        count = len(kv) // 2
        _, heads, dim = next(iter(kv.values())).shape
        return count + 1 - count % 2, heads, dim
    if (layout := layout_of(base)) is not None:
        return len(layout["layers"]), int(layout["peft"][0]), int(layout["peft"][1])
    _, heads, dim = next(iter(kv.values())).shape
    return len(kv) // 2, heads, dim


def from_table(table: Tensor, num_layers: int, num_kv_heads: int, submodules: int = 1) -> dict[str, Tensor]:
    """Tensors of a table, the inverse of `to_table` but for the pair that makes the number of layers odd.

    Args:
        table: Table ``[P, L * 2 * H * D]``.
        num_layers: Number of layers L.
        num_kv_heads: Number of key-value heads H.
        submodules: ``num_transformer_submodules`` of the adapter. With 2, layer l has pair ``2 l mod L``.

    Raises:
        DataError: If the table's width is not a multiple of ``L * 2 * H``.
    """
    if table.ndim != 2 or not table.shape[1] or table.shape[1] % (num_layers * 2 * num_kv_heads):
        expected = f"[P, {num_layers} layers * 2 * {num_kv_heads} heads * head_dim]"
        msg = f"{TABLE}: expected {expected}, got {list(table.shape)}"
        raise DataError(msg)
    parts = table.unflatten(1, (num_layers, 2, num_kv_heads, -1))
    return {
        f"self.{i}.{x}": parts[:, submodules * i % num_layers, j].contiguous()
        for i in range(num_layers)
        for j, x in enumerate("kv")
    }


def adapter_files(
    kv: Mapping[str, Tensor],
    base: Mapping[str, Any] | None,
    peft_type: PeftType = "PREFIX_TUNING",
    num_frozen: int = 0,
    *,
    seq2seq: bool = False,
) -> dict[str, bytes]:
    """Files of an adapter folder by name.

    Args:
        kv: Tensors ``self.{layer}.k`` and ``.v`` of shape ``[P, H, D]``, for which `peft_incompatibility` is None.
        base: Fingerprint of the base model, None if unknown.
        peft_type: Type of the adapter.
        num_frozen: Number of frozen leading rows, stored as ``num_frozen_tokens`` of a CARTRIDGE.
        seq2seq: Whether the base model is an encoder-decoder model.
    """
    from safetensors.torch import save

    length, (layers, heads, dim) = len(next(iter(kv.values()))), _table_sizes(kv, base, seq2seq=seq2seq)
    of_type: dict[str, Any] = (
        {"num_frozen_tokens": num_frozen}
        if peft_type == "CARTRIDGE"
        else {"encoder_hidden_size": heads * dim, "init_weights": None, "prefix_projection": False}
    )
    config = {
        **COMMON_CONFIG,
        **of_type,
        "base_model_name_or_path": (base or {}).get("name") or None,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 1 + seq2seq,
        "num_virtual_tokens": length,
        "peft_type": peft_type,
        "task_type": "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM",
        "token_dim": heads * dim,
    }
    return {
        CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
        WEIGHTS: save({TABLE: to_table(kv, base, seq2seq=seq2seq)}, metadata={"format": "pt"}),
    }
