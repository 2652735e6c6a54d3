"""`EngineConfig`, the memory and batching options of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self, Unpack

from prefixfast.config.fields import EngineFields
from prefixfast.config.json_types import JSON
from prefixfast.config.options import BYTES, COUNT, COUNT_OR_ZERO, INT32_MAX, INT64_MAX, SEED, Options, Range, option

BaseMismatch = Literal["quantized"]
BASE_FIELDS = ("dtype", "device", "revision", "backend", "allow_base_mismatch")  # fields that `load` takes


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Options):
    """Memory and batching options of an engine.

    Example:
        >>> EngineConfig.make({"max_num_seqs": 8}, kv_cache_memory=2**20).max_num_seqs
        8
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = option(
        "auto",
        "compute dtype of a base model that the engine loads; 'auto' is bfloat16 on a GPU and on CPUs with AMX or "
        "AMD's AVX512-BF16, else float32",
    )
    device: str = option(
        "auto", "torch device of a base model that the engine loads; 'auto' is a GPU if there is one, else the CPU"
    )
    revision: str | None = option(
        None, "branch, tag or commit of a base model that is loaded from the hub; None is the default branch"
    )
    backend: str = option(
        "auto",
        "attention kernels of a base model that the engine loads: triton, torch, reference or auto; 'auto' chooses by "
        "device, dtype and head sizes",
    )
    allow_base_mismatch: Literal["quantized"] | None = option(
        None,
        "difference of the base model from that of a prefix that is a warning: 'quantized' accepts a quantized copy; "
        "None accepts no difference",
    )
    max_model_len: int | None = option(
        None,
        "largest number of prompt and generated tokens of a request, without prefix rows; None is 4096, or the base "
        "model's number of positions if that is smaller",
        Range(2, INT32_MAX),
    )
    max_num_seqs: int = option(
        64, "largest number of sequences in a decode step; a request takes one for each beam or sample", Range(1, 2**16)
    )
    max_num_batched_tokens: int = option(
        4096,
        "largest number of tokens of a step, in which each beam or sample that is decoded counts one token; longer "
        "prompts are prefilled over several steps, and at most three quarters of this number of sequences are decoded",
        Range(1, 2**24),
    )
    kv_cache_memory: int | None = option(
        None,
        "bytes of the KV cache, prefixes included; None is gpu_memory_utilization times the free memory, on a CPU at "
        "most 8 GiB",
        BYTES,
    )
    gpu_memory_utilization: float = option(
        0.25,
        "share of the free memory that the KV cache takes if kv_cache_memory is None, more than 0 and at most 1",
        Range(0, 1, above=True),
    )
    prefix_memory: int | None = option(
        None,
        "largest number of bytes of the KV cache that prefixes take; None is all that running requests leave free",
        BYTES,
    )
    host_prefix_memory: int = option(
        2**31,
        "largest number of bytes of host memory for prefixes read from a store; the most recently used prefix stays "
        "in memory even if it is larger",
        Range(0, INT64_MAX),
    )
    prefix_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "dtype in which host memory holds prefixes from a store; 'auto' is the compute dtype"
    )
    max_waiting: int = option(
        10_000, "largest number of waiting requests; a further request is refused with a CapacityError", COUNT
    )
    share_prompts: int = option(
        0,
        "smallest number of leading tokens that requests of a batch have in common for these tokens to be computed "
        "once; later requests reuse the 32 most recently used of these texts; 0 turns it off",
        COUNT_OR_ZERO,
    )
    num_threads: int | None = option(None, "number of CPU threads; None is torch's setting", Range(1, 1024))
    enforce_eager: bool = option(
        False,
        "whether decode steps on a GPU run without CUDA graphs, and each starts only after the tokens of the previous "
        "step were read",
    )
    compile_decode: bool = option(
        False,
        "whether torch.compile compiles the decode steps of the CUDA graphs, which saves kernel launches and makes the "
        "start minutes longer (not measured)",
    )
    prepack: bool = option(
        True,
        "whether a base model on a CPU gets prepacked weights, a second copy in the layout of the CPU's matrix "
        "products",
    )
    seed: int | None = option(
        None, "random seed of sampling requests that have none; None draws a seed when the engine is made", SEED
    )

    @classmethod
    def make(cls, config: Self | Mapping[str, JSON] | None = None, **fields: Unpack[EngineFields]) -> Self:
        """Make an `EngineConfig` from another one or from a mapping, with some fields replaced.

        Args:
            config: `EngineConfig` or mapping of field names to values. None takes the defaults.
            fields: Fields of `EngineConfig`, which take precedence over ``config``.

        Returns:
            A new `EngineConfig`.

        Raises:
            ConfigError: If a name is unknown or a value is wrong.
        """
        return cls._replaced(config, fields)
