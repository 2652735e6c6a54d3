"""`packed_forward`: logits of packed sequences from an attached model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention.hf_interface import NAME
from prefixfast.attention.plan import Plan
from prefixfast.errors import ConfigError, shown


def packed_forward(model: PreTrainedModel, plan: Plan, ids: Tensor) -> Tensor:
    """Logits of one packed forward pass of an attached model.

    Args:
        model: Attached model.
        plan: Attention plan of the tokens.
        ids: Token ids, int64 ``[N]``, or embeddings of the tokens, ``[N, E]``.

    Returns:
        Logits ``[n, V]`` at the tokens ``plan.logits_at``, or ``[N, V]`` of all tokens if that is None.

    Raises:
        ConfigError: If the model is detached or in training mode.
        RuntimeError: If the model ignores which logits are wanted.
    """
    check_attached(model)
    inputs = model_inputs(plan, ids)
    count, given = len(ids), inputs["attention_mask"].shape[1]
    if plan.logits_at is not None:
        inputs["logits_to_keep"] = at = two_rows(plan.logits_at, 0)
        count, given = len(plan.logits_at), len(at)
    logits: Tensor = model(**inputs).logits[0]
    if len(logits) != given:
        msg = f"{type(model).__name__} computes logits of {len(logits)} tokens, expected those of {given}"
        raise RuntimeError(msg)
    return logits[:count]


def model_inputs(plan: Plan, ids: Tensor) -> dict[str, Any]:
    """Keyword arguments of an attached model for one packed forward pass.

    On a CPU without gradients a single token is given twice, because a matrix product of one row rounds differently
    from products of more rows. Attention computes the first of the two.

    Args:
        plan: Attention plan of the tokens.
        ids: Token ids, int64 ``[N]``, or embeddings of the tokens, ``[N, E]``.
    """
    tokens = two_rows(ids[None], 1)
    # Without a mask, GPT-2 searches the batch for padding, which is a host synchronization. The mask is not used.
    return {
        "inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens,
        "attention_mask": torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device),
        "position_ids": two_rows(plan.position_ids, 1),
        "use_cache": False,
        "prefixfast": plan,
    }


def two_rows(t: Tensor, dim: int) -> Tensor:
    """The tensor with a single row along ``dim`` repeated, on a CPU without gradients; else unchanged."""
    if t.shape[dim] != 1 or t.device.type != "cpu" or torch.is_grad_enabled():
        return t
    return t.expand(*t.shape[:dim], 2, *t.shape[dim + 1 :])


def check_attached(model: PreTrainedModel) -> None:
    """Raise `ConfigError` if a model is detached or in training mode.

    The attention of a detached model would ignore the plan without an error.
    """
    if model.config._attn_implementation != NAME or model.training:
        state = (
            "in training mode, call eval()"
            if model.training
            else "detached, or its attention was switched; load it again"
        )
        msg = f"this {type(model).__name__} cannot run a packed forward: it is {state}"
        raise ConfigError(msg)


def check_eval(model: PreTrainedModel) -> None:
    """Raise `ConfigError` if a module is in training mode, in which dropout would change the results."""
    if (name := next((name for name, m in model.named_modules() if m.training), None)) is not None:
        msg = (
            f"this {type(model).__name__} cannot run: its module {shown(name)} is in training mode; call eval() on the "
            "model"
        )
        raise ConfigError(msg)
