"""Command ``prefixfast doctor [MODEL]``, which reports on the machine, the installation and a base model."""

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
LENGTH = 10  # rows of the prefix whose size is reported
HEAD_DIM = 64  # head dim for the choice of a backend without a base
EXAMPLE = "prefixfast doctor gpt2"


def command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="Hub id or folder of a base to load.", show_default="no base"),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Compute dtype of the base: auto, float32, bfloat16, float16 or float64."),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, processor, devices and backends; with MODEL also the properties of a base and its prefixes' size.

    For each operator the report names the backend and the reason why a faster one is unavailable.
    """
    if model is not None:
        from prefixfast.model.base_name import check_base_name

        check_base_name(model)
    problem = rust_extension_error()
    values = describe_machine(problem)
    if model is not None and problem is None:
        from prefixfast.model.load import load

        try:
            with load(model, dtype=dtype) as base:
                values |= describe_backends(base) | describe_base(base)
        except Exception:
            # The report on the machine helps to understand the error that follows.
            show_one(values, as_json=as_json, title="prefixfast doctor")
            raise
    show_one(values, as_json=as_json, title="prefixfast doctor")
    if problem is not None:
        raise typer.Exit(1)


def rust_extension_error() -> str | None:
    """Reason why the Rust extension does not load, None if it loads."""
    try:
        import prefixfast._rust  # noqa: F401
    except ImportError as e:
        return f"does not load: {e}; build it with `maturin develop --release` or install a wheel"
    return None


def describe_machine(problem: str | None) -> dict[str, Any]:
    """Properties of the installation and the machine.

    Args:
        problem: Reason why the Rust extension does not load, None if it loads.
    """
    import torch

    from prefixfast.io.environment import environment, version
    from prefixfast.model.memory import free_memory

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found = environment()
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        **{package: version(package) or "not installed" for package in PACKAGES},
        "rust extension": problem or "loads",
        "cpu": found["cpu"],
        "instructions": found["cpu_flags"] or [torch.backends.cpu.get_cpu_capability()],
        "cores": found["cores"],
        "threads": found["threads"],
        "free memory": in_bytes(free_memory(torch.device("cpu"))),
        "gpu": gpus or f"none: {_no_gpu()}",
        **(describe_backends() if problem is None else {}),
    }


def describe_backends(base: Model | None = None) -> dict[str, Any]:
    """Backend of each operator, and the reason why a faster one is unavailable.

    Args:
        base: Base to report on. None reports on the default device and dtype of the machine.
    """
    import torch
    from torch import nn

    from prefixfast.attention import ops
    from prefixfast.model.load import has_fast_bf16
    from prefixfast.model.prepack import prepack

    if base is not None:
        device, dtype, dim, chosen = base.device, base.dtype, base.layers[0].attention_dim, base.backend
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype, dim = (torch.bfloat16 if device.type == "cuda" or has_fast_bf16() else torch.float32), HEAD_DIM
        chosen = ops.choose_backend("auto", device, dtype, ((1, dim),))
    fast = has_fast_bf16()
    packing = prepack(nn.Linear(64, 64).to(device, dtype)).why_not
    return {
        "triton": _triton(),
        "fast bf16 on the cpu": "yes" if fast else "no: no AMX or fast AVX512-BF16, so dtype auto is float32 there",
        "for": f"{device.type}, {str(dtype).removeprefix('torch.')}",
        **{f"op {op}": way for op, way in ops.explain_backends(chosen, device, dtype, dim).items()},
        "weights": "prepacked for this CPU (oneDNN)" if packing is None else f"as they are: {packing}",
    }


def describe_base(base: Model) -> dict[str, Any]:
    """Properties of a base, and the size of a prefix for it."""
    from prefixfast.model.base import describe_weights
    from prefixfast.model.supported_models import VERIFIED

    kind = base.hf.config.model_type
    if base.seq2seq is not None:  # `load` takes the types alone that the tests compare
        tested = "logits and gradients of prefixes at its sites are tested"
    elif kind in VERIFIED:
        tested = "parity with PEFT is tested"
    else:
        tested = "not among the families tested with PEFT; the proof at load found the results of its own forward"
    start = time.perf_counter()
    fingerprint = base.fingerprint
    seconds = time.perf_counter() - start
    layers = [s for shapes in base.sites.values() for s in shapes]
    numbers = LENGTH * sum(s.row_numbers for s in layers)
    heads = sorted({f"{s.num_heads} query and {s.num_kv_heads} kv heads of {s.head_dim}" for s in layers})
    return {
        "base": fingerprint["name"],
        "family": f"{kind}: {tested}",
        "parameters": base.hf.num_parameters(),
        "dtype": str(base.dtype).removeprefix("torch."),
        "layers": len(base.layers) if base.seq2seq is None else {site: len(s) for site, s in base.sites.items()},
        "heads": heads,
        "positions": base.max_positions if base.seq2seq is None else _positions(base),
        "vocabulary": base.vocab_size,
        "tokenizer": "none: token ids only" if base.tokenizer is None else "yes",
        "quantization": describe_weights(base),
        "fingerprint": fingerprint["weights"],
        "fingerprint, ms": round(1e3 * seconds, 1),
        f"prefix of {LENGTH}, numbers": numbers,
        f"prefix of {LENGTH}, bytes as trained (fp32)": 4 * numbers,
        f"prefix of {LENGTH}, bytes in an engine": base.dtype.itemsize * numbers,
        **(_describe_cross(base) if base.seq2seq is not None else {}),
    }


def _positions(base: Model) -> str:
    """Positions of an encoder-decoder base."""
    assert base.seq2seq is not None
    if base.seq2seq.has_distances:
        return "distances between tokens, without a limit"
    return f"{base.seq2seq.encoder_positions} of the encoder, {base.max_positions} of the decoder"


def _describe_cross(base: Model) -> dict[str, Any]:
    """Memory of a source of an encoder-decoder base in an engine."""
    from prefixfast.engine.explain import SOURCE_LENGTH
    from prefixfast.engine.kv_arena import bytes_per_row, cross_rows

    rows = cross_rows(SOURCE_LENGTH)
    return {
        f"source text of {SOURCE_LENGTH}, rows in an engine": rows,
        f"source text of {SOURCE_LENGTH}, bytes in an engine": rows * bytes_per_row(base),
    }


def _no_gpu() -> str:
    """Reason why there is no GPU."""
    import torch

    return "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no device"


def _triton() -> str:
    """Version of Triton, and the reason why it is not used."""
    import torch

    from prefixfast.io.environment import version

    if importlib.util.find_spec("triton") is None:
        return "not installed: the torch backend serves every call"
    reason = "" if torch.cuda.is_available() else ": needs a GPU, the torch backend serves every call"
    return f"{version('triton')}{reason}"
