"""Types of the arguments of `train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from prefixfast.config import PrefixConfig, TrainConfig
from prefixfast.config.fields import MethodName, OptionFields
from prefixfast.config.json_types import JSON
from prefixfast.data.rows import Rows
from prefixfast.data.task import Task
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import PrefixStore
from prefixfast.training.callbacks import Callback
from prefixfast.training.groups import Init, Overrides, Sweep

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from prefixfast.model.base import Model

BaseModel: TypeAlias = "str | Path | PreTrainedModel | PeftModel | Model"


class TrainArguments(OptionFields, total=False):
    """Keyword arguments of `train` that do not change the type of its result, and the fields of its options."""

    task: str | Task | Mapping[str, JSON] | None
    prompt: str | None
    target: str | None
    table: Sequence[str] | None
    encoding: str | None
    split: Literal["train", "dev", "test"] | None
    eval_data: Rows | Mapping[str, Rows] | None
    init: Init | None
    init_text: str | None
    on_top_of: Prefix | str | None
    objective: Literal["sft"]
    overrides: Overrides | None
    store: PrefixStore | str | Path | None
    output_dir: str | Path | None
    resume: bool
    overwrite: bool
    on_error: Literal["isolate", "raise"]
    callbacks: Sequence[Callback]
    prefix_config: PrefixConfig | Mapping[str, JSON] | None
    config: TrainConfig | Mapping[str, JSON] | None
    progress: bool | None


class AllTrainArguments(TrainArguments, total=False):
    """All keyword arguments of `train`."""

    method: MethodName
    prefix_column: str | None
    sweep: Sweep | None
    lora: LoraConfig | None
