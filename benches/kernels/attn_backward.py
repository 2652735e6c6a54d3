"""Backward of one piece of attention on a CPU in bf16: the flash operator in fp32 (what the torch backend does) against its alternatives, time and error.

Run ``python benches/kernels/attn_backward.py OUT.jsonl`` (GPT-2 124M's heads). The error: the largest of dq, dk, dv against fp64, of the largest entry.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prefixfast.bench.harness import alternate, write_rows
from prefixfast_kernels.testing.tables import relative_error
from prefixfast_kernels.torch_sdpa_lse import Options, piece_bwd, piece_fwd

HEADS, DIM = 12, 64
OPTIONS = Options(DIM**-0.5, 0, 0.0)
# name: sequences, queries, keys, causal; the last five are a batch's queries on one prefix
PIECES = {
    "10 x 64 own keys": (10, 64, 64, True),
    "4 x 256 own keys": (4, 256, 256, True),
    "640 queries, P=10": (1, 640, 10, False),
    "640 queries, P=64": (1, 640, 64, False),
    "640 queries, P=128": (1, 640, 128, False),
    "640 queries, P=200": (1, 640, 200, False),
    "640 queries, P=512": (1, 640, 512, False),
}
Grads = tuple[Tensor, ...]


def flash(causal: bool, *tensors: Tensor) -> Grads:
    """The operator on its inputs as they are."""
    do, q, k, v, o, lse = tensors
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, causal, scale=OPTIONS.scale
    )


def ours(causal: bool, *tensors: Tensor) -> Grads:
    """What ships."""
    do, q, k, v, o, lse = tensors
    return piece_bwd(do, q, k, v, o, lse, None, OPTIONS, causal=causal)


def products(causal: bool, *tensors: Tensor, scores: torch.dtype = torch.bfloat16) -> Grads:
    """Recomputed by matrix products; scores and dP in ``scores``, the rest in bf16."""
    do, q, k, v, o, lse = tensors
    s = torch.matmul(q.to(scores), k.to(scores).transpose(-1, -2)).float().mul_(OPTIONS.scale)
    if causal:
        s.masked_fill_(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    p = s.sub_(lse[..., None]).exp_()
    dp = torch.matmul(do.to(scores), v.to(scores).transpose(-1, -2)).float()
    delta = (do.float() * o.float()).sum(-1, keepdim=True)
    ds, p = dp.sub_(delta).mul_(p).mul_(OPTIONS.scale).to(q.dtype), p.to(q.dtype)
    return torch.matmul(ds, k), torch.matmul(ds.transpose(-1, -2), q), torch.matmul(p.transpose(-1, -2), do)


CONTENDERS: dict[str, Callable[..., Grads]] = {
    "flash in fp32": ours,
    "flash in bf16": flash,
    "products in bf16": products,
    "products in bf16, scores in fp32": lambda *args: products(*args, scores=torch.float32),
}


def measure(name: str, rounds: int) -> list[dict[str, object]]:
    """Time and error of all contenders on one piece."""
    batch, queries, keys, causal = PIECES[name]
    g = torch.Generator().manual_seed(0)
    q, do = (torch.randn(batch, queries, HEADS, DIM, generator=g).bfloat16().transpose(1, 2) for _ in "qd")
    k, v = (torch.randn(batch, keys, HEADS, DIM, generator=g).bfloat16().transpose(1, 2) for _ in "kv")
    o, lse = piece_fwd(q, k, v, None, OPTIONS, causal=causal)
    wide = [t.double() for t in (q, k, v)]
    exact = ours(causal, do.double(), *wide, *piece_fwd(*wide, None, OPTIONS, causal=causal))
    runs = {n: (lambda call=call: call(causal, do, q, k, v, o, lse)) for n, call in CONTENDERS.items()}
    wrong = {n: max(relative_error(a, b) for a, b in zip(run(), exact, strict=True)) for n, run in runs.items()}
    timed = alternate(runs, rounds)
    return [
        {"piece": name, "contender": n, "error": float(f"{wrong[n]:.2g}"), "seconds": [round(s, 6) for s in t.seconds]}
        for n, t in timed.items()
    ]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rows: list[dict[str, object]] = [{"suite": "attn_backward", "dtype": "bfloat16", "heads": HEADS, "head_dim": DIM}]
    for name in PIECES:
        rows += (made := measure(name, args.rounds))
        for r in made:
            print(f"{name}, {r['contender']}: {min(r['seconds']) * 1e3:.2f} ms, error {r['error']:.1e}", flush=True)  # type: ignore[call-overload]
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
