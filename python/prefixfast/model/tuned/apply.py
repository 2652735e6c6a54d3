"""`applied`, trained weights of any method in an attached base model for the time of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from prefixfast.config.json_types import JSON
from prefixfast.model.tuned.adapter import applied_adapters
from prefixfast.model.tuned.full import TOP_BLOCKS, all_weights, applied_full, block_weights
from prefixfast.model.tuned.lora import applied_lora

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.model.base import Model

Apply = Callable[["Model", Mapping[str, "Tensor"], Mapping[str, JSON]], AbstractContextManager[None]]
APPLY_BY_METHOD: dict[str, Apply] = {
    "full": lambda model, tensors, _: applied_full(model, tensors, all_weights(model)),
    "top2": lambda model, tensors, _: applied_full(model, tensors, block_weights(model, TOP_BLOCKS)),
    "adapter": lambda model, tensors, _: applied_adapters(model, tensors),
    "lora": applied_lora,
}


@contextlib.contextmanager
def applied(model: Model, method: str, tensors: Mapping[str, Tensor], options: Mapping[str, JSON]) -> Iterator[None]:
    """Context manager in which a base model has trained weights. It gives the base model back unchanged.

    It waits until no other thread runs the base model, and the runs of other threads wait for its end.

    Args:
        model: Base model.
        method: Method that trained the weights.
        tensors: Weights by name, as the method stores them.
        options: Options that the weights were made with.

    Raises:
        ConfigError: If the weights do not fit the base model, other trained weights act in it, this thread runs it, or
            an engine with a thread of its own uses it.
    """
    guard = model.guard
    with guard.changing():
        guard.check_unchanged()
        with APPLY_BY_METHOD[method](model, tensors, options):
            yield
