"""Weights in fp32 for the time of the proof, where rounding hides no fault."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixfast.model.memory import free_memory

HALF = (torch.bfloat16, torch.float16)
MOST_BYTES = 8 * 2**30  # of copies of all weights at once; a larger model has copies of one unit at a time
UNIT_BYTES = 2**30  # of copies of one unit, about those of a decoder layer of Llama 3 8B
LIMIT, QUANTIZED_LIMIT = 1e-3, 5e-2  # relative errors


class Precision(NamedTuple):
    """Precision of the proof.

    Attributes:
        dtype: Dtype of keys and values.
        limit: Largest relative error that is rounding.
    """

    dtype: torch.dtype
    limit: float


@contextlib.contextmanager
def float32_weights(model: PreTrainedModel) -> Iterator[Precision]:
    """Context manager in which a model computes in fp32 instead of half precision.

    All weights are replaced by copies if there is memory, else those of each unit while it runs. Quantized weights
    are not replaced.

    Args:
        model: Model.

    Yields:
        Dtype of keys and values, and the largest relative error that is rounding.
    """
    weights = {id(p): p for p in model.parameters()}.values()
    plain = all(type(t.data) is Tensor and (t.is_floating_point() or t.dtype == torch.bool) for t in weights)
    size = 4 * sum(t.numel() for t in weights if t.dtype in HALF)
    if not plain or not size:
        yield Precision(model.dtype, LIMIT if plain else QUANTIZED_LIMIT)
    elif size <= min(MOST_BYTES, free_memory(model.device) // 2):
        with _copied(list(model.modules()), defaultdict(list)):
            yield Precision(torch.float32, LIMIT)
    else:
        with _copied_while_running(model):
            yield Precision(torch.float32, LIMIT)


Spare = defaultdict[int, list[Tensor]]  # unused memory in fp32 by number of elements


@contextlib.contextmanager
def _copied(modules: list[nn.Module], spare: Spare) -> Iterator[None]:
    """Context manager in which tensors in half precision that the modules own are copies in fp32.

    Args:
        modules: Modules.
        spare: Memory for the copies, which gets it back at the end. Fresh memory is written at a tenth of the speed.
    """
    # Only these modules get the copies: another model, which may compute meanwhile, can have the same tensors.
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (owner, name, t)
        for m in modules
        for owner in (m._parameters, m._buffers)
        for name, t in owner.items()
        if t is not None and t.dtype in HALF
    ]
    copies: dict[int, Tensor] = {}
    try:
        for owner, name, t in places:
            if id(t) not in copies:
                unused = spare[t.numel()]
                flat = unused.pop() if unused else torch.empty(t.numel(), dtype=torch.float32, device=t.device)
                made = flat.view(t.shape).copy_(t.detach())
                copies[id(t)] = nn.Parameter(made, requires_grad=False) if isinstance(t, nn.Parameter) else made
            owner[name] = copies[id(t)]
        yield
    finally:
        for owner, name, t in places:
            owner[name] = t
        for made in copies.values():
            spare[made.numel()].append(made.detach().view(-1))


@contextlib.contextmanager
def _copied_while_running(model: PreTrainedModel) -> Iterator[None]:
    """Context manager in which the modules of each unit have their copies while the unit runs.

    The result of an embedding is cast instead.
    """
    running: dict[nn.Module, contextlib.ExitStack] = {}
    spare: Spare = defaultdict(list)

    def hook(unit: nn.Module, members: list[nn.Module]) -> Iterator[Any]:
        def enter(*_: Any) -> None:
            running[unit] = contextlib.ExitStack()
            running[unit].enter_context(_copied(members, spare))

        yield unit.register_forward_pre_hook(enter)
        yield unit.register_forward_hook(lambda *_: running.pop(unit).close(), always_call=True)

    with contextlib.ExitStack() as hooks:
        for unit, members in _units_of_calls(model):
            if isinstance(unit, nn.Embedding):
                hooks.callback(unit.register_forward_hook(lambda _, __, out: out.float()).remove)
                continue
            for handle in hook(unit, members):
                hooks.callback(handle.remove)
        yield


def _units_of_calls(model: PreTrainedModel) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Units of the modules that are called from outside, which in an encoder-decoder model are its stacks too."""
    if not model.config.is_encoder_decoder:
        yield from _units(model)
        return
    yield model, [model]
    for part in (model.get_encoder(), model.get_decoder(), model.get_output_embeddings()):
        yield from _units(part)


def _units(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules that run, each with the modules whose weights it uses: a decoder layer, or a part of a larger one."""
    tensors = [t for m in module.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    if not any(t.dtype in HALF for t in tensors):
        return
    is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)  # a list does not run
    if not is_list and 4 * sum(t.numel() for t in tensors) <= UNIT_BYTES:
        yield module, list(module.modules())
        return
    if not is_list:
        yield module, [module]
    for child in module.children():
        yield from _units(child)
