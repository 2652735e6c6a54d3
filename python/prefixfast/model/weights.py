"""Places of a model's weights in memory, and changes of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prefixfast import _rust
from prefixfast.model.adapters import acting_adapters


def unusable_weights(model: nn.Module) -> str | None:
    """Reason why a model's weights cannot be used where they lie, None if they all lie on one device."""
    if any(hasattr(p, "placements") for p in model.parameters()):
        return "its weights are divided over processes; give train its name and shard_base=True instead"
    devices = {p.device for p in model.parameters()}
    if any(device.type == "meta" for device in devices):
        if any(hasattr(m, "_hf_hook") for m in model.modules()):  # accelerate brings them in while the model runs
            return "some of its weights are offloaded; load it without device_map, on a device that holds all of them"
        return "some of its weights are on the meta device, without values; load it with from_pretrained"
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        return f"its weights lie on several devices ({names}); load it with all of them on one"
    return None


def is_plain_cpu(t: Tensor) -> bool:
    """Whether a tensor is a torch tensor of no subclass whose bytes lie next to each other on the CPU."""
    return type(t.data) is Tensor and t.device.type == "cpu" and t.is_contiguous() and t.numel() > 0


def content_digests(tensors: Sequence[Tensor]) -> list[int]:
    """Digest of the content of each tensor, at the speed of memory.

    Args:
        tensors: Tensors for which `is_plain_cpu` holds.
    """
    return [_rust.digest(t.detach().reshape(-1).view(torch.uint8).numpy()) for t in tensors]


def version(t: Tensor) -> int:
    """Number of changes that torch has recorded, 0 for a tensor that was made in inference mode."""
    return 0 if t.is_inference() else t._version


def recorded_state(model: nn.Module) -> tuple[object, ...]:
    """Value that differs after a change of parameters or acting adapters that torch or PEFT have recorded."""
    return (*((id(p), p.data_ptr(), version(p)) for p in model.parameters()), *acting_adapters(model))


def content_state(model: nn.Module) -> tuple[object, ...]:
    """Value that differs after any change of parameters on a CPU, and after a recorded change elsewhere."""
    return (*recorded_state(model), *content_digests([p for p in model.parameters() if is_plain_cpu(p)]))
