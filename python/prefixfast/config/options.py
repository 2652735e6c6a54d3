"""`Options`, the base class of the option dataclasses: checked construction, and unknown names are errors with a hint.

The help text and the range of a field are in the field's metadata. The command line's help and docs/api.md are made
from the help text.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from prefixfast.config.hints import HINTS
from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError, shown

EXACT = 2**53  # integers up to this size are numbers of fp64
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1
FP32_MAX, FP32_TINY = 3.4028234663852886e38, 1.1754943508222875e-38  # largest and smallest normal number of fp32

_TYPES: dict[str, dict[str, Any]] = {}  # types of the fields by class: to resolve them takes longer than all checks


@dataclasses.dataclass(frozen=True)
class Range:
    """Range of an option, whose numbers all fit the tensors that take them.

    Attributes:
        low: Smallest number.
        high: Largest number.
        above: Whether ``low`` itself is excluded.
        below: Whether ``high`` itself is excluded.
        advice: Text after the limit in the error for a number below ``low``.
    """

    low: float
    high: float
    above: bool = False
    below: bool = False
    advice: str = ""

    def expected(self, value: float) -> str | None:
        """Description of the range in place of a number, None for a number in the range."""
        if not (value > self.low if self.above else value >= self.low):
            return f"{'more than' if self.above else 'at least'} {_digits(self.low)}{self.advice}"
        if not (value < self.high if self.below else value <= self.high):
            return f"{'less than' if self.below else 'at most'} {_digits(self.high)}"
        if isinstance(value, float) and 0 < abs(value) < FP32_TINY:
            return f"0 or a size of at least {FP32_TINY:.3g}, the smallest number of fp32"
        return None


def _digits(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


COUNT = Range(1, INT32_MAX)  # a number of things, at least one
COUNT_OR_ZERO = Range(0, INT32_MAX)
BYTES = Range(1, INT64_MAX)
SEED = Range(0, 2**62 - 1)


def option(default: Any, help: str, within: Range | None = None) -> Any:
    """A dataclass field with a default and a help text.

    Args:
        default: Default value of the field.
        help: Help text for the command line and the documentation.
        within: Range of the field's numbers, which every field with numbers has.
    """
    return dataclasses.field(default=default, metadata={"help": help, "within": within})


class Options:
    """Base class of the option dataclasses, with checked construction and updates.

    Attributes:
        argument: Name of the argument that takes an object of the class, for errors. None if only its fields are
            arguments, of `train`.
    """

    argument: ClassVar[str | None] = "config"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        types = _TYPES.get(owner) or _TYPES.setdefault(owner, get_type_hints(type(self)))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            given = getattr(self, field.name)
            value = plain_number(given)
            if type(value) is int and not -EXACT <= value <= EXACT and types[field.name] in (float, float | None):
                value = _as_float(value)  # tensors take integers of 64 bits only
            if value is not given:
                object.__setattr__(self, field.name, value)
            _check_type(owner, field.name, value, types[field.name])
            within: Range | None = field.metadata["within"]
            if within is not None and isinstance(value, int | float):
                self._check(field.name, within.expected(value))
        self.validate()

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work."""

    def _check(self, name: str, expected: str | None) -> None:
        """Raise `ConfigError` if something else than the value of a field was expected."""
        if expected is not None:
            msg = f"{type(self).__name__}.{name}: expected {expected}, got {shown(getattr(self, name))}"
            raise ConfigError(msg)

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
            msg = f"{cls.argument or cls.__name__}: expected a {cls.__name__} or a mapping, got {type(config).__name__}"
            raise ConfigError(msg)
        merged = base | dict(fields)
        for name in merged:
            if name not in cls.names():
                raise ConfigError(unknown_option(name, cls.names(), cls.__name__))
        return cls(**merged)


def unknown_option(name: object, known: tuple[str, ...], what: str) -> str:
    """Error message for an unknown option, with the most similar known options.

    Args:
        name: Unknown name.
        known: Names of the options that exist.
        what: Name of the options object or function that got the name.
    """
    text = name if isinstance(name, str) else str(shown(name))
    hint = HINTS.get(text)
    if hint is not None and hint.split("=")[0].split(" ")[0] not in known:
        hint = None
    owners = [
        f"an option of {c.__name__}" if c.argument else "a keyword argument of train"
        for c in Options.__subclasses__()
        if text in c.names()
    ]
    if hint is None and not owners:
        hint = " or ".join(difflib.get_close_matches(text, known, n=3)) or None
    if hint is not None:
        advice = f"did you mean {hint}?"
    elif owners:
        advice = f"it is {' and '.join(owners)}"
    else:
        advice = f"known are {', '.join(known)}"
    return f"{what}: unknown option {shown(text)}; {advice}"


def plain_number(value: Any) -> Any:
    """A number of numpy or of another type as Python's int or float; other values, booleans included, unchanged."""
    if type(value) in (int, float, bool, str, tuple, type(None)) or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _as_float(value)
    return str(value) if isinstance(value, str) else value


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _check_type(owner: str, name: str, value: Any, hint: Any) -> None:
    """Raise `ConfigError` if a value does not have the type ``hint``; elements of containers are not checked."""
    options = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    for kind in options or (hint,):
        if get_origin(kind) is Literal:
            if any(isinstance(value, type(a)) and value == a for a in get_args(kind)):
                return
        elif kind is type(None):
            if value is None:
                return
        elif kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return
        elif get_origin(kind) is not None:
            if isinstance(value, get_origin(kind)):
                return
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return
    expected = " | ".join(
        repr(a) if get_origin(k) is Literal else getattr(k, "__name__", str(k))
        for k in options or (hint,)
        for a in (get_args(k) or (k,))
    )
    msg = f"{owner}.{name}: expected {expected}, got {shown(value)}"
    raise ConfigError(msg)
