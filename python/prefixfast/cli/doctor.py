"""`prefixfast doctor [MODEL]`: what this machine and this installation can do, and what prefixes for a base cost."""

from __future__ import annotations

import importlib.util
import platform
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixfast.cli.output import in_bytes, show_one

if TYPE_CHECKING:
    from prefixfast.model.base import Model

PACKAGES = ("prefixfast", "torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "peft")
LENGTH, HEAD_DIM = 10, 64  # a usual prefix; the usual head of a base that is not given


def command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="hub id or folder of a base, to be loaded and attached")
    ] = None,
    dtype: Annotated[str, typer.Option(help="compute dtype of the base")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Versions, processor, devices, backends and why not faster ones; with MODEL, whether it can be used and what its prefixes cost."""
    problem = rust_problem()
    values = machine(problem)
    if model is not None and problem is None:
        from prefixfast.model.load import load

        try:
            with load(model, dtype=dtype) as base:
                values |= backends(base) | of_model(base)
        except Exception:
            show_one(
                values, as_json=as_json, title="prefixfast doctor"
            )  # what was found out helps with the error that follows
            raise
    show_one(values, as_json=as_json, title="prefixfast doctor")
    if problem is not None:
        raise typer.Exit(1)


def rust_problem() -> str | None:
    """Why the Rust extension does not load; None if it does."""
    try:
        import prefixfast._rust  # noqa: F401
    except ImportError as e:
        return f"does not load: {e}; build it (`make`) or install a wheel"
    return None


def machine(problem: str | None) -> dict[str, Any]:
    """The installation and the machine."""
    import torch

    from prefixfast.bench.harness import environment, version
    from prefixfast.model.memory import free_memory

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    told = environment()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        **{package: version(package) or "not installed" for package in PACKAGES},
        "rust extension": problem or "loads",
        "cpu": told["cpu"],
        "instructions": told["cpu_flags"] or [torch.backends.cpu.get_cpu_capability()],
        "cores": told["cores"],
        "threads": told["threads"],
        "free memory": in_bytes(free_memory(torch.device("cpu"))),
        "gpu": gpus or f"none: {_no_gpu()}",
        **(backends() if problem is None else {}),
    }


def backends(base: Model | None = None) -> dict[str, Any]:
    """Which way each operator goes, and why no faster one; without a base for this machine's usual device and dtype."""
    import torch
    from torch import nn

    from prefixfast.attention import ops
    from prefixfast.model.load import has_fast_bf16
    from prefixfast.model.prepack import prepack

    if base is not None:
        device, dtype, dim, chosen = base.device, base.dtype, base.layers[0].head_dim, base.backend
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype, dim = (torch.bfloat16 if device.type == "cuda" or has_fast_bf16() else torch.float32), HEAD_DIM
        chosen = ops.choose_backend("auto", device, dtype, ((1, dim),))
    fast = has_fast_bf16()
    packing = prepack(nn.Linear(64, 64).to(device, dtype)).why_not
    return {
        "triton": _triton(),
        "fast bf16 on the cpu": "yes" if fast else "no: neither AVX512-BF16 nor AMX, so dtype auto is float32 there",
        "for": f"{device.type}, {str(dtype).removeprefix('torch.')}",
        **{f"op {op}": way for op, way in ops.explain(chosen, device, dtype, dim).items()},
        "weights": "packed for this CPU (oneDNN)" if packing is None else f"as they are: {packing}",
    }


def of_model(base: Model) -> dict[str, Any]:
    """The base, and what a prefix for it costs."""
    from prefixfast.model.attach import VERIFIED

    kind = base.hf.config.model_type
    start = time.perf_counter()
    found = base.fingerprint
    seconds = time.perf_counter() - start
    numbers = sum(2 * LENGTH * s.num_kv_heads * s.head_dim for s in base.layers)
    heads = sorted({f"{s.num_heads} query and {s.num_kv_heads} kv heads of {s.head_dim}" for s in base.layers})
    return {
        "base": found["name"],
        "family": f"{kind}: "
        + (
            "parity with PEFT is held by the tests"
            if kind in VERIFIED
            else "not in the tested set; its logits are unchanged here"
        ),
        "parameters": base.hf.num_parameters(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "layers": len(base.layers),
        "heads": heads,
        "positions": base.max_positions,
        "vocabulary": base.vocab_size,
        "tokenizer": "none: token ids only" if base.tokenizer is None else "yes",
        "fingerprint": found["weights"],
        "fingerprint, ms": round(1e3 * seconds, 1),
        f"prefix of {LENGTH}, numbers": numbers,
        f"prefix of {LENGTH}, bytes as trained (fp32)": 4 * numbers,
        f"prefix of {LENGTH}, bytes in an engine": base.dtype.itemsize * numbers,
    }


def _no_gpu() -> str:
    import torch

    return "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no device"


def _triton() -> str:
    import torch

    from prefixfast.bench.harness import version

    if importlib.util.find_spec("triton") is None:
        return "not installed: the torch backend serves every call"
    return str(version("triton")) + (
        "" if torch.cuda.is_available() else ": needs a GPU, the torch backend serves every call"
    )
