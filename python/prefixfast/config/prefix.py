"""`PrefixConfig`, the options that say what is learned."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, Unpack

from prefixfast.config.fields import PrefixConfigFields
from prefixfast.config.json_types import JSON
from prefixfast.config.options import COUNT, COUNT_OR_ZERO, INT32_MAX, Options, Range, option
from prefixfast.errors import ConfigError, shown


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(Options):
    """Options that say what is learned.

    The constructor also takes ``prefix_length`` as a mapping from the site, ``{"self": 10}``, and ``sites`` and
    ``layers`` as any sequence.

    Example:
        >>> PrefixConfig(prefix_length=5, reparameterization="mlp").encoder_hidden_size
        512
        >>> PrefixConfig(layers=[2, 1]).layers
        (1, 2)
    """

    prefix_length: int | Literal["text"] = option(
        10,
        "number of prefix rows P, each one key and one value in every layer; 'text' is the number of tokens of the "
        "init text",
        COUNT,
    )
    reparameterization: Literal["auto", "none", "mlp"] = option(
        "auto",
        "parameters that are trained: 'none' the keys and values themselves, 'mlp' an MLP that computes them; 'auto' "
        "is mlp for init random or zero, else none",
    )
    sites: tuple[str, ...] | None = option(
        None, "kinds of attention that get a prefix; decoder-only base models have one, 'self'; None is all"
    )
    layers: tuple[int, ...] | None = option(
        None, "numbers of the layers that get a prefix, from 0; attention of other layers sees no prefix; None is all"
    )
    encoder_hidden_size: int = option(512, "hidden width of the reparameterization MLP", Range(1, 2**20))
    embedding_dim: int | None = option(
        None, "input width of the reparameterization MLP; None is the width of a layer's keys", Range(1, 2**20)
    )
    prefix_dropout: float = option(
        0.0,
        "share of the keys and values of a prefix that are dropped in training, from 0 to 0.999",
        Range(0, 0.999),
    )
    frozen_rows: int = option(
        0, "number of leading prefix rows that training leaves at their initial values", COUNT_OR_ZERO
    )
    fit_steps: int = option(
        0,
        "number of Adam steps that fit the MLP to the initial keys and values before training, as Li & Liang do; with "
        "0 the output of the MLP, which is zero at the start, is added to the initial values (init random has none: "
        "its MLP starts with random weights)",
        COUNT_OR_ZERO,
    )
    pos_start: Literal["after", "zero"] = option(
        "after", "position of the first token: 'after' is P, as in PEFT, and 'zero' is 0"
    )
    position: Literal["prefix", "infix"] = option(
        "prefix",
        "place of the prefix: 'prefix' is before the first token, 'infix' before the last prompt token, where earlier "
        "tokens do not see it",
    )

    def __post_init__(self) -> None:
        length: Any = self.prefix_length
        if isinstance(length, Mapping):
            object.__setattr__(self, "prefix_length", length[_site("prefix_length", length)])
        if self.sites is not None:
            object.__setattr__(self, "sites", (_site("sites", self.sites),))
        if self.layers is not None:
            object.__setattr__(self, "layers", _layers(self.layers))
        super().__post_init__()

    @classmethod
    def make(cls, config: Self | Mapping[str, JSON] | None = None, **fields: Unpack[PrefixConfigFields]) -> Self:
        """Make a `PrefixConfig` from another one or from a mapping, with some fields replaced.

        Args:
            config: `PrefixConfig` or mapping of field names to values. None takes the defaults.
            fields: Fields of `PrefixConfig`, which take precedence over ``config``.

        Returns:
            A new `PrefixConfig`.

        Raises:
            ConfigError: If a name is unknown or a value is wrong.
        """
        return cls._replaced(config, fields)

    @property
    def length(self) -> int:
        """``prefix_length``, for objects in which it is a number."""
        assert isinstance(self.prefix_length, int)
        return self.prefix_length

    def validate(self) -> None:
        """Raise `ConfigError` for values out of range, and for values that exclude each other."""
        if isinstance(self.prefix_length, int) and self.frozen_rows >= self.prefix_length:
            most = f"prefix_length {self.prefix_length}"
            msg = f"PrefixConfig.frozen_rows: expected fewer than {most}, got {self.frozen_rows}"
            raise ConfigError(msg)
        if self.fit_steps and self.reparameterization != "mlp":
            got = self.reparameterization
            msg = f"PrefixConfig.fit_steps: expected reparameterization='mlp' beside it, got '{got}'"
            raise ConfigError(msg)


def _site(name: str, given: Any) -> str:
    """Name of the only site of decoder-only base models, from a sequence of sites or a mapping by site."""
    if not isinstance(given, list | tuple | Mapping) or list(given) != ["self"]:
        msg = f"PrefixConfig.{name}: expected the site 'self' alone (base models are decoder-only), got {shown(given)}"
        raise ConfigError(msg)
    return "self"


def _layers(given: Any) -> tuple[int, ...]:
    """Layer numbers in ascending order, from a list, a tuple, a range or an array."""
    try:
        if isinstance(given, str) or any(isinstance(i, bool) for i in given):
            raise TypeError
        numbers = sorted(operator.index(i) for i in given)
    except (TypeError, ValueError):
        numbers = []
    if not numbers or numbers[0] < 0 or numbers[-1] > INT32_MAX or len(set(numbers)) != len(numbers):
        msg = f"PrefixConfig.layers: expected at least one layer number, from 0 and each once, got {shown(given)}"
        raise ConfigError(msg)
    return tuple(numbers)
