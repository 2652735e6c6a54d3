"""`MethodConfig`, the options that say by which method a base model is adapted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, Unpack

from prefixfast.config.fields import MethodConfigFields
from prefixfast.config.json_types import JSON
from prefixfast.config.options import COUNT, FP32_MAX, Options, Range, option


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Options):
    """Options that say by which method a base model is adapted.

    Every method trains on the same rows in the same order, with the same evaluation. An option that the method does not
    read is refused. No argument takes an object of this class. Its fields are keyword arguments of `train`.

    Example:
        >>> MethodConfig(method="lora").lora_rank
        8
    """

    argument: ClassVar[None] = None

    method: Literal[
        "prefix", "infix", "embedding", "prompt", "icl", "full", "top2", "adapter", "lora", "prefix+lora"
    ] = option(
        "prefix",
        "method of adaptation: 'prefix' and 'infix' train keys and values, 'embedding' the embeddings of virtual "
        "tokens, 'full' all weights of the base, 'top2' its last two blocks, 'adapter' and 'lora' small networks in "
        "its layers, 'prefix+lora' both a prefix and LoRA; 'prompt' and 'icl' make a prefix from a text without "
        "training",
    )
    adapter_size: float = option(
        0.03,
        "parameters of the adapters of method 'adapter', as a share of the base's parameters",
        Range(0, 1, above=True),
    )
    lora_rank: int = option(8, "rank of the updates of methods 'lora' and 'prefix+lora'", COUNT)
    lora_alpha: float | None = option(
        None,
        "factor on the updates of methods 'lora' and 'prefix+lora', divided by the rank; None is twice the rank",
        Range(0, FP32_MAX, above=True),
    )
    lora_learning_rate: float | None = option(
        None,
        "peak learning rate of the updates of method 'prefix+lora', whose prefix has learning_rate; 0 trains the "
        "prefix alone, None is the learning rate of method 'lora'",
        Range(0, 1e6),
    )
    num_examples: int = option(4, "number of training examples in the text of method 'icl'", COUNT)

    @classmethod
    def make(cls, config: Self | Mapping[str, JSON] | None = None, **fields: Unpack[MethodConfigFields]) -> Self:
        """Make a `MethodConfig` from another one or from a mapping, with some fields replaced.

        Args:
            config: `MethodConfig` or mapping of field names to values. None takes the defaults.
            fields: Fields of `MethodConfig`, which take precedence over ``config``.

        Returns:
            A new `MethodConfig`.

        Raises:
            ConfigError: If a name is unknown or a value is wrong.
        """
        return cls._replaced(config, fields)
