"""What an engine says of itself: its memory, and which way each operator goes."""

from __future__ import annotations

from prefixfast.attention import ops
from prefixfast.config import EngineConfig
from prefixfast.engine.kv_arena import bytes_of_row
from prefixfast.engine.loop import Loop
from prefixfast.model.base import Model


def memory_of(model: Model, loop: Loop, config: EngineConfig) -> str:
    """One line about what was planned."""
    mib, rows = 2**20, len(loop.arena.layers[0][0])
    weights = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    packed = model.packed.nbytes if config.prepack and model.packed is not None else 0
    return (
        f"engine: weights {weights / mib:.0f} MiB, packed copies {packed / mib:.0f} MiB; "
        f"{rows} rows of keys and values {rows * bytes_of_row(model) / mib:.0f} MiB; "
        f"stored prefixes on the host at most {config.host_prefix_memory / mib:.0f} MiB; {config.max_num_seqs} decode rows of {loop.max_model_len} tokens"
    )


def explain(model: Model, loop: Loop, config: EngineConfig) -> dict[str, str]:
    """Which way each operator of an engine goes and why no faster one, and whether weights are packed."""
    found = {
        op: way
        for op, way in ops.explain(model.backend, model.device, model.dtype, model.layers[0].head_dim).items()
        if op != "cross_entropy"
    }
    called = loop.why_called or (None if loop.graphs is None or loop.graphs.capture else "capture failed, see the log")
    compiled = ", compiled" if config.compile_decode else ""
    found["decode step"] = (
        f"called; {called}" if called else f"captured CUDA graphs by rows, planned one step ahead{compiled}"
    )
    packed = model.packed
    why = (
        "prepack=False"
        if packed is None and model.device.type == "cpu"
        else "packing is for CPUs"
        if packed is None
        else packed.why_not
    )
    return found | {"linear": "packed for this CPU (oneDNN)" if why is None else f"torch; {why}"}
