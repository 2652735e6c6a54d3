"""Option dataclasses: what is learned, how it is trained, how tokens are chosen, and how an engine runs."""

from prefixfast.config.engine import EngineConfig
from prefixfast.config.fields import EngineFields, GenerationFields, ScoreFields, TrainFields
from prefixfast.config.generation import GenerationParams
from prefixfast.config.method import MethodConfig
from prefixfast.config.options import Options, unknown_option
from prefixfast.config.prefix import PrefixConfig
from prefixfast.config.train import TrainConfig

__all__ = [
    "EngineConfig",
    "EngineFields",
    "GenerationFields",
    "GenerationParams",
    "MethodConfig",
    "Options",
    "PrefixConfig",
    "ScoreFields",
    "TrainConfig",
    "TrainFields",
    "unknown_option",
]
