"""Other weights in an attached base model, which has its own tensors back afterwards.

The parameters point at other memory for the time of a call. The base model's own memory is never written, so that it is
given back unchanged to the bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from prefixfast.attention import ops
from prefixfast.attention.plan import plain_plan
from prefixfast.errors import ConfigError, shown
from prefixfast.model.base import Model
from prefixfast.model.packed_forward import packed_forward
from prefixfast.model.tuned.blocks import decoder_blocks

TOP_BLOCKS = 2  # blocks of method top2
NUM_TOKENS = 8  # length of the text that shows which weights follow the blocks


def all_weights(model: Model) -> dict[str, nn.Parameter]:
    """Parameters of a base model by name; tied ones have one name.

    Positions that are no learned embedding are left out. Sinusoids are constants, and attention reads T5's bias of
    distances from a table that has no gradient.

    Raises:
        ConfigError: If a weight is quantized.
    """
    fixed = {id(p) for name, m in model.hf.named_modules() if _is_fixed(name, m) for p in m.parameters()}
    named = {name: p for name, p in model.hf.named_parameters() if id(p) not in fixed}
    for name, p in named.items():
        if type(p.data) is not Tensor or not p.is_floating_point():
            msg = f"the weight {name} of this {type(model.hf).__name__} is quantized; load the base without it"
            raise ConfigError(msg)
    return named


def _is_fixed(name: str, module: nn.Module) -> bool:
    """Whether the weights of a module are positions that are no learned embedding."""
    return "Sinusoidal" in type(module).__name__ or name.endswith("relative_attention_bias")


def top_weights(model: Model, count: int) -> dict[str, nn.Parameter]:
    """Parameters of the last transformer blocks, and of what follows them: the last norm and the output layer.

    A tied output layer is also the input embedding.

    Args:
        model: Base model.
        count: Number of blocks.

    Raises:
        ConfigError: If the base model has no blocks, or a weight is quantized.
    """
    named, blocks = all_weights(model), decoder_blocks(model)
    top = {id(p) for block in blocks[-count:] for p in block.parameters()} | _after(model, blocks[-1])
    return {name: p for name, p in named.items() if id(p) in top}


def _after(model: Model, block: nn.Module) -> set[int]:
    """Ids of the parameters that the logits depend on when the output of a block is given."""
    parameters = list(model.hf.parameters())
    flags = [p.requires_grad for p in parameters]
    hook = block.register_forward_hook(lambda _, args, output: output.detach().requires_grad_())
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            model.hf.requires_grad_(True)
            ids = torch.arange(1, NUM_TOKENS + 1, device=model.device) % model.vocab_size
            plan = plain_plan([NUM_TOKENS], backend=ops.Backend("reference"), device=model.device)
            logits = packed_forward(model.hf, plan, ids)
            grads = torch.autograd.grad(logits.float().sum(), parameters, allow_unused=True)
    finally:
        hook.remove()
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
    return {id(p) for p, grad in zip(parameters, grads, strict=True) if grad is not None}


def block_weights(model: Model, count: int) -> list[str]:
    """Names of the parameters of the last transformer blocks.

    Args:
        model: Base model.
        count: Number of blocks.
    """
    own = {id(p) for block in decoder_blocks(model)[-count:] for p in block.parameters()}
    return [name for name, p in model.hf.named_parameters() if id(p) in own]


@contextlib.contextmanager
def applied_full(model: Model, tensors: Mapping[str, Tensor], needed: Iterable[str] = ()) -> Iterator[None]:
    """Context manager in which parameters of a base model have other values.

    A tensor of the parameter's dtype and device is used without a copy.

    Args:
        model: Base model.
        tensors: Values by the name of the parameter, in its shape.
        needed: Names that ``tensors`` must have.

    Raises:
        ConfigError: If the base model has no such parameters, or of other shapes, or a needed one is missing.
    """
    named = all_weights(model)
    for name, t in tensors.items():
        own = tuple(named[name].shape) if name in named else None
        if own != tuple(t.shape):
            has = "has no such weight" if own is None else f"has the shape {own}"
            msg = f"weights: {shown(name)} of shape {tuple(t.shape)} does not fit: this {type(model.hf).__name__} {has}"
            raise ConfigError(msg)
    if missing := [name for name in needed if name not in tensors]:
        msg = f"weights: {len(missing)} that the method trains are missing, first {missing[0]!r}; give all of them"
        raise ConfigError(msg)
    before = {name: named[name].data for name in tensors}
    flags = {name: named[name].requires_grad for name in tensors}

    def restore() -> None:
        for name, data in before.items():
            named[name].data = data
            named[name].requires_grad_(flags[name])
            named[name].grad = None

    with model.guard.acting_until(restore, tensors.values()):
        with torch.inference_mode(mode=False):
            for name, t in tensors.items():
                named[name].data = t.detach().to(before[name].device, before[name].dtype)
        yield
