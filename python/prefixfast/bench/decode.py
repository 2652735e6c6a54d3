"""Decode attention of one layer: prefixfast by groups, row by row and as its cost model chooses, against torch's attention on gathered or copied prefixes.

Every contender computes the same step. Shape letters: R rows, S own keys, P prefix rows, n distinct prefixes, HQ query heads, H kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from prefixfast.attention import ops
from prefixfast.bench.harness import DTYPES, LIMIT, Timing, alternate, write_rows
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.testing.decode_cases import MODES, with_work
from prefixfast_kernels.testing.tables import Request, decode_tables, relative_error


@dataclass(frozen=True)
class Shape:
    """One step: ``rows`` with ``keys`` own keys each, ``distinct`` prefixes of ``prefix`` rows, neighbours share one, (HQ, H, D)."""

    name: str
    rows: int
    prefix: int
    keys: int
    distinct: int
    heads: tuple[int, int, int]

    def bytes(self, width: int) -> int:
        """Every key and value read once, q read and o written."""
        hq, h, d = self.heads
        return width * d * (2 * self.rows * hq + 2 * h * (self.rows * self.keys + self.distinct * self.prefix))


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


@dataclass(frozen=True)
class Inputs:
    """One step on a device; prefixes lie in the arena, all slots of all rows in random order behind them.

    Attributes:
        q: ``[R, HQ, D]``.
        k: Arena ``[rows, H, D]``; so is ``v``.
        table: ``[R, S]`` int32.
        rows: ``[R, P + S]``: all arena rows that a row sees.
        tables: By mode of `decode_cases.MODES`.
        users: What their work was cut into.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    table: Tensor
    rows: Tensor
    tables: dict[str, DecodeTables]
    users: int

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Random numbers."""
        hq, h, d = shape.heads
        g = torch.Generator().manual_seed(0)
        first = shape.distinct * shape.prefix
        count = first + shape.rows * shape.keys
        q, k, v = (
            torch.randn(s, generator=g).to(device, dtype) for s in ((shape.rows, hq, d), (count, h, d), (count, h, d))
        )
        table = (
            first + torch.randperm(shape.rows * shape.keys // 16, generator=g)[:, None] * 16 + torch.arange(16)
        ).view(shape.rows, shape.keys)
        which = torch.arange(shape.rows) * shape.distinct // shape.rows
        blocks = [(i * shape.prefix, shape.prefix) for i in range(shape.distinct)]
        plain = decode_tables([shape.keys] * shape.rows, [Request(0, ((b, True),)) for b in which.tolist()], blocks)
        cut = ops.choose_backend("auto", device, dtype, ((hq // h, d),), h).decode
        modes = {m: with_work(plain, cut._replace(**change)) if cut.users else plain for m, change in MODES.items()}
        rows = torch.cat([which[:, None] * shape.prefix + torch.arange(shape.prefix), table], 1)
        tables = {m: DecodeTables(*(x.to(device) for x in t)) for m, t in modes.items()}
        return cls(q, k, v, table.int().to(device), rows.to(device), tables, cut.users)

    def ours(self, backend: str, mode: str) -> Tensor:
        """`ops.attn_decode`."""
        given = (self.q, self.k, self.v, None, None, self.table, list(self.tables[mode]), None, self.table.shape[1])
        return ops.attn_decode(*given, self.q.shape[2] ** -0.5, 0, 0.0, backend, self.users)[0]

    def copied(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every row, prefixes included: ``[R, H, P + S, D]``."""
        flat = self.rows.flatten()
        return tuple(a.index_select(0, flat).unflatten(0, self.rows.shape).transpose(1, 2) for a in (self.k, self.v))

    def sdpa(self, k: Tensor, v: Tensor) -> Tensor:
        """Torch's attention on copies; the G queries of a kv head are its rows, so that no head is expanded."""
        hq, h = self.q.shape[1], k.shape[1]
        return F.scaled_dot_product_attention(self.q.unflatten(1, (h, hq // h)), k, v).flatten(1, 2)


def contenders(x: Inputs, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """By name; the first is what the engine runs, the last is the way of transformers without its copies."""
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


def replayed(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], object], str]:
    """The call as a CUDA graph, where it is one; how it runs."""
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
    except RuntimeError:  # it reads from the device
        torch.cuda.synchronize()
        return call, "called"
    return graph.replay, "graph"


def measure(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, rounds: int, bandwidth: float
) -> list[dict[str, Any]]:
    """Rows of the results file for one shape.

    Raises:
        RuntimeError: If a contender's result differs; nothing is timed then.
    """
    x = Inputs.make(shape, dtype, device)
    calls = contenders(x, device)
    expected = calls["SDPA on copies"]()
    for name, call in calls.items():
        if not (error := relative_error(call(), expected)) < LIMIT[dtype]:
            msg = f"{shape.name}: {name} differs from SDPA on copies by {error:.1e}; nothing is timed"
            raise RuntimeError(msg)
    runs = {name: replayed(call, device) for name, call in calls.items()}
    repeats = 50 if device.type == "cuda" else 1

    def timed(run: Callable[[], object]) -> Callable[[], None]:
        def loop() -> None:
            for _ in range(repeats):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return loop

    loops = {name: timed(run) for name, (run, _) in runs.items()}
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
    """Markdown: microseconds (best), the ratio to prefixfast, the share of the bandwidth that reading everything once needs."""
    lines = ["| shape | contender | us | times prefixfast | share of bandwidth |", "| --- | --- | ---: | ---: | ---: |"]
    base = {r["shape"]["name"]: min(r["seconds"]) for r in rows if r["contender"] == "prefixfast"}
    for r in rows:
        best, name = min(r["seconds"]), r["shape"]["name"]
        shown = f"{r['contender']} ({r['how']})"
        lines.append(
            f"| {name} | {shown} | {best * 1e6:.1f} | {best / base[name]:.2f} | {100 * r['share_of_bandwidth']:.0f} % |"
        )
    return "\n".join(lines)


def run(out: Path, *, dtype: str, rounds: int, device: str = "auto") -> list[dict[str, Any]]:
    """Check, measure, print the table, write ``decode.jsonl``."""
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    chosen = DTYPES[dtype if dtype != "auto" else "bfloat16" if where.type == "cuda" else "float32"]
    from prefixfast.bench.kernels import roofline

    _, bandwidth = roofline(where, chosen)
    shapes = GPU_SHAPES if where.type == "cuda" else CPU_SHAPES
    rows = [
        r
        for shape in tqdm(shapes, desc="bench", unit="shape")
        for r in measure(shape, chosen, where, rounds=rounds, bandwidth=bandwidth)
    ]
    write_rows(out / "decode.jsonl", [{"suite": "decode", "dtype": str(chosen), "device": str(where)}, *rows])
    print(table(rows))
    print(out / "decode.jsonl")
    return rows
