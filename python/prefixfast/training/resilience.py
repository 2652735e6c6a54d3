"""Out-of-memory back-off, deferred interrupts and gradient checkpointing."""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from prefixfast.errors import CapacityError, ConfigError
from prefixfast.model.base import Model
from prefixfast.training.batching import MicroBatch

logger = logging.getLogger(__name__)
MIN_AUTO_BUDGET, MAX_AUTO_BUDGET = 1024, 4096
# Largest number of elements of the hidden states of a forward pass on a CPU. More tokens are no faster there, and their
# activations take more memory.
AUTO_NUMEL = 5 << 16
T = TypeVar("T")


class TokenBudget:
    """Largest number of tokens of a forward pass; with ``"auto"`` it is halved when memory runs out.

    Args:
        budget: Option ``token_budget``.
        model: Base model.
        can_repeat: Whether a step can be repeated, which processes that run the base model together cannot do alone.
    """

    def __init__(self, budget: int | str, model: Model, *, can_repeat: bool = True) -> None:
        self.is_auto, self.can_repeat = budget == "auto", can_repeat
        self.tokens = _auto_budget(model) if isinstance(budget, str) else budget
        self._current: MicroBatch | None = None

    def watch(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield the batches, and remember the one in use for the error message."""
        for self._current in batches:
            yield self._current
        self._current = None

    def run(self, work: Callable[[], T]) -> T:
        """Run ``work``, and run it again with half the tokens when memory runs out.

        Args:
            work: Function that packs its batches with `tokens`, and can be called again after a failure.

        Raises:
            CapacityError: If a single example does not fit, or the budget is an explicit number.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as e:  # torch.OutOfMemoryError is a RuntimeError
                if not _is_out_of_memory(e):
                    raise
                reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            self._halve(reason)  # after the except block, so that the error's frames and their tensors are freed

    def _halve(self, reason: str) -> None:
        batch, self._current = self._current, None
        if not self.can_repeat:
            advice = "give a lower token_budget, which shard_base does not halve by itself"
            msg = f"memory ran out with token_budget={self.tokens}: {advice} ({reason})"
            raise CapacityError(msg)
        if not self.is_auto:
            advice = "lower it, or give 'auto', which halves it"
            msg = f"memory ran out with token_budget={self.tokens}: {advice} ({reason})"
            raise CapacityError(msg)
        if batch is None or len(batch.lengths) == 1:
            what = "the prefixes themselves" if batch is None else f"one example of {batch.num_tokens + 1} tokens"
            advice = "train fewer prefixes at once, use gradient_checkpointing=True, or a shorter max_length"
            msg = f"memory ran out on {what}: {advice} ({reason})"
            raise CapacityError(msg)
        self.tokens = max(1, min(self.tokens, batch.num_tokens + len(batch.lengths)) // 2)
        logger.warning("memory ran out: the step is repeated with token_budget=%d", self.tokens)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _auto_budget(model: Model) -> int:
    """Number of tokens with which ``"auto"`` starts."""
    if model.device.type != "cpu":
        return MAX_AUTO_BUDGET
    width = int(model.hf.get_input_embeddings().weight.shape[1])
    return min(MAX_AUTO_BUDGET, max(MIN_AUTO_BUDGET, AUTO_NUMEL // width))


def _is_out_of_memory(error: BaseException) -> bool:
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in texts)


class Interrupt:
    """An interrupt that `defer_sigint` holds back.

    Attributes:
        requested: Whether the user has interrupted.
    """

    requested = False


@contextlib.contextmanager
def defer_sigint(enabled: bool) -> Iterator[Interrupt]:
    """Hold back an interrupt (Ctrl-C) until the end of the step; a second interrupt takes effect at once.

    The handler is installed only in the main thread, and only in place of Python's own handler, so that a handler of
    the application stays in effect.

    Args:
        enabled: Whether interrupts are held back.
    """
    interrupt = Interrupt()
    if (
        not enabled
        or threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield interrupt
        return

    def handler(number: int, frame: FrameType | None) -> None:
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
def gradient_checkpointing(model: Model, enabled: bool) -> Iterator[None]:
    """Keep only the input of each layer for the backward pass, which computes the other activations again.

    The switch of transformers works in training mode only, which also turns on dropout. The plan of the forward pass is
    an argument of the layers, so the repeated forward pass of a layer uses the same plan.

    Args:
        model: Base model.
        enabled: Whether gradient checkpointing is used.

    Raises:
        ConfigError: If the base model has no layers that transformers can checkpoint.
    """
    layers = [m for m in model.hf.modules() if isinstance(m, GradientCheckpointingLayer)] if enabled else []
    if enabled and not layers:
        got = type(model.hf).__name__
        msg = f"gradient_checkpointing: {got} has no layers that transformers can checkpoint; leave it out"
        raise ConfigError(msg)
    if not enabled:
        yield
        return
    with _LOCK:
        patch = _PATCHES.setdefault(model.hf, _Patch([(layer, vars(layer).get("forward")) for layer in layers]))
        if not patch.users:
            for layer in layers:
                layer.forward = functools.partial(_checkpointed, layer.forward)
        patch.users += 1
    try:
        yield
    finally:
        with _LOCK:
            patch.users -= 1
            if not patch.users:
                patch.undo()
                del _PATCHES[model.hf]


@dataclass
class _Patch:
    """Layers of a base model with a forward of their own, which all runs that train on it share.

    Attributes:
        layers: Layers with the forward that was set on the object before, for example by accelerate, None for none.
        users: Number of runs.
    """

    layers: list[tuple[GradientCheckpointingLayer, Any]]
    users: int = 0

    def undo(self) -> None:
        """Give the layers their forwards back."""
        for layer, before in self.layers:
            if before is None:
                del layer.forward
            else:
                layer.forward = before


_PATCHES: WeakKeyDictionary[nn.Module, _Patch] = WeakKeyDictionary()
_LOCK = threading.Lock()


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)
