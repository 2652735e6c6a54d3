"""Suite ``kernels``: packed attention with shared prefixes, forward and backward, against torch's on copied prefixes.

On a GPU the kernels are first compared with the reference, and nothing is timed if they are wrong.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from prefixfast.bench.attention_contenders import CONTENDERS, ON_CPU, TRANSFORMERS, Contender
from prefixfast.bench.attention_inputs import Inputs, Shape
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
from prefixfast.bench.kernels_report import BACKWARD_FACTOR, Point, plot, table
from prefixfast.bench.roofline import roofline, seconds_of, synchronized
from prefixfast.io.environment import cpu_name
from prefixfast_kernels.testing.packed_cases import CASES, OUTPUT_NAMES, output_errors, run_triton
from prefixfast_kernels.testing.tolerance import FLOOR, relative_error, within_tolerance
from prefixfast_kernels.tile_selection import tile_sizes

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


def check_kernels(device: torch.device, dtypes: tuple[torch.dtype, ...], names: tuple[str, ...] = tuple(CASES)) -> None:
    """Compare the Triton kernels with the reference on ``device``.

    Args:
        device: Device of the kernels.
        dtypes: Dtypes to compare in.
        names: Names of the cases, keys of `packed_cases.CASES`.

    Raises:
        WrongResultError: If a case is wrong. The message names the case and its errors.
    """
    for dtype in dtypes:
        for name in names:
            case = CASES[name]
            hq, h, d = case.heads
            sizes = tile_sizes(device, dtype, ((hq // h, d),))._replace(depth=case.depth)
            got, same_dtype = output_errors(case, dtype, sizes, run_triton, device=str(device))
            if not within_tolerance(got, same_dtype, FLOOR[dtype]):
                found = ", ".join(f"{n} {e:.1e}" for n, e in zip(OUTPUT_NAMES, got, strict=True))
                msg = f"{name}, {dtype}: the kernels are wrong, nothing is timed: {found}"
                raise WrongResultError(msg)


def measure(shape: Shape, dtype: torch.dtype, device: torch.device, *, rounds: int) -> list[Point]:
    """Times of all contenders on one shape, which alternate.

    A contender that differs from transformers' attention, or cannot run, becomes a point with a reason in place of a
    time.

    Raises:
        WrongResultError: If prefixfast differs from transformers' attention.
    """
    torch._dynamo.reset()  # FlexAttention specializes on every shape and would run into the recompile limit
    x = Inputs.make(shape, dtype, device)
    rate, bandwidth = roofline(device, dtype)
    usable, points = _usable_contenders(x, dtype, device)
    floor = max(shape.flops / rate, shape.bytes(dtype.itemsize) / bandwidth)
    works: tuple[tuple[str, Callable[[Contender, Inputs], object], float], ...] = (
        ("forward", _forward, 1.0),
        ("forward and backward", _forward_and_backward, BACKWARD_FACTOR),
    )
    for work, once, factor in works:
        calls = {name: _call(once, c, x) for name, c in usable.items()}
        repeats = max(1, int(0.02 / max(min(seconds_of(calls["prefixfast"], device, 3)), 1e-6)))
        timings = alternate({n: synchronized(c, device, repeats) for n, c in calls.items()}, rounds)
        for name, t in timings.items():
            timing = Timing(tuple(s / repeats for s in t.seconds))
            points.append(Point(shape, name, work, timing, factor * floor / timing.best))
    return points


def _usable_contenders(x: Inputs, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Contender], list[Point]]:
    """Contenders whose results agree with transformers' attention, and points of the others with the reason."""
    names = CONTENDERS if device.type == "cuda" else {n: CONTENDERS[n] for n in ON_CPU}
    expected = _outputs(CONTENDERS[TRANSFORMERS], x)
    usable: dict[str, Contender] = {}
    points = []
    for name, contender in names.items():
        try:
            error = max(relative_error(a, b) for a, b in zip(_outputs(contender, x), expected, strict=True))
        except Exception as e:  # Triton's OutOfResources is a plain Exception
            if name == "prefixfast":
                raise
            points.append(Point(x.shape, name, "forward", None, 0.0, str(e).splitlines()[0][:200]))
            continue
        if error < LIMIT[dtype]:
            usable[name] = contender
        elif name == "prefixfast":
            msg = f"{x.shape.name}: prefixfast differs from {TRANSFORMERS} by {error:.1e}; nothing is timed"
            raise WrongResultError(msg)
        else:
            points.append(Point(x.shape, name, "forward", None, 0.0, f"differs by {error:.1e}"))
    return usable, points


def _call(once: Callable[[Contender, Inputs], object], contender: Contender, x: Inputs) -> Callable[[], object]:
    return lambda: once(contender, x)


@torch.no_grad()
def _forward(contender: Contender, x: Inputs) -> Tensor:
    return contender(x)


def _forward_and_backward(contender: Contender, x: Inputs) -> tuple[Tensor, ...]:
    return torch.autograd.grad(contender(x), x.leaves, x.do)


def _outputs(contender: Contender, x: Inputs) -> list[Tensor]:
    """Output and gradients of the leaves."""
    o = contender(x)
    return [o.detach(), *torch.autograd.grad(o, x.leaves, x.do)]


def run(output: Path, *, dtype: str, rounds: int, device: str = "auto") -> list[Point]:
    """Check, measure, print the table, write ``results.jsonl`` and ``kernels.png``.

    Args:
        output: Folder to write to.
        dtype: Key of `harness.DTYPES`, or ``auto``.
        rounds: Number of repetitions.
        device: Device, or ``auto``.

    Raises:
        WrongResultError: If the kernels or prefixfast's attention are wrong.
    """
    where, chosen = device_and_dtype(device, dtype)
    announce(chosen, where)
    start = time.perf_counter()
    if where.type == "cuda":
        check_kernels(where, (chosen,))
        print(f"correct on {len(CASES)} cases in {chosen}, {time.perf_counter() - start:.0f} s")
    shapes = GPU_SHAPES if where.type == "cuda" else CPU_SHAPES
    points = [p for shape in progress(shapes, "bench", "shapes") for p in measure(shape, chosen, where, rounds=rounds)]
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else cpu_name()
    head = {"suite": "kernels", "dtype": str(chosen), "device": str(where)}
    write_rows(output / "results.jsonl", [head, *(p.row() for p in points)])
    print(table(points))
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        plot(points, output / "kernels.png", f"{chosen}, {name}")
    print(output / "results.jsonl", output / "kernels.png" if drawn else "(no plot without matplotlib)")
    return points
