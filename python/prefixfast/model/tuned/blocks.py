"""`decoder_blocks`, the transformer blocks of a base model, whose outputs are the hidden states between its layers.

Shape letters: N tokens, d hidden size.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixfast.attention import ops
from prefixfast.attention.plan import plain_plan
from prefixfast.errors import ConfigError
from prefixfast.model.base import Model
from prefixfast.model.packed_forward import packed_forward

NUM_TOKENS = 8  # length of the text of the check


def decoder_blocks(model: Model) -> list[nn.Module]:
    """Transformer blocks in the order of the layers.

    Forward passes check that each block returns the hidden states ``[1, N, d]`` alone, that the next block gets what
    the block returns, and that the logits follow from the output of the last block. An attached model is checked once.

    Args:
        model: Attached base model.

    Raises:
        ConfigError: If the base model has no such blocks.
    """
    hf, num_layers = model.hf, len(model.layers)
    if model.seq2seq is not None:
        msg = (
            f"{type(hf).__name__} has an encoder and a decoder, and methods top2 and adapter change the blocks of a "
            "decoder alone; use method prefix, full or lora"
        )
        raise ConfigError(msg)
    found = [m for m in hf.modules() if isinstance(m, nn.ModuleList) and _is_of_layers(m, num_layers)]
    if len(found) != 1:
        raise ConfigError(_unsuitable(hf, f"it has no list of modules with one module for each of {num_layers} layers"))
    blocks = list(found[0])
    if model.handle.blocks == blocks:
        return blocks
    if (reason := _broken_chain(model, blocks)) is not None:
        raise ConfigError(_unsuitable(hf, reason))
    model.handle.blocks = blocks
    return blocks


def hidden_size(model: Model) -> int:
    """Width d of the hidden states between the blocks."""
    return int(model.hf.config.get_text_config().hidden_size)


def _is_of_layers(modules: nn.ModuleList, num_layers: int) -> bool:
    """Whether module i of a list holds the attention of layer i, for all layers."""
    return len(modules) == num_layers and all(
        any(getattr(m, "layer_idx", None) == i for m in block.modules()) for i, block in enumerate(modules)
    )


@torch.no_grad()
def _broken_chain(model: Model, blocks: list[nn.Module]) -> str | None:
    """Reason why a change of the blocks' outputs is not one of the hidden states between the layers, None if it is."""
    expected = (1, NUM_TOKENS, hidden_size(model))
    returned: dict[int, Tensor] = {}
    reasons: list[str] = []

    def on_output(i: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> Tensor | None:
            if not isinstance(output, Tensor) or output.shape != expected or i in returned:
                got = f"{tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
                reasons.append(f"block {i} returns {got}, expected one tensor {expected} once")
                return None
            returned[i] = output.flip(-1)
            return returned[i]

        return hook

    def on_input(i: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            got = args[0] if args else kwargs.get("hidden_states")
            if i - 1 in returned and not (isinstance(got, Tensor) and torch.equal(got, returned[i - 1])):
                reasons.append(f"block {i} does not get the output of block {i - 1}")

        return hook

    def logits() -> Tensor:
        ids = torch.arange(1, NUM_TOKENS + 1, device=model.device) % model.vocab_size
        plan = plain_plan([NUM_TOKENS], backend=ops.Backend("reference"), device=model.device)
        return packed_forward(model.hf, plan, ids)

    before = logits()
    with contextlib.ExitStack() as hooks:
        for i, block in enumerate(blocks):
            hooks.callback(block.register_forward_pre_hook(on_input(i), with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(on_output(i)).remove)
        logits()
    if reasons:
        return reasons[0]
    with contextlib.ExitStack() as hooks:
        hooks.callback(blocks[-1].register_forward_hook(lambda _, args, output: output.flip(-1)).remove)
        is_ignored = torch.equal(logits(), before)
    return "its logits do not depend on the output of the last block" if is_ignored else None


def _unsuitable(model: PreTrainedModel, reason: str) -> str:
    return (
        f"{type(model).__name__} ({model.config.model_type}) has no outputs of transformer blocks that can be changed: "
        f"{reason}; use another method"
    )
