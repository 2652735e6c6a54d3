"""What protects a run: memory that runs out, an interrupt in the middle of a step, and activations that are kept or made again."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prefixfast.errors import CapacityError, ConfigError
from prefixfast.model.base import Model
from prefixfast.training.batching import MicroBatch

logger = logging.getLogger(__name__)
AUTO_BUDGET = 4096
T = TypeVar("T")


class TokenBudget:
    """Tokens of one forward pass; with ``"auto"`` halved when memory runs out.

    Args:
        budget: ``token_budget`` of the options.
    """

    def __init__(self, budget: int | str) -> None:
        self.auto = budget == "auto"
        self.tokens = AUTO_BUDGET if isinstance(budget, str) else budget
        self._tried: MicroBatch | None = None

    def watch(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The same batches; remembers the one at work."""
        for self._tried in batches:
            yield self._tried
        self._tried = None

    def run(self, work: Callable[[], T]) -> T:
        """The result of ``work``, which starts from the beginning with half the tokens when memory runs out.

        Raises:
            CapacityError: If a single example does not fit, or the budget is a given number.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as e:  # torch.OutOfMemoryError is a RuntimeError
                if not _out_of_memory(e):
                    raise
                reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            self._halve(reason)  # outside of except, so that the error's frames and their tensors are gone

    def _halve(self, reason: str) -> None:
        tried, self._tried = self._tried, None
        if not self.auto:
            msg = (
                f"memory ran out with token_budget={self.tokens}: lower it, or give 'auto', which halves it ({reason})"
            )
            raise CapacityError(msg)
        if tried is None or len(tried.lengths) == 1:
            what = "the prefixes themselves" if tried is None else f"one example of {int(tried.lengths[0]) + 1} tokens"
            msg = f"memory ran out on {what}: train fewer prefixes at once, use gradient_checkpointing=True, or a shorter max_length ({reason})"
            raise CapacityError(msg)
        self.tokens = max(1, min(self.tokens, int(tried.lengths.sum()) + len(tried.lengths)) // 2)
        logger.warning("memory ran out: the step is made again with token_budget=%d", self.tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _out_of_memory(error: BaseException) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in str(error) for w in words)


class Interrupt:
    """Whether the user asked to stop.

    Attributes:
        requested: Set by an interrupt while `deferred` holds it back.
    """

    requested = False


@contextlib.contextmanager
def deferred(enabled: bool) -> Iterator[Interrupt]:
    """Hold an interrupt (Ctrl-C) back until the step is done; a second one comes through at once.

    Only in the main thread and only where Python's own handler is in place: an application that handles the signal itself goes on doing so.
    """
    interrupt = Interrupt()
    if (
        not enabled
        or threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield interrupt
        return

    def handler(number: int, frame: Any) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True
        logger.warning("stopping after this step with a checkpoint; interrupt again to stop at once")

    signal.signal(signal.SIGINT, handler)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def recomputed(model: Model, enabled: bool) -> Iterator[None]:
    """Keep only the inputs of each layer of the base and make the rest again in the backward pass.

    transformers' own switch works in training mode only, which would also turn dropout on; the plan of the forward is an argument of the layers, so the
    second forward of a layer is that of the first.

    Raises:
        ConfigError: If the base's layers cannot be told.
    """
    layers = [m for m in model.hf.modules() if isinstance(m, GradientCheckpointingLayer)] if enabled else []
    if enabled and not layers:
        msg = f"gradient_checkpointing: {type(model.hf).__name__} has no layers that transformers can checkpoint; leave it out"
        raise ConfigError(msg)
    own = [vars(layer).get("forward") for layer in layers]  # accelerate's hooks put one there
    for layer in layers:
        layer.forward = functools.partial(_twice, layer.forward)
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before


def _twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)
