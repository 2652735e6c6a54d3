"""Proof at load that every layer of a model reaches prefixfast's attention and that its logits stay the same."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention import ops
from prefixfast.attention.plan import AttentionCall, plain_plan
from prefixfast.errors import ConfigError
from prefixfast.model.packed_forward import packed_forward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerShape:
    """Head counts of one attention layer.

    Attributes:
        num_heads: Number of query heads HQ.
        num_kv_heads: Number of key-value heads H.
        head_dim: Head dim D.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int


def _probe_ids(model: PreTrainedModel) -> Tensor:
    return torch.arange(1, 9, device=model.device) % model.config.get_text_config().vocab_size


@torch.no_grad()
def own_logits(model: PreTrainedModel) -> Tensor:
    """Logits ``[N, V]`` of the probe tokens in a plain forward of the model."""
    return model(input_ids=_probe_ids(model)[None], use_cache=False).logits[0]


@torch.no_grad()
def dry_run(model: PreTrainedModel) -> tuple[tuple[LayerShape, ...], Tensor]:
    """Head counts of all layers as the attention function gets them, and the logits of a short text."""
    ids = _probe_ids(model)
    seen: list[tuple[int, int, int, int]] = []

    def probe(call: AttentionCall) -> None:
        seen.append((call.layer, call.q.shape[1], call.k.shape[1], call.q.shape[2]))

    plan = replace(plain_plan([len(ids)], backend=ops.Backend("reference"), device=model.device), probe=probe)
    try:
        logits = packed_forward(model, plan, ids)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as e:
        msg = f"cannot attach {type(model).__name__} ({model.config.model_type}): a packed forward fails: {e}"
        raise ConfigError(msg) from e
    expected = model.config.get_text_config().num_hidden_layers
    reached = sorted(layer for layer, *_ in seen)
    if reached != list(range(expected)):
        msg = (
            f"cannot attach {type(model).__name__}: expected each of its {expected} layers to call prefixfast's "
            f"attention once, got calls from the layers {reached}"
        )
        raise ConfigError(msg)
    return tuple(LayerShape(*shape) for _, *shape in sorted(seen)), logits


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
