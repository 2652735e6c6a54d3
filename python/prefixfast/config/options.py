"""`Options`, the base class of the option dataclasses: checked construction, and unknown names are errors with a hint.

The help text of a field is in the field's metadata. The command line's help and docs/api.md are made from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError

# Names of other libraries, and the option here that does the same.
HINTS = {
    "num_virtual_tokens": "prefix_length",
    "prefix_projection": "reparameterization='mlp'",
    "per_device_train_batch_size": "batch_size (examples of each prefix in one optimizer step)",
    "gradient_accumulation_steps": "token_budget (a batch that exceeds it is accumulated)",
    "epochs": "num_train_epochs",
    "eval_strategy": "eval_steps",
    "load_best_model_at_end": "metric_for_best_model",
    "lr": "learning_rate",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "beam_size": "num_beams",
    "attn_implementation": "backend",
}


_TYPES: dict[str, dict[str, Any]] = {}  # types of the fields by class: to resolve them takes longer than all checks


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and a help text.

    Args:
        default: Default value of the field.
        help: Help text for the command line and the documentation.
    """
    return dataclasses.field(default=default, metadata={"help": help})


class Options:
    """Base class of the option dataclasses, with checked construction and updates."""

    def __post_init__(self) -> None:
        owner = type(self).__name__
        types = _TYPES.get(owner) or _TYPES.setdefault(owner, get_type_hints(type(self)))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            _check_type(owner, field.name, getattr(self, field.name), types[field.name])
        self.validate()

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the fields."""
        return tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def make(cls, config: Self | Mapping[str, JSON] | None = None) -> Self:
        """Make an options object from another one or from a mapping.

        Args:
            config: Options object or mapping of field names to values. None takes the defaults.

        Returns:
            A new options object.

        Raises:
            ConfigError: If a name is unknown or a value is wrong.
        """
        return cls._replaced(config, {})

    @classmethod
    def _replaced(cls, config: Self | Mapping[str, JSON] | None, fields: Mapping[str, object]) -> Self:
        """``config`` with the values of ``fields`` in place of its own."""
        if isinstance(config, cls):
            base: dict[str, Any] = {n: getattr(config, n) for n in cls.names()}
        elif config is None or isinstance(config, Mapping):
            base = dict(config or {})
        else:
            msg = f"config: expected a {cls.__name__} or a mapping, got {type(config).__name__}"
            raise ConfigError(msg)
        merged = base | dict(fields)
        for name in merged:
            if name not in cls.names():
                raise ConfigError(unknown_option(str(name), cls.names(), cls.__name__))
        return cls(**merged)


def unknown_option(name: str, known: tuple[str, ...], what: str) -> str:
    """Error message for an unknown option, with the most similar known option.

    Args:
        name: Unknown name.
        known: Names of the options that exist.
        what: Name of the options object or function that got the name.
    """
    hint = HINTS.get(name)
    if hint is None or hint.split("=")[0].split(" ")[0] not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = close[0] if close else None
    return f"{what}: unknown option {name!r}; " + (f"did you mean {hint}?" if hint else f"known are {', '.join(known)}")


def _check_type(owner: str, name: str, value: Any, hint: Any) -> None:
    """Raise `ConfigError` if a value does not have the type ``hint``; elements of tuples are not checked."""
    options = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    for kind in options or (hint,):
        if get_origin(kind) is Literal:
            if value in get_args(kind) and not (
                isinstance(value, bool) ^ any(isinstance(a, bool) for a in get_args(kind) if a == value)
            ):
                return
        elif kind is type(None):
            if value is None:
                return
        elif kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                return
        elif get_origin(kind) is tuple:
            if isinstance(value, tuple):
                return
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return
    shown = " | ".join(
        repr(a) if get_origin(k) is Literal else getattr(k, "__name__", str(k))
        for k in options or (hint,)
        for a in (get_args(k) or (k,))
    )
    msg = f"{owner}.{name}: expected {shown}, got {value!r}"
    raise ConfigError(msg)


def at_least(owner: Options, **limits: float) -> None:
    """Raise `ConfigError` for a field that is a number below its limit; fields that are None or a string pass."""
    for name, limit in limits.items():
        value = getattr(owner, name)
        if not isinstance(value, str | None) and value < limit:
            msg = f"{type(owner).__name__}.{name}: expected at least {limit:g}, got {value!r}"
            raise ConfigError(msg)
