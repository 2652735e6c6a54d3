"""The attention function that transformers calls in every attention module of an attached model.

It is registered as the attention implementation "prefixfast" and takes the plan from the forward's keyword
``prefixfast``. No mask function is registered, so transformers builds no mask. A call without a plan raises, because a
padding mask would have been dropped silently.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from prefixfast.attention import ops
from prefixfast.attention.plan import AttentionCall, Plan
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan
from prefixfast.config.sites import Site

NAME = "prefixfast"
TAG = "_prefixfast_site"  # attribute of each attention module of an attached encoder-decoder base, a `SiteTag`
# Keywords that models pass and that do not change the result here. Any other keyword that is set is refused, because it
# might change the result.
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
        "output_router_logits",
    }
)


class SiteTag(NamedTuple):
    """Place of an attention module in an encoder-decoder base.

    Attributes:
        site: Kind of attention.
        layer: Index of the layer in its stack.
        bias: Position bias ``[HQ, 2 * maxd + 1]`` by clamped (key position - query position), fp32, or None.
    """

    site: Site
    layer: int
    bias: Tensor | None


class MissingPlanError(RuntimeError):
    """Attention was called without a plan."""


def prefixfast_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefixfast: Plan | Seq2SeqPlan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Attention of one module over its layer's prefix blocks and its own keys.

    Args:
        module: Attention module. Its `SiteTag` names the kind of attention and the layer, or else its ``layer_idx`` the
            layer of a decoder-only base.
        query: Queries ``[1, HQ, N, D]``, after RoPE.
        key: Keys ``[1, H, M, D]``, after RoPE. M is N but for cross-attention, whose decode steps read the arena and no
            given key.
        value: Values ``[1, H, M, Dv]``. Where Dv and D differ, the shorter ones are padded with zeros, which changes
            neither scores nor outputs.
        attention_mask: Mask, which must be None. transformers builds none for this implementation, so that a mask comes
            from code of the model.
        scaling: Factor on the scores, ``D ** -0.5`` if None.
        dropout: Attention dropout, which must be 0: the frozen base runs in eval mode.
        prefixfast: Plan of the forward.
        sliding_window: Sliding window in tokens, None for none.
        softcap: Cap of the scores, None for none.
        other: Other keywords of the model, refused unless they are known not to change the result.

    Returns:
        Output ``[1, N, HQ, Dv]``, and None in place of attention weights.

    Raises:
        MissingPlanError: If there is no plan.
        RuntimeError: If a keyword asks for something that this function does not compute.
    """
    if prefixfast is None:
        msg = (
            "this model is attached to prefixfast: call it through prefixfast (train, generate, Model.forward), or "
            "close it first, and every other loaded model that shares its config or layers"
        )
        raise MissingPlanError(msg)
    tag: SiteTag | None = module.__dict__.get(TAG)
    site: Site = "self"
    if tag is None and isinstance(prefixfast, Plan):
        plan, layer, bias = prefixfast, int(module.layer_idx), None  # type: ignore[arg-type]
        is_causal = other.get("is_causal")
        if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:
            msg = f"{type(module).__name__}.is_causal is False, and prefixfast computes causal attention only"
            raise RuntimeError(msg)
    else:
        plan, site, layer, bias = _tagged(module, tag, prefixfast, other)
    _check_call(module, attention_mask, dropout, other)
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)  # [tokens, heads, D], views
    given, count = len(q), plan.position_ids.shape[1]
    if given != count:  # the model was given a single token twice
        q = q[:count]
    if plan.num_keys is not None or given != count:  # or a single encoder token
        num_keys = count if plan.num_keys is None else plan.num_keys
        k, v = k[:num_keys], v[:num_keys]
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    options = (scale, plan.window(sliding_window), softcap or 0.0)
    qkv = pad_heads((q, k, v))
    if plan.slots is not None and plan.arena is not None and layer not in plan.arena.readers:
        ops.kv_write(*plan.arena.layers[layer], *qkv[1:], plan.slots)
    if plan.decode is not None:
        out = _decode_attention(plan, layer, qkv[0], options, bias)
    else:
        out, lse = _packed_attention(plan, layer, qkv, options, bias)
        if plan.probe is not None:
            plan.probe(AttentionCall(layer, q, k, v, lse, *options, site, bias))
    if out.shape[-1] != v.shape[-1]:
        out = out[..., : v.shape[-1]]
    return (out if given == count else out.expand(given, -1, -1))[None], None


def _check_call(module: torch.nn.Module, attention_mask: Tensor | None, dropout: float, other: dict[str, Any]) -> None:
    """Raise `RuntimeError` for a keyword, a mask or a dropout that the attention function does not compute."""
    if unknown := {k for k, v in other.items() if v is not None and v is not False and k not in HARMLESS}:
        names = ", ".join(sorted(unknown))
        msg = f"{type(module).__name__} passes {names} to attention, which prefixfast does not compute"
        raise RuntimeError(msg)
    if attention_mask is not None:
        msg = f"{type(module).__name__} passes a mask of its own to attention, which prefixfast does not apply"
        raise RuntimeError(msg)
    if dropout:
        msg = "attention dropout is on: prefixfast runs the frozen base in eval mode; call model.eval()"
        raise RuntimeError(msg)


def _tagged(
    module: torch.nn.Module, tag: SiteTag | None, plan: Plan | Seq2SeqPlan, other: dict[str, Any]
) -> tuple[Plan, Site, int, Tensor | None]:
    """Plan, site, layer and bias of a module of an encoder-decoder base. The keywords that they settle leave ``other``.

    Raises:
        RuntimeError: If either the module or the plan is that of a decoder-only base.
    """
    if tag is None or isinstance(plan, Plan):
        kinds = ("a decoder-only", "an encoder-decoder")
        base, made = kinds if tag is None else kinds[::-1]
        msg = f"{type(module).__name__} belongs to {base} base, and the plan of this forward was made for {made} base"
        raise RuntimeError(msg)
    # The bias of T5 is in the tag. Its modules hand on a marker of fewer dims in its place.
    position_bias = other.get("position_bias")
    if position_bias is not None and position_bias.dim() < 4:
        del other["position_bias"]
    return plan.at(tag.site), *tag


def pad_heads(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tensors ``[..., dim]`` padded with zeros to their largest last dim; unchanged if they have one."""
    dims = [t.shape[-1] for t in tensors]
    dim = max(dims)
    if dim == min(dims):
        return tensors
    return tuple(t if t.shape[-1] == dim else F.pad(t, (0, dim - t.shape[-1])) for t in tensors)


def _decode_attention(
    plan: Plan, layer: int, q: Tensor, options: tuple[float, int, float], bias: Tensor | None
) -> Tensor:
    """Output ``[R, HQ, D]`` of a decode step; ``options`` are scale, window and soft cap."""
    assert plan.arena is not None
    assert plan.decode is not None
    tables, arena = list(plan.decode[plan.view(layer)]), plan.arena
    o, _ = ops.attn_decode(
        q,
        *arena.layers[layer],
        None,
        None,
        arena.table,
        tables,
        bias,
        plan.max_len,
        *options,
        plan.backend.name,
        plan.backend.decode.users,
    )
    return o


def _packed_attention(
    plan: Plan, layer: int, qkv: tuple[Tensor, ...], options: tuple[float, int, float], bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output ``[N, HQ, D]`` and log-sum-exp of a packed forward; ``options`` are scale, window and soft cap."""
    assert plan.packed is not None
    q, k, v = qkv
    arena = None if plan.arena is None else plan.arena.layers[layer]
    prefix_k, prefix_v = arena or (None, None)
    if plan.prefix is not None and len(plan.prefix[layer][0]):
        prefix_k, prefix_v, _ = pad_heads((*plan.prefix[layer], q))
    if plan.key_slots is not None and arena is not None:
        k, v = arena
    out: tuple[Tensor, Tensor] = ops.attn(
        q,
        k,
        v,
        prefix_k,
        prefix_v,
        list(plan.packed[plan.view(layer)]),
        plan.key_slots,
        bias,
        *options,
        plan.causal,
        plan.square,
        plan.backend.name,
        list(plan.backend.sizes),
    )
    return out


AttentionInterface.register(NAME, prefixfast_attention)
