"""`Operator`, a custom operator that runs without torch's dispatcher where nothing observes the call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")


def _included() -> int:
    """Dispatch keys that this thread adds to those of the arguments, as a bit set."""
    return torch._C._dispatch_tls_local_include_set().raw_repr()


# Inference mode alone. A dispatch mode (fake tensors, tracing), a functorch transform or a JIT trace adds a key, and
# without inference mode there is the key of views and in-place writes.
with torch.inference_mode():
    _PLAIN = _included()


def is_unobserved(t: Tensor) -> bool:
    """Whether an operator can run without the dispatcher: on the CPU, in inference mode, with nothing that watches it.

    Gradients, tracing, dispatch and function modes, tensor subclasses and the profiler watch operators.

    Args:
        t: First tensor of the call.
    """
    return (
        not torch.compiler.is_compiling()  # first, so that a compiler reads no further
        and type(t) is Tensor
        and t.is_cpu
        and _included() == _PLAIN
        and not torch._C._len_torch_function_stack()
        and not torch._C._autograd._profiler_enabled()
    )


class Operator(Generic[R]):
    """Custom operator, whose first argument is a tensor.

    Where `is_unobserved` holds, a call is a call of the function: the dispatcher takes longer than a small step.

    Args:
        name: Name with namespace.
        function: Implementation.
        mutates_args: Names of the tensors that the function writes to.

    Attributes:
        custom_op: Operator that is registered with torch.
        function: Implementation.
    """

    def __init__(self, name: str, function: Callable[..., R], mutates_args: Sequence[str] = ()) -> None:
        self.function = function
        self.custom_op = torch.library.custom_op(name, function, mutates_args=tuple(mutates_args))

    def __call__(self, *args: Any) -> R:
        """Result of the operator."""
        if is_unobserved(args[0]):
            return self.function(*args)
        return self.custom_op(*args)


def operator(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., R]], Operator[R]]:
    """Decorator that makes an `Operator` of a function.

    Args:
        name: Name with namespace.
        mutates_args: Names of the tensors that the function writes to.
    """
    return lambda function: Operator(name, function, mutates_args)
