"""`EngineConfig`: memory and batching of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefixfast.config.options import Options, at_least, option
from prefixfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Options):
    """Memory and batching of an engine.

    Example:
        >>> EngineConfig.make({"max_num_seqs": 8}, kv_cache_memory=2**20).max_num_seqs
        8
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = option(
        "auto", "compute dtype of a base that is loaded here; see load"
    )
    device: str = option("auto", "where a base that is loaded here runs; see load")
    revision: str | None = option(None, "of a hub id")
    backend: str = option("auto", "kernels of a base that is loaded here; see load")
    max_model_len: int | None = option(
        None,
        "longest prompt and generation in tokens, prefix not counted; by default what the model allows, at most 4096",
    )
    max_num_seqs: int = option(64, "rows decoded together (a request takes one a beam)")
    max_num_batched_tokens: int = option(
        4096, "tokens of one step, decoded rows included; longer prompts are filled over several steps"
    )
    kv_cache_memory: int | None = option(
        None, "bytes of keys and values, prefixes included; by default a share of free memory, on a CPU at most 8 GiB"
    )
    gpu_memory_utilization: float = option(
        0.25, "the share of free memory that keys and values take where kv_cache_memory does not say"
    )
    prefix_memory: int | None = option(
        None, "bytes of keys and values that prefixes may hold; by default all that running requests leave"
    )
    host_prefix_memory: int = option(2**31, "bytes of prefixes from a store that are kept beside the arena once read")
    prefix_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "in which stored prefixes are kept on the host; auto: the compute dtype"
    )
    max_waiting: int = option(10_000, "requests that may wait; one more is refused with a CapacityError")
    share_prompts: int = option(
        0,
        "leading tokens that requests of a batch must have in common to be computed once and kept as a prefix; 0: never",
    )
    num_threads: int | None = option(None, "CPU threads; by default torch's setting")
    enforce_eager: bool = option(
        False, "on a GPU call decode steps instead of replaying captured CUDA graphs started one step ahead"
    )
    compile_decode: bool = option(
        False,
        "compile what the graphs hold with torch.compile: minutes at the start, fewer launches (not measured yet)",
    )
    prepack: bool = option(True, "on a CPU keep a second copy of the weights, laid out for its matrix products")
    seed: int | None = option(None, "of requests without a seed of their own; by default drawn when the engine is made")

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work."""
        at_least(
            self,
            max_model_len=2,
            max_num_seqs=1,
            max_num_batched_tokens=1,
            kv_cache_memory=1,
            num_threads=1,
            host_prefix_memory=0,
            max_waiting=1,
            share_prompts=0,
            prefix_memory=1,
            seed=0,
        )
        if not 0 < self.gpu_memory_utilization <= 1:
            msg = f"EngineConfig.gpu_memory_utilization: expected more than 0 and at most 1, got {self.gpu_memory_utilization!r}"
            raise ConfigError(msg)
