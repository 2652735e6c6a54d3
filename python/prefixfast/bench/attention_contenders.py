"""Ways to compute packed attention with shared prefixes: prefixfast's, and torch's on copied prefixes.

Every contender computes the same: B sequences of T tokens, each over the P rows of its prefix and its own causal
keys. The gradient of a prefix is the sum over the sequences that share it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefixfast.attention import ops
from prefixfast.bench.attention_inputs import Inputs, Shape
from prefixfast.bench.merged_attention import merged

Contender = Callable[[Inputs], Tensor]


def ours(x: Inputs) -> Tensor:
    """prefixfast, which reads each prefix in place."""
    q, k, v, pk, pv = x.leaves
    how = (x.shape.heads[2] ** -0.5, 0, 0.0, True, True, x.backend.name, list(x.backend.sizes))
    return ops.attn(q, k, v, pk, pv, list(x.tables), None, None, *how)[0]


def masked(x: Inputs) -> Tensor:
    """Attention as transformers computes it with a prefix in its cache: copies, an explicit mask, repeated kv heads."""
    q, k, v = x.batched()
    group, p, t = q.shape[1] // k.shape[1], x.shape.prefix, x.shape.tokens
    k, v = (y.repeat_interleave(group, 1) for y in (k, v))
    mask = torch.ones(t, p + t, dtype=torch.bool, device=q.device).tril(p).expand(q.shape[0], 1, t, p + t)
    return x.packed(F.scaled_dot_product_attention(q, k, v, mask))


def sdpa(x: Inputs, kernel: str) -> Tensor:
    """One of torch's fused kernels on copied prefixes. torch gives cuDNN's kernel its mask as a tensor."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = x.batched()
    if kernel == "EFFICIENT_ATTENTION":  # the kernel supports no grouped heads
        k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v))
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        mask = causal_lower_right(q.shape[2], k.shape[2])
        return x.packed(F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1]))


def varlen(x: Inputs) -> Tensor:
    """Torch's variable-length flash operator on copied prefixes, the strongest contender with copies."""
    q, k, v = (y.transpose(1, 2).flatten(0, 1) for y in x.batched())
    t, s = x.shape.tokens, x.shape.tokens + x.shape.prefix
    cu = [torch.arange(x.shape.sequences + 1, device=q.device, dtype=torch.int32) * n for n in (t, s)]
    return torch.ops.aten._flash_attention_forward(
        q, k, v, *cu, t, s, 0.0, True, False, scale=x.shape.heads[2] ** -0.5
    )[0]


@functools.lru_cache(maxsize=32)
def _flex_mask(shape: Shape, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    t, p, n = shape.tokens, shape.distinct * shape.prefix, shape.sequences * shape.tokens

    def seen(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        in_prefix = (k < p) & (k // shape.prefix == (q // t) % shape.distinct)
        own = k - p
        return in_prefix | ((own >= 0) & (own // t == q // t) & (own <= q))

    return create_block_mask(seen, None, None, n, p + n, device=device)


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(x: Inputs) -> Tensor:
    """Compiled FlexAttention over keys [all prefixes; all tokens]. The block mask is made once and not timed."""
    q, k, v, pk, pv = x.leaves
    keys, values = (torch.cat([a, b]).transpose(0, 1)[None] for a, b in ((pk, k), (pv, v)))
    out = _compiled_flex()(
        q.transpose(0, 1)[None],
        keys,
        values,
        block_mask=_flex_mask(x.shape, q.device),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


TRANSFORMERS = "copied prefix, mask (transformers)"
CONTENDERS: dict[str, Contender] = {
    "prefixfast": ours,
    TRANSFORMERS: masked,
    "copied prefix, flash": functools.partial(sdpa, kernel="FLASH_ATTENTION"),
    "copied prefix, efficient": functools.partial(sdpa, kernel="EFFICIENT_ATTENTION"),
    "copied prefix, cudnn": functools.partial(sdpa, kernel="CUDNN_ATTENTION"),
    "copied prefix, varlen flash": varlen,
    "two flash calls, merged": merged,
    "FlexAttention": flex,
}
ON_CPU = ("prefixfast", TRANSFORMERS)
