"""The one function that transformers calls in every attention module of an attached model.

It is registered as attention implementation "prefixfast" and takes the plan from the forward's keyword ``prefixfast``. No mask function is registered,
so transformers builds no mask at all; called without a plan it raises, since a padding mask would have been dropped in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from prefixfast.attention import ops
from prefixfast.attention.plan import AttentionCall, Plan

NAME = "prefixfast"
# Keywords that models pass and that do not change the result here. Anything else that is set is refused: it might.
HARMLESS = frozenset(
    {
        "cache_position",
        "is_causal",
        "output_attentions",
        "position_ids",
        "use_cache",
        "output_hidden_states",
        "return_dict",
        "num_items_in_batch",
    }
)


def prefixfast_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefixfast: Plan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of one module over its layer's prefix blocks and its own keys.

    Args:
        module: The attention module; its ``layer_idx`` names the layer.
        query: ``[1, HQ, N, D]``, rotated already.
        key: ``[1, H, N, D]``, as ``query``.
        value: As ``key``.
        attention_mask: None (see the module text).
        scaling: Multiplies scores; ``D ** -0.5`` if None.
        dropout: Must be 0: the frozen base runs in eval mode.
        prefixfast: The plan.
        sliding_window: In tokens.
        softcap: Score cap.
        other: Refused unless known to be harmless.

    Returns:
        ``[1, N, HQ, D]`` and None in place of attention weights.

    Raises:
        RuntimeError: Without a plan, or with something that this function does not compute.
    """
    if prefixfast is None:
        msg = "this model is attached to prefixfast: call it through prefixfast (train, generate, Model.forward), or detach it first"
        raise RuntimeError(msg)
    if surprising := {k for k, v in other.items() if v is not None and v is not False and k not in HARMLESS}:
        msg = f"{type(module).__name__} passes {', '.join(sorted(surprising))} to attention, which prefixfast does not compute"
        raise RuntimeError(msg)
    if dropout:
        msg = "attention dropout is on: prefixfast runs the frozen base in eval mode; call model.eval()"
        raise RuntimeError(msg)
    plan, layer = prefixfast, int(module.layer_idx)  # type: ignore[arg-type]
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [N, heads, D], views
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    window, cap = plan.window(sliding_window), softcap or 0.0
    arena = None if plan.arena is None else plan.arena.layers[layer]
    if arena is not None:
        assert plan.slots is not None
        ops.kv_write(*arena, k, v, plan.slots)
    if plan.decode is not None:
        assert plan.arena is not None
        assert arena is not None
        use, step = plan.backend, list(plan.decode[plan.view(layer)])
        o, _ = ops.attn_decode(
            q,
            *arena,
            None,
            None,
            plan.arena.table,
            step,
            None,
            plan.max_len,
            scale,
            window,
            cap,
            use.name,
            use.decode.users,
        )
    else:
        assert plan.packed is not None
        prefix_k, prefix_v = arena or (None, None)
        if plan.prefix is not None and len(plan.prefix[layer][0]):
            prefix_k, prefix_v = plan.prefix[layer]
        use, tables = plan.backend, list(plan.packed[plan.view(layer)])
        if plan.key_slots is not None and arena is not None:
            k, v = arena
        o, lse = ops.attn(
            q,
            k,
            v,
            prefix_k,
            prefix_v,
            tables,
            plan.key_slots,
            None,
            scale,
            window,
            cap,
            True,
            True,
            use.name,
            list(use.sizes),
        )
        if plan.probe is not None:
            plan.probe(AttentionCall(layer, q, k, lse, scale, window, cap))
    return o[None], None


AttentionInterface.register(NAME, prefixfast_attention)
