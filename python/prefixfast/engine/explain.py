"""`EngineExplanation`, the implementation of each operator of an engine, and the line about its memory."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from prefixfast.attention.backend_support import explain_backends
from prefixfast.config import EngineConfig
from prefixfast.engine.arena_sites import ROW_UNIT
from prefixfast.engine.kv_arena import bytes_per_row, cross_rows
from prefixfast.engine.loop import Loop
from prefixfast.model.base import Model, compute_line, describe_weights

# Implementation of each operator, and after a semicolon the reason why no faster one is used. ``attn`` is attention of
# a prefill, ``attn_decode`` attention of a decode step, ``linear`` the matrix products of the base model, and
# ``weights`` the quantization of its weights. An encoder-decoder base also has ``encoder``, how its encoder runs, and
# ``cross``, the memory of a request's keys and values of cross-attention.
EngineExplanation = TypedDict(
    "EngineExplanation",
    {
        "attn": str,
        "attn_decode": str,
        "decode step": str,
        "linear": str,
        "weights": str,
        "encoder": NotRequired[str],
        "cross": NotRequired[str],
    },
)

SOURCE_LENGTH = 512  # tokens of the text whose size is reported


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
    has_bias = model.seq2seq is not None and model.seq2seq.has_distances
    dim = model.layers[0].attention_dim
    attention = explain_backends(model.backend, model.device, model.dtype, dim, has_bias=has_bias)
    graphs = loop.runner.graphs
    failed = graphs is not None and not graphs.captures
    eager = loop.eager_reason or ("the capture of a CUDA graph failed, see the log" if failed else None)
    compiled = ", compiled" if config.compile_decode else ""
    graph = f"CUDA graph for each number of rows, started one step ahead{compiled}"
    found: EngineExplanation = {
        "attn": attention["attn"],
        "attn_decode": attention["attn_decode"],
        "decode step": graph if eager is None else f"eager; {eager}",
        "linear": _linear(model),
        "weights": describe_weights(model),
    }
    if model.seq2seq is not None:
        found["encoder"] = _encoder(model.seq2seq.encoder_positions, max_source_tokens(config))
        found["cross"] = describe_cross(model)
    return found


def max_source_tokens(config: EngineConfig) -> int:
    """Largest number of tokens of a source, which is not cut over several steps.

    Args:
        config: Options of the engine.
    """
    tokens = config.max_num_batched_tokens
    return tokens - min(config.max_num_seqs, tokens - tokens // 4)


def _encoder(positions: int, most: int) -> str:
    """Largest number of tokens of a source, by the positions of the encoder and the tokens of a step."""
    step = "max_num_batched_tokens less the sequences that a step decodes"
    limit, reason = (positions, "the positions of the encoder") if positions <= most else (most, step)
    return f"runs once for each request, on texts of at most {limit} tokens; {reason}"


def describe_cross(model: Model) -> str:
    """Arena rows and bytes of the keys and values that the decoder reads of a request's source, which its beams share.

    Args:
        model: Encoder-decoder base.
    """
    rows, size = cross_rows(SOURCE_LENGTH), bytes_per_row(model)
    return (
        f"{ROW_UNIT} rows of {size} bytes for each {ROW_UNIT} tokens of a text or part of them, computed once for each "
        f"request and shared by its beams; {SOURCE_LENGTH} tokens take {rows} rows, {rows * size} bytes"
    )


def _linear(model: Model) -> str:
    if model.packed is None:
        return "torch; prepack=False" if model.device.type == "cpu" else "torch; packed weights are for CPUs"
    reason = model.packed.why_not
    return "prepacked for this CPU (oneDNN)" if reason is None else f"torch; {reason}"
