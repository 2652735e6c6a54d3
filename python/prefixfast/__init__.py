"""prefixfast: prefix-tuning that is fast to train and to serve.

A frozen language model and, for each task or user, a short learned block of keys and values that every layer attends to (Li & Liang 2021). Many prefixes
are trained in the same batches and generate in the same batch; none is ever copied per request.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefixfast.config import EngineConfig, GenerationParams, PrefixConfig, TrainConfig
    from prefixfast.engine.engine import Engine
    from prefixfast.engine.generate import generate, score
    from prefixfast.engine.prefix_cache import Resident
    from prefixfast.engine.request import Generation, TokenLogprob
    from prefixfast.engine.score import Score
    from prefixfast.engine.stream import Stream
    from prefixfast.errors import (
        BaseMismatchError,
        CapacityError,
        ConfigError,
        DataError,
        PrefixFastError,
        RequestError,
        UnknownPrefixError,
    )
    from prefixfast.integrations.hf_generate import HFCache
    from prefixfast.model.base import Model
    from prefixfast.model.load import load
    from prefixfast.model.shared_base import unload
    from prefixfast.prefix.compatibility import check_fits
    from prefixfast.prefix.prefix import Prefix
    from prefixfast.store import PrefixStore
    from prefixfast.training.trainer import TrainRun, train

__version__ = "0.1.0"

# Where each public name lives; loaded on first use, so that importing the package takes no torch.
_HOME = {
    "BaseMismatchError": "errors",
    "CapacityError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "Generation": "engine.request",
    "GenerationParams": "config",
    "HFCache": "integrations.hf_generate",
    "Model": "model.base",
    "Prefix": "prefix.prefix",
    "PrefixConfig": "config",
    "PrefixFastError": "errors",
    "PrefixStore": "store",
    "RequestError": "errors",
    "Resident": "engine.prefix_cache",
    "Score": "engine.score",
    "Stream": "engine.stream",
    "TokenLogprob": "engine.request",
    "TrainConfig": "config",
    "TrainRun": "training.trainer",
    "UnknownPrefixError": "errors",
    "check_fits": "prefix.compatibility",
    "generate": "engine.generate",
    "load": "model.load",
    "score": "engine.generate",
    "train": "training.trainer",
    "unload": "model.shared_base",
}
__all__ = [
    "BaseMismatchError",
    "CapacityError",
    "ConfigError",
    "DataError",
    "Engine",
    "EngineConfig",
    "Generation",
    "GenerationParams",
    "HFCache",
    "Model",
    "Prefix",
    "PrefixConfig",
    "PrefixFastError",
    "PrefixStore",
    "RequestError",
    "Resident",
    "Score",
    "Stream",
    "TokenLogprob",
    "TrainConfig",
    "TrainRun",
    "UnknownPrefixError",
    "check_fits",
    "generate",
    "load",
    "score",
    "train",
    "unload",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        msg = f"module 'prefixfast' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(importlib.import_module(f"prefixfast.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
