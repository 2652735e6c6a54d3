"""`EngineExplanation`, the implementation of each operator of an engine, and the line about its memory."""

from __future__ import annotations

from typing import TypedDict

from prefixfast.attention.backend_support import explain_backends
from prefixfast.config import EngineConfig
from prefixfast.engine.kv_arena import bytes_per_row
from prefixfast.engine.loop import Loop
from prefixfast.model.base import Model, compute_line, describe_weights

# Implementation of each operator, and after a semicolon the reason why no faster one is used. ``attn`` is attention of
# a prefill, ``attn_decode`` attention of a decode step, ``linear`` the matrix products of the base model, and
# ``weights`` the quantization of its weights.
EngineExplanation = TypedDict(
    "EngineExplanation", {"attn": str, "attn_decode": str, "decode step": str, "linear": str, "weights": str}
)


def memory_summary(model: Model, loop: Loop, config: EngineConfig) -> str:
    """One line about compute dtype, device and memory of an engine.

    Args:
        model: Base model.
        loop: Loop of the engine.
        config: Options of the engine.
    """
    mib, rows = 2**20, len(loop.arena.layers[0][0])
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    packed = model.packed.nbytes if config.prepack and model.packed is not None else 0
    return (
        f"engine: {compute_line(model)}, weights {weights / mib:.0f} MiB, packed copies {packed / mib:.0f} MiB, "
        f"KV arena {rows * bytes_per_row(model) / mib:.0f} MiB ({rows} rows), "
        f"stored prefixes in host memory at most {config.host_prefix_memory / mib:.0f} MiB, "
        f"{config.max_num_seqs} decode rows of {loop.max_model_len} tokens"
    )


def explain(model: Model, loop: Loop, config: EngineConfig) -> EngineExplanation:
    """Implementation of each operator of an engine, and the reason why no faster one is used.

    Args:
        model: Base model.
        loop: Loop of the engine.
        config: Options of the engine.
    """
    attention = explain_backends(model.backend, model.device, model.dtype, model.layers[0].attention_dim)
    graphs = loop.runner.graphs
    failed = graphs is not None and not graphs.captures
    eager = loop.eager_reason or ("the capture of a CUDA graph failed, see the log" if failed else None)
    compiled = ", compiled" if config.compile_decode else ""
    graph = f"CUDA graph for each number of rows, started one step ahead{compiled}"
    return {
        "attn": attention["attn"],
        "attn_decode": attention["attn_decode"],
        "decode step": graph if eager is None else f"eager; {eager}",
        "linear": _linear(model),
        "weights": describe_weights(model),
    }


def _linear(model: Model) -> str:
    if model.packed is None:
        return "torch; prepack=False" if model.device.type == "cpu" else "torch; packed weights are for CPUs"
    reason = model.packed.why_not
    return "prepacked for this CPU (oneDNN)" if reason is None else f"torch; {reason}"
