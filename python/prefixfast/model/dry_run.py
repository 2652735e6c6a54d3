"""Heads and sliding windows of all layers, from a forward in which each layer must reach prefixfast's attention."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention import ops
from prefixfast.attention.hf_interface import MissingPlanError
from prefixfast.attention.plan import AttentionCall, plain_plan
from prefixfast.errors import ConfigError
from prefixfast.model.packed_forward import packed_forward
from prefixfast.model.supported_models import unsupported_layers

# Errors of a model's own code for inputs that it does not take.
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError)
UNBOUNDED = 2**30  # reach of a plan in which any sliding window can hide keys


@dataclass(frozen=True)
class LayerShape:
    """Heads of one attention layer, and the layer whose keys and values it reads.

    Attributes:
        num_heads: Number of query heads HQ.
        num_kv_heads: Number of key-value heads H.
        head_dim: Head dim D of queries and keys.
        value_dim: Head dim of the values, which is another one in multi-head latent attention.
        source: Earlier layer whose keys and values this layer reads, None if the layer has its own.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    source: int | None = None

    @property
    def attention_dim(self) -> int:
        """Head dim of the attention operators, to which the shorter ones of keys and values are padded with zeros."""
        return max(self.head_dim, self.value_dim)

    @property
    def row(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes ``(H, D)`` of one row's keys and of its values."""
        return (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.value_dim)

    @property
    def row_numbers(self) -> int:
        """Number of stored numbers of one prefix row, 0 for a layer without keys of its own."""
        return self.num_kv_heads * (self.head_dim + self.value_dim) if self.source is None else 0


def _probe_ids(model: PreTrainedModel) -> Tensor:
    return torch.arange(1, 9, device=model.device) % model.config.get_text_config().vocab_size


@torch.no_grad()
def dry_run(model: PreTrainedModel) -> tuple[tuple[LayerShape, ...], tuple[int, ...]]:
    """Heads of all layers as the attention function gets them, and the sliding window of each, 0 for none."""
    ids, what = _probe_ids(model), f"{type(model).__name__} ({model.config.model_type})"
    seen: list[AttentionCall] = []
    plain = plain_plan([len(ids)], backend=ops.Backend("reference"), device=model.device)
    plan = replace(plain, probe=seen.append, reach=UNBOUNDED)
    try:
        packed_forward(model, plan, ids)
    except MissingPlanError as e:
        msg = f"cannot attach {what}: its layers do not pass keyword arguments on to attention, which needs the plan"
        raise ConfigError(msg) from e
    except FAILURES as e:
        msg = f"cannot attach {what}: a packed forward fails: {type(e).__name__}: {e}{unsupported_layers(model)}"
        raise ConfigError(msg) from e
    expected = model.config.get_text_config().num_hidden_layers
    reached = sorted(call.layer for call in seen)
    if reached != list(range(expected)):
        msg = (
            f"cannot attach {what}: expected each of its {expected} layers to call prefixfast's attention once, got "
            f"calls from the layers {reached}{unsupported_layers(model)}"
        )
        raise ConfigError(msg)
    seen.sort(key=lambda call: call.layer)
    return _layer_shapes(seen), tuple(call.window for call in seen)


def _layer_shapes(calls: list[AttentionCall]) -> tuple[LayerShape, ...]:
    """Heads of every layer. A layer that gets the very tensors of an earlier one reads the keys of that layer.

    The calls hold their tensors, so that no two tensors had the same address one after the other.
    """
    owner: dict[tuple[object, ...], int] = {}
    shapes = []
    for call in calls:
        tensors = tuple((t.data_ptr(), t.shape, t.stride()) for t in (call.k, call.v))
        first = owner.setdefault(tensors, call.layer)
        sizes = (call.q.shape[1], call.k.shape[1], call.q.shape[2], call.v.shape[2])
        shapes.append(LayerShape(*sizes, source=None if first == call.layer else first))
    return tuple(shapes)
