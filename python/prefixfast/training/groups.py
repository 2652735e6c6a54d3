"""Who is trained in a run: one prefix for each name, or for each variant of a sweep, grouped by what prefixes in one batch must share."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefixfast.config import PrefixConfig, TrainConfig, unknown_option
from prefixfast.errors import ConfigError
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.inputs import Settings

# Options that each prefix of a batch may have its own value of.
PER_PREFIX = (
    "learning_rate", "seed", "num_train_epochs", "max_steps", "batch_size", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "shuffle",
    "early_stopping_patience",
)  # fmt: skip
FIXED = (
    "recipe",
    "dtype",
    "report_to",
    "save_steps",
    "logging_steps",
    "token_budget",
    "gradient_checkpointing",
)  # of the run, not of a variant


@dataclass(frozen=True)
class Member:
    """One prefix of a run.

    Attributes:
        name: Its name in the result.
        source: The name whose rows it learns from.
        config: How it is trained.
        init: ``"text"``, ``"random"``, ``"zero"`` or a `Prefix`.
        variant: The fields that a sweep gave it.
    """

    name: str
    source: str
    config: TrainConfig
    init: Any
    variant: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Prefixes that are trained in the same batches.

    Attributes:
        config: What they share of how they are trained.
        prefix_config: What is learned.
        mlp: Whether through the network.
        members: The prefixes.
    """

    config: TrainConfig
    prefix_config: PrefixConfig
    mlp: bool
    members: tuple[Member, ...]


def make_groups(
    names: Iterable[str],
    settings: Settings,
    *,
    overrides: Any = None,
    sweep: Any = None,
    single: bool,
    known: Iterable[str] = (),
) -> list[Group]:
    """The prefixes of a run, grouped.

    Args:
        names: Of the data, in order.
        settings: Options of all.
        overrides: By name, fields of `PER_PREFIX` with values of its own.
        sweep: By field (or ``init``) a sequence of values; every combination is a prefix of its own for each name.
        single: Plain rows: variants need no name before them.
        known: Names that may stand in ``overrides`` though their rows could not be read.

    Raises:
        ConfigError: For unknown names or fields, and wrong values.
    """
    names = list(names)
    own = _overrides(overrides, {*names, *known})
    if single and own:
        msg = "overrides: expected data by name beside it, got plain rows; give the options themselves"
        raise ConfigError(msg)
    inits = _inits(settings.init, names)
    found: dict[Any, list[Member]] = {}
    shared: dict[Any, tuple[TrainConfig, PrefixConfig, bool]] = {}
    variants = _variants(sweep)
    for name, (label, variant) in itertools.product(names, variants.items()):
        fields = own.get(name, {}) | {k: v for k, v in variant.items() if k != "init"}
        init = variant.get("init", inits[name])
        prefix_config = PrefixConfig.make(
            settings.prefix_config, **{k: v for k, v in fields.items() if k in PrefixConfig.names()}
        )
        common = TrainConfig.make(
            settings.config, **{k: v for k, v in fields.items() if k in TrainConfig.names() and k not in PER_PREFIX}
        )
        config = TrainConfig.make(common, **{k: v for k, v in fields.items() if k in PER_PREFIX})
        by_network = prefix_config.reparameterization == "auto" and init in ("random", "zero")
        kind = (common, prefix_config, prefix_config.reparameterization == "mlp" or by_network)
        shared[kind] = kind
        full = label if single and label else f"{name},{label}" if label else name
        found.setdefault(kind, []).append(Member(full, name, config, init, variant))
    return [Group(*shared[kind], tuple(members)) for kind, members in found.items()]


def _overrides(overrides: Any, names: set[str]) -> dict[str, dict[str, Any]]:
    for name, fields in (_mapping(overrides, "overrides") if overrides is not None else {}).items():
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            msg = f"overrides: no prefix is named {name!r}" + (
                f"; did you mean {close[0]!r}?" if close else "; expected names of data"
            )
            raise ConfigError(msg)
        for option in _mapping(fields, f"overrides[{name!r}]"):
            if option not in PER_PREFIX:
                raise ConfigError(unknown_option(str(option), PER_PREFIX, f"overrides[{name!r}]"))
    return {str(name): dict(fields) for name, fields in (overrides or {}).items()}


def _variants(sweep: Any) -> dict[str, dict[str, Any]]:
    """Every combination by its label; without a sweep one without a label."""
    if sweep is None:
        return {"": {}}
    known = tuple(n for n in (*TrainConfig.names(), *PrefixConfig.names(), "init") if n not in FIXED)
    for name, values in _mapping(sweep, "sweep").items():
        if name not in known:
            raise ConfigError(unknown_option(str(name), known, "sweep"))
        if isinstance(values, str) or not isinstance(values, Iterable) or not list(values):
            msg = f"sweep[{name!r}]: expected a sequence of values, got {values!r:.80}"
            raise ConfigError(msg)
    if not sweep:
        msg = "sweep: expected at least one field, got none"
        raise ConfigError(msg)
    combinations = [
        dict(zip(sweep, values, strict=True)) for values in itertools.product(*(list(v) for v in sweep.values()))
    ]
    labelled = {",".join(f"{k}={_label(v)}" for k, v in c.items()): c for c in combinations}
    if len(labelled) != len(combinations):
        msg = f"sweep: expected different values, got one twice in {dict(sweep)!r:.200}"
        raise ConfigError(msg)
    return labelled


def _label(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return value.digest[:8] if isinstance(value, Prefix) else f"{value:g}" if isinstance(value, float) else str(value)


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        msg = f"{what}: expected a mapping, got {type(value).__name__}"
        raise ConfigError(msg)
    return value


def _inits(init: Any, names: list[str]) -> dict[str, Any]:
    """Where each name starts."""
    if not isinstance(init, Mapping):
        return dict.fromkeys(names, init)
    if missing := [n for n in names if not isinstance(init.get(n), Prefix)]:
        msg = f"init: expected a prefix for every name of data, got none for {missing[:5]}"
        raise ConfigError(msg)
    return {n: init[n] for n in names}
