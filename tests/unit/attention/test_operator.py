"""Operators run without torch's dispatcher where nothing observes the call, and through it wherever something does."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from prefixfast.attention import ops
from prefixfast.attention.operator import is_unobserved
from prefixfast.errors import ConfigError

X = torch.zeros(3)


class Names(TorchDispatchMode):
    """Records the names of the operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A subclass of the tensor."""


def observed_by_functorch():
    seen = []
    torch.func.vmap(lambda x: (seen.append(is_unobserved(x)), x)[1])(X)
    return seen[0]


def observed_by_tracing():
    seen = []
    make_fx(lambda x: (seen.append(is_unobserved(x)), x + 1)[1])(X)
    return seen[0]


def observed_by_the_profiler():
    with profile(activities=[ProfilerActivity.CPU]):
        return is_unobserved(X)


def observed_by_a_function_mode():
    with torch.device("cpu"):
        return is_unobserved(X)


def observed_by_a_dispatch_mode():
    with Names():
        return is_unobserved(X)


OBSERVERS = (
    observed_by_functorch,
    observed_by_tracing,
    observed_by_the_profiler,
    observed_by_a_function_mode,
    observed_by_a_dispatch_mode,
    lambda: is_unobserved(X.as_subclass(Wrapped)),
    lambda: is_unobserved(torch.zeros(3, device="meta")),
)


def test_inference_alone_is_unobserved():
    assert not is_unobserved(X)
    with torch.no_grad():
        assert not is_unobserved(X)
    with torch.inference_mode():
        assert is_unobserved(X)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_is_found(observer):
    with torch.inference_mode():
        assert not observer()
        assert is_unobserved(X)


def test_a_compiler_traces_the_operator_in_inference_mode():
    arena, new, slots = torch.zeros(2, 6, 2, 4), torch.randn(2, 3, 2, 4), torch.tensor([4, 0, 5]).int()

    def write(k, v):
        ops.kv_write(k, v, *new, slots)
        return k + 1

    with torch.inference_mode():
        assert torch.equal(torch.compile(write, fullgraph=True, backend="aot_eager")(*arena), arena[0] + 1)
    assert torch.equal(arena[:, slots.long()], new)


# ---- writes to the arena ----


def new_rows(layout, dtype):
    """New keys and values ``[5, 2, 4]`` in a memory layout."""
    x = torch.randn(2, 5, 6, 4).to(dtype)
    heads_first = x.transpose(1, 2)[:, :5, :2]
    k, v = {"rows": x[:, :, :2].contiguous(), "part of a product": x[:, :, 2:4], "heads first": heads_first}[layout]
    return k, v


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("layout", ["rows", "part of a product", "heads first"])
def test_new_rows_are_copied_to_their_slots_and_no_others_change(layout, dtypes, observed):
    slots = torch.tensor([7, 2, 3, 4, 0], dtype=torch.int32)
    arena = torch.randn(2, 9, 2, 4).to(dtypes[0])
    new = new_rows(layout, dtypes[1])
    expected = arena.clone()
    for t, x in zip(expected, new, strict=True):
        t[slots.long()] = x.to(t.dtype)
    with torch.inference_mode(not observed):
        ops.kv_write(*arena, *new, slots)
    assert torch.equal(arena, expected)


@pytest.mark.parametrize("observed", [False, True])
def test_wrong_slots_and_rows_are_refused_and_nothing_is_written(observed):
    arena, new = torch.zeros(2, 9, 2, 4), torch.ones(2, 3, 2, 4)
    with torch.inference_mode(not observed):
        for wrong in ([0, 1, 9], [0, -1, 2]):
            with pytest.raises(ConfigError):
                ops.kv_write(*arena, *new, torch.tensor(wrong, dtype=torch.int32))
        for slots, rows in ((torch.arange(4), new), (torch.arange(3), new[..., :3]), (torch.arange(3), new[:, :, :1])):
            with pytest.raises((RuntimeError, IndexError)):
                ops.kv_write(*arena, *rows, slots.int())
    assert not arena.any()
