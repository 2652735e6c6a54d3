"""`PrefixConfig`: what is learned."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefixfast.config.options import Options, at_least, option
from prefixfast.errors import ConfigError


def _site(name: str, given: Any) -> str:
    """The one site of the bases that there are, from a sequence of it or a mapping by it."""
    if not isinstance(given, list | tuple | Mapping) or list(given) != ["self"]:
        msg = f"PrefixConfig.{name}: expected the site 'self' alone (there are decoder-only bases only), got {given!r:.80}"
        raise ConfigError(msg)
    return "self"


def _layers(given: Any) -> tuple[int, ...]:
    """Numbers of layers in order, from any sequence of them (a list, a tuple, a range, an array)."""
    try:
        if isinstance(given, str) or any(isinstance(i, bool) for i in given):
            raise TypeError
        numbers = sorted(operator.index(i) for i in given)
    except TypeError:
        numbers = []
    if not numbers or numbers[0] < 0 or len(set(numbers)) != len(numbers):
        msg = f"PrefixConfig.layers: expected numbers of layers from 0, each once, at least one, got {given!r:.80}"
        raise ConfigError(msg)
    return tuple(numbers)


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(Options):
    """What is learned. ``prefix_length`` may also be a mapping of the site to it, ``{"self": 10}``.

    Example:
        >>> PrefixConfig(prefix_length=5, reparameterization="mlp").encoder_hidden_size
        512
        >>> PrefixConfig(layers=[2, 1]).layers
        (1, 2)
    """

    prefix_length: int | Literal["text"] = option(
        10, "rows of keys and values learned for each of the layers (P); 'text': as many as the init text has tokens"
    )
    reparameterization: Literal["auto", "none", "mlp"] = option(
        "auto",
        "'none' trains the keys and values themselves, 'mlp' the network that makes them; 'auto': mlp for init random or zero, else none",
    )
    sites: tuple[str, ...] | None = option(
        None, "kinds of attention that get a prefix; a decoder-only base has one, 'self'. By default all of the base's"
    )
    layers: tuple[int, ...] | None = option(
        None, "layers that get a prefix, numbered from 0; the others see their own tokens only. By default all of them"
    )
    encoder_hidden_size: int = option(512, "width of the reparameterization MLP")
    embedding_dim: int | None = option(None, "width of the MLP's input; by default that of a layer's keys")
    prefix_dropout: float = option(0.0, "share of the prefix's keys and values dropped in training")
    frozen_rows: int = option(0, "first rows of the prefix that keep the values they start with")
    fit_steps: int = option(
        0,
        "steps of Adam that fit the MLP to the init's keys and values, as the paper does; 0: it starts as exactly these",
    )
    pos_start: Literal["after", "zero"] = option(
        "after", "position of the first token: after the prefix (P, as PEFT) or zero"
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

    @property
    def length(self) -> int:
        """``prefix_length`` once it is a number."""
        assert isinstance(self.prefix_length, int)
        return self.prefix_length

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work."""
        at_least(
            self, prefix_length=1, encoder_hidden_size=1, embedding_dim=1, prefix_dropout=0, frozen_rows=0, fit_steps=0
        )
        if self.prefix_dropout >= 1:
            msg = f"PrefixConfig.prefix_dropout: expected less than 1, got {self.prefix_dropout!r}"
            raise ConfigError(msg)
        if isinstance(self.prefix_length, int) and self.frozen_rows >= self.prefix_length:
            msg = f"PrefixConfig.frozen_rows: expected fewer than prefix_length {self.prefix_length}, got {self.frozen_rows!r}"
            raise ConfigError(msg)
        if self.fit_steps and self.reparameterization != "mlp":
            msg = (
                f"PrefixConfig.fit_steps: expected reparameterization='mlp' beside it, got {self.reparameterization!r}"
            )
            raise ConfigError(msg)
