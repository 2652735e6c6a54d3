"""The options of a training run, resolved from the recipe and from the options that the caller gave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from prefixfast.config import MethodConfig, Options, PrefixConfig, TrainConfig, unknown_option
from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError
from prefixfast.training.method import METHODS, check_read, read_preset
from prefixfast.training.recipes import read_recipe

O = TypeVar("O", bound=Options)


@dataclass(frozen=True)
class GivenOptions:
    """Options of a run as the caller gave them.

    Attributes:
        config: `TrainConfig`, of which the fields that differ from the defaults count as given; mapping; or None.
        prefix_config: `PrefixConfig`, mapping or None, likewise.
        fields: Fields of both and of `MethodConfig`, which take precedence over ``config`` and ``prefix_config``.
        init: Initial values, None for the recipe's.
        init_text: Text of ``init="text"``, None for the recipe's.
    """

    config: TrainConfig | Mapping[str, JSON] | None = None
    prefix_config: PrefixConfig | Mapping[str, JSON] | None = None
    fields: Mapping[str, Any] | None = None
    init: Any = None
    init_text: str | None = None


@dataclass(frozen=True)
class BaseKind:
    """Kind of a base model, by which recipes differ.

    Attributes:
        is_seq2seq: Whether the model has an encoder and a decoder.
        has_positions: Whether tokens have positions, instead of distances.
    """

    is_seq2seq: bool = False
    has_positions: bool = True


DECODER_ONLY = BaseKind()


@dataclass(frozen=True)
class TrainSettings:
    """Resolved options of a run.

    Attributes:
        config: Options of training.
        prefix_config: Options of what is learned.
        method_config: Options of the method.
        init: Initial values: ``"text"``, ``"random"``, ``"zero"``, a `Prefix`, or prefixes by name.
        init_text: Text of ``init="text"``, None for the task's.
        explicit: Names of the options that the caller gave.
        given: Options of the caller.
        task: Name of the task.
        kind: Kind of the base model.
    """

    config: TrainConfig
    prefix_config: PrefixConfig
    method_config: MethodConfig
    init: Any
    init_text: str | None
    explicit: frozenset[str]
    given: GivenOptions
    task: str
    kind: BaseKind

    def varied(self, options: Mapping[str, Any]) -> TrainSettings:
        """Settings in which the caller gives further options, as a variant of a sweep does.

        Args:
            options: Fields of the option classes.

        Raises:
            ConfigError: If the recipe has no values for them.
        """
        given = replace(self.given, fields={**(self.given.fields or {}), **options})
        return resolve_settings(given, self.task, self.kind)


def resolve_settings(given: GivenOptions, task: str, kind: BaseKind = DECODER_ONLY) -> TrainSettings:
    """Resolve the options of a run. Options of the caller take precedence over those of the recipe.

    Args:
        given: Options of the caller.
        task: Name of the task, for recipes that differ by task.
        kind: Kind of the base model, for recipes that differ by it.

    Raises:
        ConfigError: If an option is unknown or has a wrong value.
    """
    known = (*TrainConfig.names(), *PrefixConfig.names(), *MethodConfig.names())
    for name in given.fields or {}:
        if name not in known:
            raise ConfigError(unknown_option(name, known, "train"))
    explicit = _given_values(TrainConfig, given.config) | _given_values(PrefixConfig, given.prefix_config)
    explicit |= given.fields or {}
    inits = {k: v for k, v in (("init", given.init), ("init_text", given.init_text)) if v is not None}
    own_method = {k: v for k, v in explicit.items() if k in MethodConfig.names()}
    method = MethodConfig.make(own_method).method
    if method not in METHODS:
        msg = f"method: expected one of {', '.join(METHODS)}, got {method!r}"
        raise ConfigError(msg)
    check_read(method, [*explicit, *inits])
    recipe = TrainConfig.make({k: explicit[k] for k in ("recipe",) if k in explicit}).recipe
    options = read_recipe(recipe, task, method, own_method.get("adapter_size"), is_seq2seq=kind.is_seq2seq)
    if not kind.has_positions:
        options.pop("pos_start", None)
    preset = read_preset(method, options)
    own = explicit | inits
    merged = {k: v for k, v in preset.items() if k not in _overruled(preset, own)} | own
    config = TrainConfig.make({k: v for k, v in merged.items() if k in TrainConfig.names()})
    prefix_config = PrefixConfig.make({k: v for k, v in merged.items() if k in PrefixConfig.names()})
    method_config = MethodConfig.make({k: v for k, v in merged.items() if k in MethodConfig.names()})
    init, init_text = merged.get("init", "text"), merged.get("init_text")
    return TrainSettings(config, prefix_config, method_config, init, init_text, frozenset(explicit), given, task, kind)


def _overruled(preset: Mapping[str, Any], own: Mapping[str, Any]) -> set[str]:
    """Options of a recipe that would overrule options of the caller, or that do not fit them."""
    found = {"max_steps"} if "num_train_epochs" in own else set()
    if _is_another(own, "init", preset.get("init", "text")):
        found.add("init_text")
    if "reparameterization" in preset and _is_another(own, "reparameterization", preset["reparameterization"]):
        found |= {"fit_steps", "learning_rate"}  # an MLP has a far lower rate than keys and values
    return found


def _is_another(own: Mapping[str, Any], name: str, of_recipe: object) -> bool:
    """Whether the caller gave another value than the recipe; a value can be of any type before it is checked."""
    return name in own and not (isinstance(own[name], str) and own[name] == of_recipe)


def option_values(config: Options) -> dict[str, Any]:
    """Values of an options object by field name."""
    return {name: getattr(config, name) for name in config.names()}


def _given_values(cls: type[O], config: O | Mapping[str, Any] | None) -> dict[str, Any]:
    """Items of a mapping, or the fields of an object that differ from the defaults."""
    if isinstance(config, Mapping):
        for name in config:
            if name not in cls.names():
                raise ConfigError(unknown_option(str(name), cls.names(), cls.__name__))
        return dict(config)
    made, default = cls.make(config), cls()
    return {n: getattr(made, n) for n in cls.names() if getattr(made, n) != getattr(default, n)}
