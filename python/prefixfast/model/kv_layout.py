"""`kv_layout`, the shapes of a base model's keys and values, and the rows that a PEFT adapter has for them.

PEFT puts a prefix into the cache of transformers. The cache of some models holds other tensors than their attention
reads, for example the latent vectors of multi-head latent attention. PEFT cannot run a prefix on these models.

Source:
    PEFT 0.21.2, ``get_prompt`` in ``peft_model.py`` and ``_prepare_prompt_learning_config`` in ``utils/other.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixfast.attention import ops
from prefixfast.attention.plan import AttentionCall, plain_plan
from prefixfast.model.dry_run import LayerShape
from prefixfast.model.fingerprint import KVLayout

# PEFT cuts the rows of an adapter to the heads of each layer where the model type contains one of these names.
CUT_BY_PEFT = ("gemma2", "gemma3_text", "gemma4")


def kv_layout(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> KVLayout | None:
    """Shapes of the keys and values of an attached model; None if all layers are alike and PEFT has the same rows.

    Args:
        model: Attached model.
        shapes: Heads of every layer.
    """
    peft = _peft_rows(model, shapes)
    if {(s.row, s.source) for s in shapes} == {((tuple(peft), tuple(peft)), None)}:
        return None
    layers = [
        [s.num_kv_heads, s.head_dim, s.value_dim, i if s.source is None else s.source] for i, s in enumerate(shapes)
    ]
    return {"layers": layers, "peft": peft}


def _peft_rows(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> list[int] | str:
    """Number of heads and head dim of the rows of a PEFT adapter, or the reason why PEFT cannot hold a prefix."""
    if any(s.head_dim != s.value_dim for s in shapes):
        return "the base's keys and values have different head dims"
    if reason := _cache_difference(model, shapes):
        return reason
    first = next(s for s in shapes if s.source is None)
    made = _rows_by_config(model.config, first)
    if any(name in model.config.model_type for name in CUT_BY_PEFT):
        return made
    if len({s.row for s in shapes}) != 1:
        return "the layers of the base have different heads, and an adapter has rows of one shape for all layers"
    if tuple(made) != first.row[0]:
        return f"PEFT makes rows of {made[0]} heads of {made[1]} for the base, whose layers have {first.row[0]}"
    return made


class _StopForwardError(Exception):
    """Ends a forward pass once every kind of layer has filled its cache."""


@torch.no_grad()
def _cache_difference(model: PreTrainedModel, shapes: Sequence[LayerShape]) -> str | None:
    """Reason why the cache that transformers fills is not the keys and values of the attention, None if it is.

    Layers of the same heads and the same class of cache fill it in the same way, so that the forward pass ends after
    the first layer of each kind.
    """
    ids = torch.ones(1, 1, dtype=torch.long, device=model.device)
    cache = DynamicCache(config=model.config)
    kinds = {
        i: (s.row, type(entry))
        for i, (s, entry) in enumerate(zip(shapes, cache.layers, strict=False))
        if s.source is None
    }
    cached: dict[int, Any] = {}

    def probe(call: AttentionCall) -> None:
        entry = cache.layers[call.layer] if call.layer < len(cache.layers) else None
        tensors = [getattr(entry, name, None) for name in ("keys", "values")]
        cached[call.layer] = tuple(
            (t.shape[1], t.shape[-1]) if isinstance(t, Tensor) and t.dim() == 4 else None for t in tensors
        )
        if {kinds.get(i) for i in cached} >= set(kinds.values()):
            raise _StopForwardError

    plan = plain_plan([1], backend=ops.Backend("reference"), device=model.device)
    plan = replace(plan, probe=probe)
    try:
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=plan.position_ids,
            past_key_values=cache,
            use_cache=True,
            prefixfast=plan,
        )
    except _StopForwardError:
        pass
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as e:
        return f"the base does not run with a cache of transformers: {e}"
    for i, got in cached.items():
        if shapes[i].source is None and got != shapes[i].row:
            tensors = f"(layer {i}: {got}, not {shapes[i].row})"
            return f"the cache of the base holds other tensors than its attention reads {tensors}"
    return None


def _rows_by_config(config: Any, own: LayerShape) -> list[int]:
    """Number of heads and head dim of an adapter's rows by PEFT's reading of a configuration.

    Args:
        config: Configuration of the base model.
        own: Heads of a layer, which PEFT takes from the adapter where the configuration does not say them.
    """
    fields = config.to_dict()
    fields = fields.get("text_config", fields)
    if "num_key_value_heads" not in fields:
        return [own.num_kv_heads, own.head_dim]
    heads, dim = fields["num_key_value_heads"], fields.get("head_dim") or own.head_dim
    if fields.get("global_head_dim") is not None:  # before transformers 5.15
        return [fields.get("num_global_key_value_heads") or heads, fields["global_head_dim"]]
    widest, rows = dim, heads
    for layer in (fields.get("per_layer_config") or {}).values():
        if layer.get("head_dim", dim) > widest:
            widest, rows = layer.get("head_dim", dim), layer.get("num_key_value_heads", heads)
    return [rows, widest]
