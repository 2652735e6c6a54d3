"""Trained weights in the base model of an engine for the time of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prefixfast.model.base import Model
from prefixfast.model.tuned.apply import applied
from prefixfast.prefix.tensors import shared_tensors
from prefixfast.prefix.tuned_weights import TunedWeights


@contextlib.contextmanager
def applied_weights(model: Model, weights: TunedWeights | None) -> Iterator[None]:
    """Context manager in which a base model runs with trained weights. It gives the base model back unchanged.

    Args:
        model: Base model, for which the weights were made.
        weights: Trained weights, None for those of the base model.

    Raises:
        ConfigError: If the weights do not fit the base model, or cannot act in it now, or others act in it in this
            thread.
    """
    if weights is None:
        model.guard.check_not_changing()
        with model.guard.running():
            yield
        return
    tensors = {name: t.to(model.device) for name, t in shared_tensors(weights.tensors).items()}
    with applied(model, weights.method, tensors, weights.options):
        yield
