"""`packed_forward`: logits of packed sequences from an attached model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention.hf_interface import NAME
from prefixfast.attention.plan import Plan
from prefixfast.errors import ConfigError


def packed_forward(model: PreTrainedModel, plan: Plan, ids: Tensor) -> Tensor:
    """Logits of one packed forward pass of an attached model.

    Args:
        model: Attached model.
        plan: Attention plan of the tokens.
        ids: Token ids, int64 ``[N]``.

    Returns:
        Logits ``[n, V]`` at the tokens ``plan.logits_at``, or ``[N, V]`` of all tokens if that is None.

    Raises:
        ConfigError: If the model is detached or in training mode.
    """
    check_attached(model)
    tokens = ids[None]
    keep = {} if plan.logits_at is None else {"logits_to_keep": plan.logits_at}
    # Without a mask, GPT-2 searches the batch for padding, which is a host synchronization. The mask is not used.
    out = model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        position_ids=plan.position_ids,
        use_cache=False,
        prefixfast=plan,
        **keep,
    )
    return out.logits[0]


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
