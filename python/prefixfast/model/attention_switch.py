"""Switch of a model's configs to prefixfast's attention. Several attached models can share a config."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from prefixfast.attention.hf_interface import NAME


@dataclass
class _Switched:
    """Config of an attached model.

    Attributes:
        config: Config.
        implementation: Attention implementation before the first of the models was attached.
        users: Number of attached models that have the config.
    """

    config: Any
    implementation: str | None
    users: int = 0


_SWITCHED: dict[int, _Switched] = {}  # by id of the config
_LOCK = threading.RLock()


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Distinct configs of a model and of its sub-models. Sub-models choose attention by their own configs."""
    return list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())


def own_implementation(config: Any) -> str | None:
    """Attention implementation of a config, or the one before a model with this config was attached."""
    with _LOCK:
        found = _SWITCHED.get(id(config))
        implementation: str | None = config._attn_implementation if found is None else found.implementation
        return implementation


def switch(model: PreTrainedModel) -> weakref.finalize[..., PreTrainedModel]:
    """Set prefixfast's attention implementation on every config of a model.

    Returns:
        Function that ends the model's use of its configs. A config without further users gets its implementation back.
        It runs by itself when the model is freed.
    """
    configs = configs_of(model)
    with _LOCK:
        for config in configs:
            entry = _SWITCHED.setdefault(id(config), _Switched(config, config._attn_implementation))
            entry.users += 1
            config._attn_implementation_internal = NAME
    release = weakref.finalize(model, _release, [id(config) for config in configs])
    release.atexit = False
    return release


def _release(keys: list[int]) -> None:
    with _LOCK:
        for key in keys:
            entry = _SWITCHED[key]
            entry.users -= 1
            if not entry.users:
                entry.config._attn_implementation_internal = entry.implementation
                del _SWITCHED[key]


@contextlib.contextmanager
def private_configs(model: PreTrainedModel) -> Iterator[None]:
    """Context manager in which a switched model has copies of the configs that it shares with other attached models.

    A change of a copy does not reach the other models, which may compute meanwhile.
    """
    with _LOCK:
        shared = {id(c) for c in configs_of(model) if _SWITCHED[id(c)].users > 1}
    held: list[tuple[dict[str, Any], str, Any]] = []
    if shared:
        memo: dict[int, Any] = {}  # one for all copies, so that a nested config stays the nested one
        for module in model.modules():
            held += [(vars(module), n, v) for n, v in vars(module).items() if isinstance(v, PretrainedConfig)]
        for attributes, name, config in held:
            attributes[name] = copy.deepcopy(config, memo)
    try:
        yield
    finally:
        for attributes, name, config in held:
            attributes[name] = config
