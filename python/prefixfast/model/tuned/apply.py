"""`tuned`, trained weights of any method in an attached base model for the time of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from prefixfast.config.json_types import JSON
from prefixfast.model.tuned.adapter import attached_adapters
from prefixfast.model.tuned.full import replaced_weights
from prefixfast.model.tuned.lora import attached_lora

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.model.base import Model

Apply = Callable[["Model", Mapping[str, "Tensor"], Mapping[str, JSON]], AbstractContextManager[None]]
METHODS: dict[str, Apply] = {
    "full": lambda model, tensors, _: replaced_weights(model, tensors),
    "top2": lambda model, tensors, _: replaced_weights(model, tensors),
    "adapter": lambda model, tensors, _: attached_adapters(model, tensors),
    "lora": attached_lora,
}


def tuned(
    model: Model, method: str, tensors: Mapping[str, Tensor], options: Mapping[str, JSON]
) -> AbstractContextManager[None]:
    """Context manager in which a base model has trained weights. It gives the base model back unchanged.

    Args:
        model: Base model.
        method: Method that trained the weights.
        tensors: Weights by name, as the method stores them.
        options: Options that the weights were made with.

    Raises:
        ConfigError: If the weights do not fit the base model.
    """
    return METHODS[method](model, tensors, options)
