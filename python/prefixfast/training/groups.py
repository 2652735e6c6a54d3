"""The prefixes of a run, one for each name and variant of a sweep, grouped by the options that a batch must share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from prefixfast.config import MethodConfig, PrefixConfig, TrainConfig, unknown_option
from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError, shown, suggestion
from prefixfast.prefix.names import Window
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.method import METHODS, Method, check_read
from prefixfast.training.settings import TrainSettings

InitName: TypeAlias = Literal["text", "random", "zero"]
Init: TypeAlias = InitName | Prefix | Mapping[str, Prefix]
Sweep: TypeAlias = Mapping[str, Sequence[JSON | Prefix]]
Overrides: TypeAlias = Mapping[str, Mapping[str, JSON]]

# Options of training that may differ between the prefixes of a batch.
OF_TRAINING = (
    "learning_rate",
    "seed",
    "num_train_epochs",
    "max_steps",
    "batch_size",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "shuffle",
    "early_stopping_patience",
)
# Options that may differ between the prefixes of a batch. An infix needs rows that are read in another way.
PER_PREFIX = (*OF_TRAINING, *(name for name in PrefixConfig.names() if name != "position"))
# Options of the whole run, which a sweep cannot vary.
NOT_SWEPT = (
    "recipe",
    "method",
    "dtype",
    "eval_fraction",
    "report_to",
    "save_steps",
    "logging_steps",
    "token_budget",
    "gradient_checkpointing",
    "shard_base",
)


@dataclass(frozen=True)
class PrefixJob:
    """The training of one prefix.

    Attributes:
        name: Name of the prefix in the result.
        source: Name whose rows the prefix is trained on.
        config: Options of training.
        prefix_config: Options of what is learned.
        uses_mlp: Whether the reparameterization MLP is trained.
        init: Initial values: ``"text"``, ``"random"``, ``"zero"`` or a `Prefix`.
        own: Names of the options that the caller gave for this prefix alone.
        variant: Options that the sweep varies, with the values of this prefix.
    """

    name: str
    source: str
    config: TrainConfig
    prefix_config: PrefixConfig
    uses_mlp: bool
    init: Any
    own: frozenset[str] = frozenset()
    variant: dict[str, Any] = field(default_factory=dict)

    @property
    def learning_rate(self) -> float:
        """Peak learning rate of a group with resolved options, 0 of a method without training."""
        return self.config.learning_rate or 0.0

    @property
    def pos_start(self) -> int:
        """Position of the first token, once the length of the prefix is resolved."""
        return self.prefix_config.length_at("self") if self.prefix_config.pos_start == "after" else 0

    @property
    def window(self) -> Window:
        """Treatment of the prefix by sliding windows."""
        return self.init.window if isinstance(self.init, Prefix) else "slide"


@dataclass(frozen=True)
class PrefixGroup:
    """Prefixes that are trained in the same batches.

    Attributes:
        config: Options of training that the prefixes share.
        method_config: Options of the method.
        jobs: Training of each prefix.
    """

    config: TrainConfig
    method_config: MethodConfig
    jobs: tuple[PrefixJob, ...]

    @property
    def position(self) -> str:
        """Place of the prefixes, ``"prefix"`` or ``"infix"``."""
        return self.jobs[0].prefix_config.position

    def blocks(self) -> list[list[int]]:
        """Numbers of the prefixes, ascending, by what is learned of them.

        A subset of the prefixes has its blocks in the same order.
        """
        numbers: dict[tuple[PrefixConfig, bool], list[int]] = {}
        for i, job in enumerate(self.jobs):
            numbers.setdefault((job.prefix_config, job.uses_mlp), []).append(i)
        return [numbers[kind] for kind in sorted(numbers, key=repr)]


def make_groups(
    names: Iterable[str],
    settings: TrainSettings,
    *,
    overrides: Overrides | None = None,
    sweep: Sweep | None = None,
    is_single: bool,
    failed: Iterable[str] = (),
) -> list[PrefixGroup]:
    """Make the groups of a run.

    Args:
        names: Names of the data, in order.
        settings: Options of all prefixes.
        overrides: Values of `PER_PREFIX` options by name.
        sweep: Sequence of values by option, or of initial values for ``"init"``. Every combination is a prefix of its
            own for each name.
        is_single: Whether the data are plain rows, so that the names of variants do not begin with a name.
        failed: Names whose rows could not be read, which ``overrides`` may contain.

    Raises:
        ConfigError: If a name or option is unknown, or a value is wrong.
    """
    names = list(names)
    own_options = _checked_overrides(overrides, {*names, *failed})
    if is_single and own_options:
        msg = "overrides: expected data by name beside it, got plain rows; give the options themselves"
        raise ConfigError(msg)
    inits = _init_by_name(settings.init, names)
    for own in own_options.values():
        check_read(settings.method_config.method, own, "overrides")
    method = METHODS[settings.method_config.method]
    jobs: dict[tuple[object, ...], list[PrefixJob]] = {}
    groups: dict[tuple[object, ...], tuple[TrainConfig, MethodConfig]] = {}
    variants = _variants(sweep)
    for name, (label, variant) in itertools.product(names, variants.items()):
        own = own_options.get(name, {})
        options = own | {k: v for k, v in variant.items() if k != "init"}
        init = variant.get("init", inits[name])
        base = _varied(settings, options)
        own_training = {k: v for k, v in options.items() if k in OF_TRAINING}
        if "num_train_epochs" in options:  # of this prefix, over the steps of the whole run
            own_training.setdefault("max_steps", None)
        full_name = label if is_single and label else f"{name},{label}" if label else name
        config, what = TrainConfig.make(base.config, **own_training), base.prefix_config
        if method.position is not None:
            what = PrefixConfig.make(what, position=method.position)
        shared = _shared(base.config, settings.config), base.method_config
        key = (*shared, what.position, full_name if method.is_alone else None)
        groups[key] = shared
        uses_mlp = _uses_mlp(what, init, method)
        job = PrefixJob(full_name, name, config, what, uses_mlp, init, frozenset(own), variant)
        jobs.setdefault(key, []).append(job)
    return [PrefixGroup(*groups[key], tuple(own)) for key, own in jobs.items()]


def _shared(config: TrainConfig, of_run: TrainConfig) -> TrainConfig:
    """Options of training that a prefix shares with its batches; the others have the values of the run."""
    return config if config is of_run else TrainConfig.make(config, **{n: getattr(of_run, n) for n in OF_TRAINING})


def _uses_mlp(config: PrefixConfig, init: Any, method: Method) -> bool:
    """Whether a prefix trains the reparameterization MLP."""
    is_drawn = isinstance(init, str) and init in ("random", "zero")
    is_automatic = config.reparameterization == "auto" and is_drawn and method.makes_prefix
    return config.reparameterization == "mlp" or is_automatic


def _varied(settings: TrainSettings, own: Mapping[str, Any]) -> TrainSettings:
    """Settings of one prefix, whose values of the recipe can depend on options of its own."""
    options = {k: v for k, v in own.items() if k not in OF_TRAINING}
    return settings.varied(options) if options else settings


def _checked_overrides(overrides: Any, names: set[str]) -> dict[str, dict[str, Any]]:
    by_name = {} if overrides is None else _checked_mapping(overrides, "overrides")
    for name, options in by_name.items():
        if name not in names:
            msg = f"overrides: no prefix is named {shown(name)}; {suggestion(name, sorted(names))}"
            raise ConfigError(msg)
        for option in _checked_mapping(options, f"overrides[{shown(name)}]"):
            if option not in PER_PREFIX:
                raise ConfigError(unknown_option(str(option), PER_PREFIX, f"overrides[{shown(name)}]"))
    return {str(name): dict(options) for name, options in by_name.items()}


def _variants(sweep: Any) -> dict[str, dict[str, Any]]:
    """Every combination of a sweep by its label; without a sweep one empty combination under the empty label."""
    if sweep is None:
        return {"": {}}
    names = (*TrainConfig.names(), *PrefixConfig.names(), *MethodConfig.names(), "init")
    known = tuple(n for n in names if n not in NOT_SWEPT)
    for name, values in _checked_mapping(sweep, "sweep").items():
        if name not in known:
            raise ConfigError(unknown_option(str(name), known, "sweep"))
        if isinstance(values, str) or not isinstance(values, Iterable) or not list(values):
            msg = f"sweep[{shown(name)}]: expected a sequence of values, got {shown(values)}"
            raise ConfigError(msg)
    if not sweep:
        msg = "sweep: expected at least one field, got none"
        raise ConfigError(msg)
    products = itertools.product(*(list(v) for v in sweep.values()))
    combinations = [dict(zip(sweep, values, strict=True)) for values in products]
    labelled = {",".join(f"{k}={_label(v)}" for k, v in c.items()): c for c in combinations}
    if len(labelled) != len(combinations):
        msg = f"sweep: expected different values, got one twice in {shown(dict(sweep))}"
        raise ConfigError(msg)
    return labelled


def _label(value: Any) -> str:
    """Text of a value in the name of a variant."""
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return value.digest[:8] if isinstance(value, Prefix) else f"{value:g}" if isinstance(value, float) else _text(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else shown(value)


def _checked_mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        msg = f"{what}: expected a mapping, got {type(value).__name__}"
        raise ConfigError(msg)
    return value


def _init_by_name(init: Any, names: list[str]) -> dict[str, Any]:
    """Initial values of each name."""
    if not isinstance(init, Mapping):
        return dict.fromkeys(names, init)
    if missing := [n for n in names if not isinstance(init.get(n), Prefix)]:
        msg = f"init: expected a prefix for every name of data, got none for {missing[:5]}"
        raise ConfigError(msg)
    return {n: init[n] for n in names}
