"""Where a model's weights lie."""

from __future__ import annotations

from torch import nn


def unusable_weights(model: nn.Module) -> str | None:
    """Reason why a model's weights cannot be used where they lie, None if they all lie on one device."""
    devices = {p.device for p in model.parameters()}
    if any(device.type == "meta" for device in devices):
        if any(hasattr(m, "_hf_hook") for m in model.modules()):  # accelerate brings them in while the model runs
            return "some of its weights are offloaded; load it without device_map, on a device that holds all of them"
        return "some of its weights are on the meta device, without values; load it with from_pretrained"
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        return f"its weights lie on several devices ({names}); load it with all of them on one"
    return None
