"""prefixfast: fast prefix-tuning (Li & Liang 2021).

The language model is frozen. Each task or user has a prefix: a short learned block of keys and values that every layer
attends to. Many prefixes are trained in the same batches, and requests with different prefixes generate in one batch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefixfast.config import EngineConfig, GenerationParams, MethodConfig, PrefixConfig, TrainConfig
    from prefixfast.data.folder import Folder
    from prefixfast.engine.engine import Engine
    from prefixfast.engine.generate import generate, score
    from prefixfast.engine.logprobs import TokenLogprob
    from prefixfast.engine.prefix_cache import Resident
    from prefixfast.engine.request import Generation
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
    from prefixfast.integrations.hf_trainer import PrefixTrainer
    from prefixfast.metrics.evaluate import evaluate
    from prefixfast.metrics.result import Metrics, MetricValue
    from prefixfast.model.base import Model
    from prefixfast.model.load import load
    from prefixfast.model.shared_base import unload
    from prefixfast.prefix.compatibility import check_fits
    from prefixfast.prefix.prefix import Prefix
    from prefixfast.prefix.tuned_weights import TunedWeights
    from prefixfast.store import PrefixStore
    from prefixfast.training.trainer import TrainRun, train

__version__ = "0.1.0"

# Module of each public name. It is imported on first use, so that importing the package imports no torch.
_HOME = {
    "BaseMismatchError": "errors",
    "CapacityError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "Folder": "data.folder",
    "Generation": "engine.request",
    "GenerationParams": "config",
    "HFCache": "integrations.hf_generate",
    "MethodConfig": "config",
    "MetricValue": "metrics.result",
    "Metrics": "metrics.result",
    "Model": "model.base",
    "Prefix": "prefix.prefix",
    "PrefixConfig": "config",
    "PrefixFastError": "errors",
    "PrefixStore": "store",
    "PrefixTrainer": "integrations.hf_trainer",
    "RequestError": "errors",
    "Resident": "engine.prefix_cache",
    "Score": "engine.score",
    "Stream": "engine.stream",
    "TokenLogprob": "engine.logprobs",
    "TrainConfig": "config",
    "TrainRun": "training.trainer",
    "TunedWeights": "prefix.tuned_weights",
    "UnknownPrefixError": "errors",
    "check_fits": "prefix.compatibility",
    "evaluate": "metrics.evaluate",
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
    "Folder",
    "Generation",
    "GenerationParams",
    "HFCache",
    "MethodConfig",
    "MetricValue",
    "Metrics",
    "Model",
    "Prefix",
    "PrefixConfig",
    "PrefixFastError",
    "PrefixStore",
    "PrefixTrainer",
    "RequestError",
    "Resident",
    "Score",
    "Stream",
    "TokenLogprob",
    "TrainConfig",
    "TrainRun",
    "TunedWeights",
    "UnknownPrefixError",
    "check_fits",
    "evaluate",
    "generate",
    "load",
    "score",
    "train",
    "unload",
]


if not TYPE_CHECKING:  # a type checker would accept any attribute

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            msg = f"module 'prefixfast' has no attribute {name!r}"
            raise AttributeError(msg)
        value = getattr(importlib.import_module(f"prefixfast.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
