"""Operator calls and host waits of one training step, which do not grow with the number of prefixes."""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from prefixfast import load
from prefixfast.attention import cpu_dense, cpu_packed, cpu_softmax_loss
from prefixfast.training import optimizer
from prefixfast.training.optimizer import PrefixAdamW
from prefixfast.training.prefix_tensor import PrefixTensor
from prefixfast.training.step import StepRunner
from prefixfast.training.trainer import train
from prefixfast_kernels import cross_entropy, torch_attn


class Operators(TorchDispatchMode):
    """Counts the operators that compute or copy, by name. Views cost no kernel."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
        if not is_view and func.namespace != "prefixfast":
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchFunctionMode):
    """Counts the calls in which the host would wait for a GPU."""

    NAMES = ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "nonzero", "numpy")

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in self.NAMES:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


LAYERS, TENSORS, ROWS, P = 3, 6, 2, 3
LABELS = [-100] * 5 + list(range(10, 15))
ATTENTION = cpu_packed if cpu_dense.is_fast() else torch_attn
PARTS = ((ATTENTION, "attn_fwd"), (ATTENTION, "attn_bwd"), (cross_entropy, "linear_cross_entropy"))
# The own keys of the sequences: the padded q, k and v, the result, its log-sum-exp, their padded ones, one call, whose
# two results are copied, and two copies out of the padded layout. The blocks: three operators ask whether a query sees
# several. Then one call, and eight that merge by log-sum-exp, two of them into the result.
FORWARD = (3 + 2 + 2 + 1 + 2 + 2) + (3 + 1 + 10)
# Gradients of the blocks: two tensors of zeros, one call with two copies of what is not contiguous, and two sums.
BLOCKS = 3 + 2 + (1 + 2) + 2
# Gradients of the own keys: do in the padded layout, the other five padded, three results, one call with four copies,
# three copies out of the padded layout, and the sum with the gradient of the queries that the blocks give.
OWN = 2 + 5 + 3 + (1 + 4) + 3 + 1
if ATTENTION is cpu_packed:  # one call: output and log-sum-exp, zeros for both gradients of prefixes, three of own rows
    FORWARD, BLOCKS, OWN = 2, 2, 3
# One chunk: two results, two products, and the losses, which are copied into their result. Without Rust the passes
# over the vocabulary take six operators more.
LOSS = 6 if cpu_softmax_loss.is_used(torch.float32, torch.device("cpu"), 0.0) else 12
# Four operators of a pile give the norms, twelve its update. The rest makes the factors of the step.
PILE, FACTORS = 4 + 12, 32


def count_step(monkeypatch, model, count):
    """Operators of the second step by part, and waits of the host outside of attention."""
    calls, waits, number = {}, Counter(), [0]

    def counted(owner, name, where):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            with Operators(calls.setdefault(where, Counter())):
                return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (*PARTS, (PrefixAdamW, "step")):
        counted(owner, name, name)
    take = StepRunner.step

    def step(self, *args):
        number[0] += 1
        if number[0] == 1:
            return take(self, *args)
        calls.clear()
        with Operators(calls.setdefault("step outside of kernels", Counter())), Waits(waits):
            return take(self, *args)

    monkeypatch.setattr(StepRunner, "step", step)
    data = {f"u{i}": [{"input_ids": list(range(5, 15)), "labels": LABELS}] * ROWS for i in range(count)}
    how = {"reparameterization": "none", "prefix_length": P, "max_steps": 2, "batch_size": ROWS, "token_budget": 10**5}
    train(model, data, init="random", progress=False, **how)
    monkeypatch.undo()
    return {where: sum(own.values()) for where, own in calls.items()}, waits


def test_a_step_of_many_prefixes_calls_as_many_operators_as_one_of_few(monkeypatch):
    with load(tiny.make("gpt2")) as model:
        assert len(model.layers) == LAYERS
        few, few_waits = count_step(monkeypatch, model, 8)
        many, many_waits = count_step(monkeypatch, model, 256)
    assert few == many
    assert few_waits == many_waits
    assert many["attn_fwd"] == LAYERS * FORWARD
    assert many["attn_bwd"] == LAYERS * BLOCKS + (LAYERS - 1) * OWN  # the own keys of the first layer are frozen
    assert many["linear_cross_entropy"] == LOSS
    assert many["step"] == FACTORS + PILE  # all tensors have one shape
    # Losses, and norms with the prefixes that were updated, come from the device once a step.
    assert many_waits["cpu"] == 2
    assert not any(many_waits[name] for name in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero"))


def test_operators_of_the_optimizer_do_not_grow_with_the_tensors(monkeypatch):
    for largest, piles in ((10**6, 1), (3 * 16, 2)):
        monkeypatch.setitem(optimizer.PILE_NUMEL, "cpu", largest)
        params = [PrefixTensor(torch.zeros(8, 2, requires_grad=True)) for _ in range(TENSORS)]
        adamw, calls = PrefixAdamW(params, 4), Counter()
        for p in params:
            p.tensor.grad = torch.ones_like(p.tensor)
        rate, active = torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
        with Operators(calls):
            adamw.step(rate, active, rate)
        assert sum(calls.values()) == FACTORS + piles * PILE
