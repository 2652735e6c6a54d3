"""A base model whose layers are divided over the processes of a run by torch's FSDP2 (``fully_shard``).

The model is loaded and checked whole, on the CPU. Then each process keeps its part of every layer on its device, and
gets the others' parts of a layer while the layer runs. Embeddings, the last norm and the output layer stay whole.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefixfast.attention import ops
from prefixfast.attention.plan import plain_plan
from prefixfast.errors import ConfigError
from prefixfast.model.adapters import has_adapters
from prefixfast.model.base import Model
from prefixfast.model.lm_head import find_head, packed_hidden
from prefixfast.model.load import compute_dtype, find_device, load

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def sharded_base(name: str | Path, dtype: str) -> Iterator[Model]:
    """Context manager of a base model that all processes of torch.distributed hold together.

    All of them enter it, and run the model equally often and in the same order.

    Args:
        name: Hub id, folder or ``.gguf`` file.
        dtype: Compute dtype.

    Yields:
        Attached base model.

    Raises:
        ConfigError: If the model cannot be loaded or divided.
    """
    model = load(name, dtype=compute_dtype(dtype), device="cpu")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing is written into it
        try:
            shard(model)
            yield model
        finally:
            model.close()


def shard(model: Model) -> None:
    """Divide the layers of an attached model over all processes of torch.distributed.

    Args:
        model: Model on the CPU, whole.

    Raises:
        ConfigError: If the model has an encoder, adapters, quantized weights or no layers that transformers marks as
            such, or if the divided model computes other hidden states.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    hf = model.hf
    layers = [m for m in hf.modules() if isinstance(m, GradientCheckpointingLayer)]
    if (reason := _refusal(hf, layers)) is not None:
        msg = f"shard_base: {type(hf).__name__} cannot be divided: {reason}; leave shard_base out"
        raise ConfigError(msg)
    model.whole_fingerprint = model.fingerprint  # of weights that no process holds afterwards
    expected = _hidden(hf)
    device = find_device("auto")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    inside = {p for layer in layers for p in layer.parameters()}
    whole = {p for p in hf.parameters() if p not in inside}
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # The module through which every forward goes prefetches the next layer; it has no weights of its own to divide.
    fully_shard(hf.base_model, mesh=mesh, ignored_params=whole)
    _move_whole(hf, whole, device)
    error = float((_hidden(hf).cpu() - expected).abs().max() / expected.abs().max())
    if not error < (1e-4 if hf.dtype in (torch.float32, torch.float64) else 3e-2):
        msg = (
            f"shard_base: {type(hf).__name__} computes other hidden states when it is divided (relative error {error})"
        )
        raise ConfigError(msg)
    shapes = tuple((s.num_heads // s.num_kv_heads, s.attention_dim) for s in model.layers)
    heads = max(s.num_kv_heads for s in model.layers)
    model.backend = ops.choose_backend("auto", hf.device, hf.dtype, shapes, heads)
    model.head = find_head(hf)
    numbers = sum(p.numel() for p in inside)
    logger.info("%d of %d weights are divided over %d processes", numbers, numbers + _count(whole), mesh.size())


def _refusal(hf: PreTrainedModel, layers: list[GradientCheckpointingLayer]) -> str | None:
    """Reason why a model cannot be divided, None if it can."""
    if hf.config.is_encoder_decoder:
        return "its encoder and decoder do not run as one module"
    if not layers:
        return "transformers marks none of its modules as a layer"
    if has_adapters(hf):
        return "it has adapters; merge them into its weights"
    if not all(p.is_floating_point() for p in hf.parameters()):
        return "its weights are quantized"
    if hf.base_model is hf:
        return "its layers and its output layer are one module"
    return None


@torch.no_grad()
def _hidden(hf: PreTrainedModel) -> Tensor:
    """Hidden states of a few tokens, in fp64."""
    ids = torch.arange(1, 9, device=hf.device) % hf.config.get_text_config().vocab_size
    plan = plain_plan([len(ids)], backend=ops.Backend("reference"), device=hf.device)
    return packed_hidden(hf, plan, ids).double()


def _move_whole(hf: PreTrainedModel, whole: set[torch.nn.Parameter], device: torch.device) -> None:
    """Move the weights that every process holds, and the buffers beside them."""
    for p in whole:
        p.data = p.data.to(device)
    for module in hf.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _count(parameters: set[torch.nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
