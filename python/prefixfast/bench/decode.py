"""Suite ``decode``: decode attention of one layer with shared prefixes, against torch's attention.

prefixfast runs by groups, row by row, and as its cost model chooses. Torch's attention runs on gathered and on copied
prefixes. Every contender computes the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefixfast.bench.decode_inputs import Inputs, Shape
from prefixfast.bench.harness import (
    LIMIT,
    Timing,
    WrongResultError,
    alternate,
    announce,
    device_and_dtype,
    progress,
    write_rows,
)
from prefixfast.bench.roofline import roofline, synchronized
from prefixfast_kernels.testing.tolerance import relative_error

EIGHT, HALF, MEDIUM = (32, 8, 128), (14, 2, 64), (16, 16, 64)
GPU_SHAPES = (
    Shape("8B heads, 64 rows, P=32, S=128, 16 distinct", 64, 32, 128, 16, EIGHT),
    Shape("8B heads, 16 rows, P=128, S=256, 1 distinct", 16, 128, 256, 1, EIGHT),
    Shape("8B heads, 256 rows, P=128, S=256, 32 distinct", 256, 128, 256, 32, EIGHT),
    Shape("8B heads, 256 rows, P=128, S=64, 8 distinct", 256, 128, 64, 8, EIGHT),
    Shape("8B heads, 256 rows, P=512, S=64, 8 distinct", 256, 512, 64, 8, EIGHT),
    Shape("8B heads, 256 rows, P=2048, S=256, 8 distinct", 256, 2048, 256, 8, EIGHT),
    Shape("8B heads, 256 rows, P=128, S=256, 256 distinct", 256, 128, 256, 256, EIGHT),
    Shape("8B heads, 1 row, P=512, S=2048, 1 distinct", 1, 512, 2048, 1, EIGHT),
    Shape("0.5B heads, 256 rows, P=128, S=256, 32 distinct", 256, 128, 256, 32, HALF),
    Shape("GPT-2 medium, 256 rows, P=512, S=64, 8 distinct", 256, 512, 64, 8, MEDIUM),
)
CPU_SHAPES = (Shape("GPT-2, 32 rows, P=128, S=128, 4 distinct", 32, 128, 128, 4, (12, 12, 64)),)


def contenders(x: Inputs, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Contenders by name.

    The first one is what the engine runs. The last one is transformers' attention without the time of its copies.
    """
    k, v = (t.contiguous() for t in x.copied())
    modes = (
        {f"prefixfast, {mode}": lambda mode=mode: x.ours("triton", mode) for mode in ("grouped", "inline")}
        if device.type == "cuda"
        else {}
    )
    torch_ways = {
        "torch backend": lambda: x.ours("torch", "chosen"),
        "gather, SDPA": lambda: x.sdpa(*x.copied()),
        "SDPA on copies": lambda: x.sdpa(k, v),
    }
    return {"prefixfast": lambda: x.ours("auto", "chosen"), **modes, **torch_ways}


def as_graph(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], str]:
    """The call captured as a CUDA graph and ``graph``, or, where it cannot be captured, the call and ``called``."""
    if device.type != "cuda":
        return call, "called"
    try:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # a call that reads from the device cannot be captured
        torch.cuda.synchronize()
        return call, "called"
    return graph.replay, "graph"


def measure(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, rounds: int, bandwidth: float
) -> list[dict[str, Any]]:
    """Records of the results file for one shape.

    Args:
        shape: The workload.
        dtype: Dtype of keys, values and queries.
        device: Device to measure on.
        rounds: Number of repetitions.
        bandwidth: Bytes a second that the machine copies.

    Raises:
        WrongResultError: If the results of two contenders differ.
    """
    x = Inputs.make(shape, dtype, device)
    calls = contenders(x, device)
    expected = calls["SDPA on copies"]()
    for name, call in calls.items():
        if not (error := relative_error(call(), expected)) < LIMIT[dtype]:
            msg = f"{shape.name}: {name} differs from SDPA on copies by {error:.1e}; nothing is timed"
            raise WrongResultError(msg)
    runs = {name: as_graph(call, device) for name, call in calls.items()}
    repeats = 50 if device.type == "cuda" else 1
    loops = {name: synchronized(run, device, repeats) for name, (run, _) in runs.items()}
    for loop in loops.values():
        loop()
    floor = shape.bytes(dtype.itemsize) / bandwidth
    found = {name: Timing(tuple(s / repeats for s in t.seconds)) for name, t in alternate(loops, rounds).items()}
    common = {"shape": vars(shape), "work": "decode"}
    return [
        {
            **common,
            "contender": n,
            "how": runs[n][1],
            "seconds": [round(s, 8) for s in t.seconds],
            "share_of_bandwidth": round(floor / t.best, 3),
        }
        for n, t in found.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of microseconds in the fastest round, the ratio to prefixfast, and the share of the bandwidth.

    The share compares reading every key and value once at the machine's bandwidth with the measured time.
    """
    lines = ["| shape | contender | us | times prefixfast | share of bandwidth |", "| --- | --- | ---: | ---: | ---: |"]
    base = {r["shape"]["name"]: min(r["seconds"]) for r in rows if r["contender"] == "prefixfast"}
    for r in rows:
        best, name = min(r["seconds"]), r["shape"]["name"]
        shown = f"{r['contender']} ({r['how']})"
        lines.append(
            f"| {name} | {shown} | {best * 1e6:.1f} | {best / base[name]:.2f} | {100 * r['share_of_bandwidth']:.0f} % |"
        )
    return "\n".join(lines)


def run(output: Path, *, dtype: str, rounds: int, device: str = "auto") -> list[dict[str, Any]]:
    """Check, measure, print the table, write ``decode.jsonl``.

    Args:
        output: Folder to write to.
        dtype: Key of `harness.DTYPES`, or ``auto``.
        rounds: Number of repetitions.
        device: Device, or ``auto``.

    Raises:
        WrongResultError: If the results of two contenders differ.
    """
    where, chosen = device_and_dtype(device, dtype)
    announce(chosen, where)
    _, bandwidth = roofline(where, chosen)
    rows: list[dict[str, Any]] = []
    for shape in progress(GPU_SHAPES if where.type == "cuda" else CPU_SHAPES, "bench", "shapes"):
        rows += measure(shape, chosen, where, rounds=rounds, bandwidth=bandwidth)
    write_rows(output / "decode.jsonl", [{"suite": "decode", "dtype": str(chosen), "device": str(where)}, *rows])
    print(table(rows))
    print(output / "decode.jsonl")
    return rows
