"""Attention modules of an encoder-decoder model: the site and the layer of each, which a tag on the module names.

A module's ``layer_idx`` does not name the layer: it is None in the encoders of mBART, Pegasus, Marian, Blenderbot and
M2M100.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from prefixfast.attention.hf_interface import TAG, SiteTag
from prefixfast.config.sites import Site
from prefixfast.errors import ConfigError


class SiteModule(NamedTuple):
    """Attention module.

    Attributes:
        site: Kind of attention.
        layer: Index of the layer in its stack.
        module: Module, which calls transformers' attention interface.
    """

    site: Site
    layer: int
    module: Any


def site_modules(model: PreTrainedModel) -> list[SiteModule]:
    """Attention modules of an encoder-decoder model, those of the encoder first, in the order of the layers.

    Raises:
        ConfigError: If a layer has other attention modules than expected.
    """
    return [*_modules(model, model.get_encoder(), ("enc",)), *_modules(model, model.get_decoder(), ("self", "cross"))]


def layers_of(stack: Any) -> Sequence[nn.Module]:
    """Layers of an encoder or a decoder, empty if they are not where the known families have them."""
    found: Sequence[nn.Module] = getattr(stack, "layers", None) or getattr(stack, "block", None) or ()
    return found


def _modules(model: PreTrainedModel, stack: Any, sites: tuple[Site, ...]) -> Iterator[SiteModule]:
    """Attention modules of a stack. Attention of a decoder that is not causal is cross-attention."""
    for layer, block in enumerate(layers_of(stack)):
        found: dict[Site, list[Any]] = {site: [] for site in sites}
        for module in block.modules():
            if hasattr(module, "is_causal") and hasattr(module, "layer_idx"):
                found[sites[0] if len(sites) == 1 or module.is_causal else sites[1]].append(module)
        if any(len(modules) != 1 for modules in found.values()):
            counts = ", ".join(f"{len(modules)} of site {site}" for site, modules in found.items())
            msg = (
                f"cannot attach {type(model).__name__} ({model.config.model_type}): expected one attention module of "
                f"each of the sites {', '.join(sites)} in layer {layer} of {type(stack).__name__}, got {counts}"
            )
            raise ConfigError(msg)
        yield from (SiteModule(site, layer, modules[0]) for site, modules in found.items())


def set_tags(modules: Sequence[SiteModule]) -> Callable[[], None]:
    """Tag attention modules with their sites and layers.

    Returns:
        Function that removes the tags.
    """
    for site, layer, module in modules:
        module.__dict__[TAG] = SiteTag(site, layer, None)

    def undo() -> None:
        for _, _, module in modules:
            module.__dict__.pop(TAG, None)

    return undo
