"""Triton kernel of `cross_entropy`: the loss of each row of logits, then the gradient of the logits in place."""

from __future__ import annotations

import triton
import triton.language as tl

from prefixfast_kernels.tile_ops import LN2, LOG2E


# fmt: off
@triton.jit
def capped_logits(x, softcap, SOFTCAP: tl.constexpr):
    """Logits after the cap, and the derivative of the cap at each logit."""
    slope = 1.0
    if SOFTCAP:
        t = 1 - 2 / (tl.exp2(x * (2 * LOG2E / softcap)) + 1)
        x = t * softcap
        slope = 1 - t * t
    return x, slope


@triton.jit
def softmax_grad(
    LOGITS, TARGETS, LOSSES, vocab, softcap, stride, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, GRAD: tl.constexpr
):
    """Loss of one row. With GRAD the row of LOGITS (fp32) is replaced by the gradient of the loss by the logits."""
    row = tl.program_id(0).to(tl.int64)
    base = LOGITS + row * stride
    target = tl.load(TARGETS + row)
    # The target's logit is read before the row is overwritten. The reductions below are barriers.
    picked, _slope = capped_logits(tl.load(base + target), softcap, SOFTCAP)
    n = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    for j in range(0, vocab, BLOCK):  # a running maximum and sum in each lane, merged once after the loop
        x, slope = capped_logits(tl.load(base + j + n, mask=j + n < vocab, other=-float("inf")), softcap, SOFTCAP)
        x = tl.where(j + n < vocab, x * LOG2E, -float("inf"))
        new = tl.maximum(m, x)
        shift = tl.where(new == -float("inf"), 0.0, new)
        l = l * tl.exp2(m - shift) + tl.exp2(x - shift)
        m = new
    most = tl.max(m, 0)
    lse2 = most + tl.log2(tl.sum(l * tl.exp2(m - most), 0))
    tl.store(LOSSES + row, lse2 * LN2 - picked)
    if GRAD:
        for j in range(0, vocab, BLOCK):
            x, slope = capped_logits(tl.load(base + j + n, mask=j + n < vocab, other=0.0), softcap, SOFTCAP)
            p = tl.exp2(x * LOG2E - lse2) - tl.where(j + n == target, 1.0, 0.0)
            tl.store(base + j + n, p * slope, mask=j + n < vocab)
# fmt: on
