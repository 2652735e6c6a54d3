"""Backward of one rectangular attention on a CPU in bf16: time and error of the torch backend and its alternatives.

The torch backend calls the flash operator in fp32. The error is the largest relative error of dq, dk and dv against
fp64. The heads are those of GPT-2 124M. Run ``python benches/kernels/attn_backward.py OUT.jsonl``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prefixfast.bench.harness import alternate, write_rows
from prefixfast_kernels.inputs import AttnOptions, OutputGrad
from prefixfast_kernels.testing.tolerance import relative_error
from prefixfast_kernels.torch_sdpa_lse import Qkv, sdpa_lse_bwd, sdpa_lse_fwd

HEADS, DIM = 12, 64
OPTIONS = AttnOptions(DIM**-0.5)
# Sequences, queries, keys and causality by name. The last five are the queries of a batch on one prefix.
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
    """The flash operator on bf16 inputs."""
    do, q, k, v, o, lse = tensors
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, causal, scale=OPTIONS.scale
    )


def torch_backend(causal: bool, *tensors: Tensor) -> Grads:
    """The torch backend: the flash operator in fp32."""
    do, q, k, v, o, lse = tensors
    return sdpa_lse_bwd(OutputGrad(do, o, lse), Qkv(q, k, v), None, OPTIONS, causal=causal)


def products(causal: bool, *tensors: Tensor, scores: torch.dtype = torch.bfloat16) -> Grads:
    """Matrix products with scores and dP in the dtype ``scores``, the rest in bf16."""
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
    "flash in fp32": torch_backend,
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
    o, lse = sdpa_lse_fwd(Qkv(q, k, v), None, OPTIONS, causal=causal)
    wide = Qkv(q.double(), k.double(), v.double())
    exact = torch_backend(causal, do.double(), *wide, *sdpa_lse_fwd(wide, None, OPTIONS, causal=causal))
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
            best = min(r["seconds"]) * 1e3  # type: ignore[call-overload]
            print(f"{name}, {r['contender']}: {best:.2f} ms, error {r['error']:.1e}", flush=True)
    write_rows(args.out, rows)


if __name__ == "__main__":
    main()
