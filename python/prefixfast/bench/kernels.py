"""Packed attention with shared prefixes, forward and backward: correctness on this machine first, then time against torch's ways with copied prefixes."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from prefixfast.bench.baselines import CONTENDERS, ON_CPU, TRANSFORMERS, Contender, Inputs, Shape
from prefixfast.bench.harness import DTYPES, LIMIT, Timing, alternate, cpu_name, write_rows
from prefixfast_kernels import tile_configs as tiles
from prefixfast_kernels.testing.packed_cases import CASES, FLOOR, NAMES, errors, triton, within
from prefixfast_kernels.testing.tables import relative_error

GPU_SHAPES = (
    Shape("8B heads, 64 x 256, P=128", 64, 256, 128, 1, (32, 8, 128)),
    Shape("8B heads, 64 x 256, P=128, 32 distinct", 64, 256, 128, 32, (32, 8, 128)),
    Shape("8B heads, 16 x 1024, P=512", 16, 1024, 512, 1, (32, 8, 128)),
    Shape("8B heads, 8 x 2048, P=2048", 8, 2048, 2048, 1, (32, 8, 128)),
    Shape("1B heads, 64 x 256, P=128", 64, 256, 128, 1, (32, 8, 64)),
    Shape("GPT-2 medium, 64 x 256, P=10", 64, 256, 10, 1, (16, 16, 64)),
    Shape("GPT-2 medium, 64 x 256, P=128", 64, 256, 128, 1, (16, 16, 64)),
)
CPU_SHAPES = (
    Shape("GPT-2, 10 x 64, P=10", 10, 64, 10, 1, (12, 12, 64)),
    Shape("GPT-2, 10 x 64, P=200", 10, 64, 200, 1, (12, 12, 64)),
    Shape("SmolLM2, 32 x 64, P=200", 32, 64, 200, 1, (9, 3, 64)),
    Shape("SmolLM2, 32 x 64, P=200, 8 distinct", 32, 64, 200, 8, (9, 3, 64)),
)


@dataclass(frozen=True)
class Point:
    """One contender on one shape; ``seconds`` None where it cannot run, with the reason."""

    shape: Shape
    contender: str
    work: str
    timing: Timing | None
    share: float
    reason: str = ""

    def row(self) -> dict[str, Any]:
        """For the results file."""
        common = {"shape": vars(self.shape), "contender": self.contender, "work": self.work}
        if self.timing is None:
            return {**common, "not_run": self.reason}
        flops = self.shape.flops * (1.0 if self.work == "forward" else 3.5)
        rate = {"tflops": round(flops / self.timing.best / 1e12, 3), "share_of_roofline": round(self.share, 3)}
        return {**common, "seconds": [round(s, 7) for s in self.timing.seconds], **rate}


def check(device: torch.device, dtypes: tuple[torch.dtype, ...], names: tuple[str, ...] = tuple(CASES)) -> None:
    """Hold the Triton kernels to the specification on ``device``.

    Raises:
        RuntimeError: Names the case and the errors; nothing is timed then.
    """
    for dtype in dtypes:
        for name in names:
            case = CASES[name]
            hq, h, d = case.heads
            sizes = tiles.sizes(device, dtype, ((hq // h, d),))._replace(depth=case.depth)
            got, same = errors(case, dtype, sizes, triton, device=str(device))
            if not within(got, same, FLOOR[dtype]):
                msg = f"{name}, {dtype}: the kernels are wrong, nothing is timed: " + ", ".join(
                    f"{n} {e:.1e}" for n, e in zip(NAMES, got, strict=True)
                )
                raise RuntimeError(msg)


def roofline(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """What this machine does now: FLOP/s of a large matrix product, bytes/s of a copy."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    big = torch.ones(
        (1 << 30 if device.type == "cuda" else 1 << 26) // dtype.itemsize, dtype=dtype, device=device
    )  # pages never written are one page
    other = torch.empty_like(big)
    product, copy = (_seconds(call, device, 5) for call in (lambda: torch.mm(a, b), lambda: other.copy_(big)))
    return 2 * n**3 / min(product), 2 * big.numel() * dtype.itemsize / min(copy)


def _synchronized(call: Callable[[], object], device: torch.device, repeats: int) -> Callable[[], None]:
    def timed() -> None:
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return timed


def _seconds(call: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    timed = _synchronized(call, device, 1)
    timed()
    return list(alternate({"it": timed}, rounds)["it"].seconds)


def measure(shape: Shape, dtype: torch.dtype, device: torch.device, *, rounds: int) -> list[Point]:
    """All contenders on one shape, alternating; each first gives what transformers' way gives, or is not timed.

    Raises:
        RuntimeError: If it is prefixfast that differs.
    """
    torch._dynamo.reset()  # one specialization of FlexAttention a shape would run into the recompile limit
    x = Inputs.make(shape, dtype, device)
    rate, bandwidth = roofline(device, dtype)
    names = CONTENDERS if device.type == "cuda" else {n: CONTENDERS[n] for n in ON_CPU}
    expected = _outputs(CONTENDERS[TRANSFORMERS], x)
    usable: dict[str, Contender] = {}
    points = []
    for name, contender in names.items():
        try:
            error = max(relative_error(a, b) for a, b in zip(_outputs(contender, x), expected, strict=True))
        except (
            Exception
        ) as e:  # whatever a contender of torch raises (Triton's OutOfResources is a plain Exception), it is not run
            if name == "prefixfast":
                raise
            points.append(Point(shape, name, "forward", None, 0.0, str(e).splitlines()[0][:200]))
            continue
        if error < LIMIT[dtype]:
            usable[name] = contender
        elif name == "prefixfast":
            msg = f"{shape.name}: prefixfast differs from {TRANSFORMERS} by {error:.1e}; nothing is timed"
            raise RuntimeError(msg)
        else:
            points.append(Point(shape, name, "forward", None, 0.0, f"differs by {error:.1e}"))
    floor = max(shape.flops / rate, shape.bytes(dtype.itemsize) / bandwidth)
    for work, once, factor in (("forward", _forward, 1.0), ("forward and backward", _step, 3.5)):
        calls = {name: _call(once, c, x) for name, c in usable.items()}
        repeats = max(1, int(0.02 / max(min(_seconds(calls["prefixfast"], device, 3)), 1e-6)))
        timings = alternate({n: _synchronized(c, device, repeats) for n, c in calls.items()}, rounds)
        for name, t in timings.items():
            timing = Timing(tuple(s / repeats for s in t.seconds))
            points.append(Point(shape, name, work, timing, factor * floor / timing.best))
    return points


def _call(once: Callable[[Contender, Inputs], object], contender: Contender, x: Inputs) -> Callable[[], object]:
    return lambda: once(contender, x)


@torch.no_grad()
def _forward(contender: Contender, x: Inputs) -> Tensor:
    return contender(x)


def _step(contender: Contender, x: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(contender(x), x.leaves, x.do)


def _outputs(contender: Contender, x: Inputs) -> list[Tensor]:
    o = contender(x)
    return [o.detach(), *torch.autograd.grad(o, x.leaves, x.do)]


def table(points: list[Point]) -> str:
    """Markdown: milliseconds (best), their spread, and the ratio to prefixfast."""
    lines = [
        "| shape | work | contender | ms | median / best | times prefixfast | share of roofline |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    base = {(p.shape, p.work): p.timing.best for p in points if p.contender == "prefixfast" and p.timing}
    for p in points:
        if p.timing is None:
            lines.append(f"| {p.shape.name} | | {p.contender} | not run: {p.reason} | | | |")
        else:
            spread, ratio = p.timing.median / p.timing.best, p.timing.best / base[p.shape, p.work]
            lines.append(
                f"| {p.shape.name} | {p.work} | {p.contender} | {p.timing.best * 1e3:.3f} | {spread:.2f} | {ratio:.2f} | {100 * p.share:.0f} % |"
            )
    return "\n".join(lines)


def plot(points: list[Point], path: Path, title: str) -> None:
    """Time of every contender relative to prefixfast, one group of bars a shape."""
    from matplotlib.figure import Figure

    works = list(dict.fromkeys(p.work for p in points if p.timing))
    figure = Figure(figsize=(9, 3.6 * len(works)), layout="constrained")
    for axes, work in zip(figure.subplots(len(works), squeeze=False)[:, 0], works, strict=True):
        own = [p for p in points if p.timing and p.work == work]
        shapes = list(dict.fromkeys(p.shape for p in own))
        names = list(dict.fromkeys(p.contender for p in own))
        for i, name in enumerate(names):
            found = {p.shape: p.timing.best for p in own if p.contender == name and p.timing}
            base = {p.shape: p.timing.best for p in own if p.contender == "prefixfast" and p.timing}
            heights = [found[s] / base[s] if s in found else 0.0 for s in shapes]
            axes.bar([j + 0.8 * i / len(names) for j in range(len(shapes))], heights, 0.8 / len(names), label=name)
        axes.set(ylabel="time, prefixfast = 1", title=f"{work}\n{title}")
        axes.set_xticks(
            [j + 0.4 for j in range(len(shapes))], [s.name.replace(", ", "\n", 1) for s in shapes], fontsize="x-small"
        )
        axes.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def run(out: Path, *, dtype: str, rounds: int, device: str = "auto") -> list[Point]:
    """Check, measure, print the table, write ``results.jsonl`` and ``kernels.png``."""
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    chosen = DTYPES[dtype if dtype != "auto" else "bfloat16" if where.type == "cuda" else "float32"]
    start = time.perf_counter()
    if where.type == "cuda":
        check(where, (chosen,))
        print(f"correct on {len(CASES)} cases in {chosen}, {time.perf_counter() - start:.0f} s")
    shapes = GPU_SHAPES if where.type == "cuda" else CPU_SHAPES
    points = [
        p for shape in tqdm(shapes, desc="bench", unit="shape") for p in measure(shape, chosen, where, rounds=rounds)
    ]
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else cpu_name()
    write_rows(
        out / "results.jsonl",
        [{"suite": "kernels", "dtype": str(chosen), "device": str(where)}, *(p.row() for p in points)],
    )
    print(table(points))
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        plot(points, out / "kernels.png", f"{chosen}, {name}")
    print(out / "results.jsonl", out / "kernels.png" if drawn else "(no plot without matplotlib)")
    return points
