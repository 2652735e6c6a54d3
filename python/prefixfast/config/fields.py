"""Types of the option fields as keyword arguments, for ``**fields: Unpack[TrainFields]``.

A field is typed as the constructor accepts it, which can be wider than the field of the dataclass. The constructors
of the dataclasses convert sequences to tuples, and check every value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, SupportsIndex, TypeAlias, TypedDict

from prefixfast.config.sites import Site

PrefixMethod: TypeAlias = Literal["prefix", "infix", "embedding", "prompt", "icl"]
WeightsMethod: TypeAlias = Literal["full", "top2", "adapter", "lora", "prefix+lora"]
MethodName: TypeAlias = Literal[PrefixMethod, WeightsMethod]


class PrefixConfigFields(TypedDict, total=False):
    """Fields of `PrefixConfig`."""

    prefix_length: int | Literal["text"] | Mapping[Site, int]
    reparameterization: Literal["auto", "none", "mlp"]
    sites: Site | Sequence[Site] | None
    layers: Iterable[SupportsIndex] | Mapping[Site, Iterable[SupportsIndex]] | None
    encoder_hidden_size: int
    embedding_dim: int | None
    prefix_dropout: float
    frozen_rows: int
    fit_steps: int
    pos_start: Literal["after", "zero"]
    position: Literal["prefix", "infix"]


class TrainConfigFields(TypedDict, total=False):
    """Fields of `TrainConfig`."""

    recipe: str
    loss: Literal["token_mean", "sequence_sum"]
    num_train_epochs: float | None
    max_steps: int | None
    batch_size: int
    token_budget: int | Literal["auto"]
    learning_rate: float | None
    lr_scheduler_type: Literal["linear", "cosine", "constant"]
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    max_length: int | None
    max_source_length: int | None
    max_target_length: int | None
    overflow: Literal["error", "truncate", "skip"]
    gradient_checkpointing: bool
    shard_base: bool
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"]
    shuffle: bool
    seed: int
    eval_fraction: float
    eval_steps: int | None
    metric_for_best_model: Literal["auto", "eval_loss", "last"]
    early_stopping_patience: int | None
    save_steps: int | None
    logging_steps: int
    report_to: Literal["none", "tensorboard", "wandb"]


class _MethodOptionFields(TypedDict, total=False):
    """Fields of `MethodConfig` without the method."""

    adapter_size: float
    lora_rank: int
    lora_alpha: float | None
    lora_learning_rate: float | None
    num_examples: int


class MethodConfigFields(_MethodOptionFields, total=False):
    """Fields of `MethodConfig`."""

    method: MethodName


class OptionFields(_MethodOptionFields, PrefixConfigFields, TrainConfigFields, total=False):
    """Fields of `TrainFields` that do not change the type of the result of `train`."""


class TrainFields(OptionFields, total=False):
    """Fields of `MethodConfig`, `PrefixConfig` and `TrainConfig`."""

    method: MethodName


class GenerationParamsFields(TypedDict, total=False):
    """Fields of `GenerationParams`."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    num_beams: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: Sequence[Sequence[int]] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | None
    decoder_start_token_id: int | None
    max_source_length: int | None
    stop_strings: str | Sequence[str] | None
    length_penalty: float | None
    early_stopping: Literal[True, False, "never"] | None
    num_return_sequences: int | None
    seed: int | None
    logprobs: int | None


class _EngineOnlyFields(TypedDict, total=False):
    """Fields of `EngineConfig` that `GenerationParams` does not have; a TypedDict cannot inherit ``seed`` twice."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"]
    device: str
    revision: str | None
    backend: str
    allow_base_mismatch: Literal["quantized"] | None
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory: int | None
    gpu_memory_utilization: float
    prefix_memory: int | None
    host_prefix_memory: int
    prefix_dtype: Literal["auto", "float32", "bfloat16"]
    max_waiting: int
    share_prompts: int
    num_threads: int | None
    enforce_eager: bool
    compile_decode: bool
    prepack: bool


class EngineFields(_EngineOnlyFields, total=False):
    """Fields of `EngineConfig`."""

    seed: int | None


class GenerationFields(GenerationParamsFields, _EngineOnlyFields, total=False):
    """Fields of `GenerationParams` and `EngineConfig`; ``seed`` is that of `GenerationParams`."""


ScoreFields = EngineFields
