"""Proof at load that every layer of a model reaches prefixfast's attention and that its logits stay the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention import ops
from prefixfast.attention.hf_interface import NAME
from prefixfast.attention.plan import AttentionCall, plain_plan
from prefixfast.errors import ConfigError
from prefixfast.model.attention_switch import configs_of
from prefixfast.model.packed_forward import packed_forward

logger = logging.getLogger(__name__)


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
    def row_numbers(self) -> int:
        """Number of stored numbers of one row, 0 for a layer without keys of its own."""
        return self.num_kv_heads * (self.head_dim + self.value_dim) if self.source is None else 0


def _probe_ids(model: PreTrainedModel) -> Tensor:
    return torch.arange(1, 9, device=model.device) % model.config.get_text_config().vocab_size


@torch.no_grad()
def own_logits(model: PreTrainedModel, implementations: Sequence[str | None]) -> Tensor:
    """Logits ``[N, V]`` of the probe tokens in a plain forward of the model.

    Args:
        model: Attached model.
        implementations: Attention implementation of each of its configs before it was attached.
    """
    configs = configs_of(model)
    for config, name in zip(configs, implementations, strict=True):
        config._attn_implementation_internal = name
    logits: Tensor = model(input_ids=_probe_ids(model)[None], use_cache=False).logits[0]
    for config in configs:
        config._attn_implementation_internal = NAME
    return logits


@torch.no_grad()
def dry_run(model: PreTrainedModel) -> tuple[tuple[LayerShape, ...], Tensor]:
    """Head counts of all layers as the attention function gets them, and the logits of a short text."""
    ids = _probe_ids(model)
    seen: list[AttentionCall] = []
    plain = plain_plan([len(ids)], backend=ops.Backend("reference"), device=model.device)
    plan = replace(plain, probe=seen.append)
    try:
        logits = packed_forward(model, plan, ids)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as e:
        msg = f"cannot attach {type(model).__name__} ({model.config.model_type}): a packed forward fails: {e}"
        raise ConfigError(msg) from e
    expected = model.config.get_text_config().num_hidden_layers
    reached = sorted(call.layer for call in seen)
    if reached != list(range(expected)):
        msg = (
            f"cannot attach {type(model).__name__}: expected each of its {expected} layers to call prefixfast's "
            f"attention once, got calls from the layers {reached}"
        )
        raise ConfigError(msg)
    return _layer_shapes(seen), logits


def _layer_shapes(calls: list[AttentionCall]) -> tuple[LayerShape, ...]:
    """Heads of every layer. A layer that gets the very tensors of an earlier one reads the keys of that layer.

    The calls hold their tensors, so that no two tensors had the same address one after the other.
    """
    owner: dict[tuple[object, ...], int] = {}
    shapes = []
    for call in sorted(calls, key=lambda call: call.layer):
        tensors = tuple((t.data_ptr(), t.shape, t.stride()) for t in (call.k, call.v))
        first = owner.setdefault(tensors, call.layer)
        sizes = (call.q.shape[1], call.k.shape[1], call.q.shape[2], call.v.shape[2])
        shapes.append(LayerShape(*sizes, source=None if first == call.layer else first))
    return tuple(shapes)


def check_same_logits(model: PreTrainedModel, before: Tensor, after: Tensor) -> None:
    """Raise `ConfigError` if logits before and after attaching differ by more than rounding."""
    error = (before.float() - after.float()).abs().max().item() / before.float().abs().max().item()
    limit = 1e-3 if model.dtype in (torch.float32, torch.float64) else 3e-2
    if not error < limit:
        name = f"{type(model).__name__} ({model.config.model_type})"
        msg = f"cannot attach {name}: its logits change by {error:.1e} (limit {limit:.0e}) under prefixfast's attention"
        raise ConfigError(msg)
    logger.info(
        "%s is not in the tested set; its logits are unchanged under prefixfast's attention (relative error %.1e)",
        model.config.model_type,
        error,
    )
