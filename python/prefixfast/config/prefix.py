"""`PrefixConfig`, the options that say what is learned."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, Unpack

from prefixfast.config.fields import PrefixConfigFields
from prefixfast.config.json_types import JSON
from prefixfast.config.options import COUNT, COUNT_OR_ZERO, INT32_MAX, Options, Range, option, plain_number
from prefixfast.config.sites import SITE_NAMES, SITES, BySite, Site, one_or_by_site
from prefixfast.errors import ConfigError, shown


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(Options):
    """Options that say what is learned.

    ``prefix_length`` and ``layers`` are one value for each site, or a mapping from the site to its value. A mapping of
    lengths names the sites that are trained. ``sites`` is one site or a sequence of sites, ``layers`` any sequence.

    Example:
        >>> PrefixConfig(prefix_length=5, reparameterization="mlp").encoder_hidden_size
        512
        >>> PrefixConfig(layers=[2, 1]).layers
        (1, 2)
        >>> PrefixConfig(prefix_length={"self": 20, "enc": 50}).sites
        ('enc', 'self')
    """

    prefix_length: int | Literal["text"] | BySite[int] = option(
        10,
        "number of prefix rows P, each one key and one value in every layer, for each site or by site; 'text' is the "
        "number of tokens of the init text",
        COUNT,
    )
    reparameterization: Literal["auto", "none", "mlp"] = option(
        "auto",
        "parameters that are trained: 'none' the keys and values themselves, 'mlp' an MLP that computes them; 'auto' "
        "is mlp for init random or zero, else none",
    )
    sites: tuple[Site, ...] | None = option(
        None,
        "kinds of attention that get a prefix, 'enc' (encoder self-attention), 'self' (decoder self-attention) and "
        "'cross' (cross-attention); decoder-only base models have 'self' alone; None is all of the base model",
    )
    layers: tuple[int, ...] | BySite[tuple[int, ...]] | None = option(
        None,
        "numbers of the layers that get a prefix, from 0, for each site or by site; attention of other layers sees no "
        "prefix; None is all",
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
        if self.sites is not None:
            object.__setattr__(self, "sites", _sites("sites", self.sites))
        length: Any = self.prefix_length
        if isinstance(length, Mapping):
            named = _sites("prefix_length", length)
            if self.sites not in (None, named):
                expected = f"the sites of sites={self.sites!r}"
                msg = f"PrefixConfig.prefix_length: expected a length for each of {expected}, got {shown(dict(length))}"
                raise ConfigError(msg)
            lengths = BySite({site: _length(site, length[site]) for site in named})
            object.__setattr__(self, "prefix_length", one_or_by_site(lengths))
            object.__setattr__(self, "sites", named)
        layers: Any = self.layers
        if isinstance(layers, Mapping):
            by_site = BySite({site: _layers(layers[site]) for site in _sites("layers", layers)})
            object.__setattr__(self, "layers", by_site)
        elif layers is not None:
            object.__setattr__(self, "layers", _layers(layers))
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

    def sites_of(self, base: Iterable[Site]) -> tuple[Site, ...]:
        """Sites of a base model that get a prefix.

        Args:
            base: Sites that the base model has.

        Returns:
            The sites of the options in the order of `SITES`.

        Raises:
            ConfigError: If the base model does not have one of the sites.

        Example:
            >>> PrefixConfig(sites=["self", "enc"]).sites_of(("enc", "self", "cross"))
            ('enc', 'self')
        """
        has = tuple(site for site in SITES if site in set(base))
        named = [("sites", self.sites or ()), ("layers", tuple(self.layers) if isinstance(self.layers, BySite) else ())]
        for name, sites in named:
            if wrong := [site for site in sites if site not in has]:
                kind = "is decoder-only" if has == ("self",) else f"has the sites {', '.join(has)}"
                msg = (
                    f"PrefixConfig.{name}: expected {' or '.join(map(repr, has))}, got {wrong[0]!r} "
                    f"({SITE_NAMES[wrong[0]]}); this base {kind}"
                )
                raise ConfigError(msg)
        return has if self.sites is None else self.sites

    def length_at(self, site: Site) -> int:
        """Number of prefix rows of a site, once ``"text"`` is resolved.

        Args:
            site: Site.

        Returns:
            Number of rows, 0 for a site without a prefix.
        """
        if isinstance(self.prefix_length, BySite):
            return self.prefix_length.get(site, 0)
        assert isinstance(self.prefix_length, int)
        return self.prefix_length if self.sites is None or site in self.sites else 0

    def lengths(self, base: Iterable[Site]) -> BySite[int]:
        """Number of prefix rows of each site that gets a prefix, once ``"text"`` is resolved.

        Args:
            base: Sites that the base model has.

        Raises:
            ConfigError: If the base model does not have one of the sites.
        """
        return BySite({site: self.length_at(site) for site in self.sites_of(base)})

    def layers_at(self, site: Site) -> tuple[int, ...] | None:
        """Layers of a site that get a prefix.

        Args:
            site: Site.

        Returns:
            Numbers of the layers in their stack, None for all of them.
        """
        return self.layers.get(site) if isinstance(self.layers, BySite) else self.layers

    def validate(self) -> None:
        """Raise `ConfigError` for values out of range, and for values that exclude each other."""
        length = self.prefix_length
        lengths = tuple(length.values()) if isinstance(length, BySite) else (length,)
        if (fewest := min((n for n in lengths if isinstance(n, int)), default=None)) and self.frozen_rows >= fewest:
            most = f"prefix_length {fewest}"
            msg = f"PrefixConfig.frozen_rows: expected fewer than {most}, got {self.frozen_rows}"
            raise ConfigError(msg)
        if self.sites is not None and isinstance(self.layers, BySite) and (more := set(self.layers) - {*self.sites}):
            expected, got = f"layers of the sites {', '.join(self.sites)}", ", ".join(sorted(more))
            msg = f"PrefixConfig.layers: expected {expected}, got layers of {got}"
            raise ConfigError(msg)
        if self.position == "infix" and self.sites not in (None, ("self",)):
            msg = f"PrefixConfig.sites: expected 'self' alone beside position='infix', got {self.sites!r}"
            raise ConfigError(msg)
        if self.fit_steps and self.reparameterization != "mlp":
            got = self.reparameterization
            msg = f"PrefixConfig.fit_steps: expected reparameterization='mlp' beside it, got '{got}'"
            raise ConfigError(msg)


def _sites(name: str, given: Any) -> tuple[Site, ...]:
    """Sites in the order of `SITES`, from one site, a sequence of sites or the keys of a mapping by site."""
    named = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not named or not all(isinstance(s, str) and s in SITES for s in named) or len(set(named)) != len(named):
        expected = f"at least one of the sites {', '.join(map(repr, SITES))}, each once"
        msg = f"PrefixConfig.{name}: expected {expected}, got {shown(given)}"
        raise ConfigError(msg)
    return tuple(site for site in SITES if site in named)


def _length(site: Site, given: Any) -> int:
    """Number of rows of one site from a mapping of lengths."""
    number = plain_number(given)
    wrong = "a number of rows" if type(number) is not int else COUNT.expected(number)
    if wrong:
        msg = f"PrefixConfig.prefix_length: expected {wrong} for site {site!r}, got {shown(given)}"
        raise ConfigError(msg)
    return int(number)


def _layers(given: Any) -> tuple[int, ...]:
    """Layer numbers in ascending order, from a list, a tuple, a range or an array."""
    try:
        if isinstance(given, str) or any(isinstance(i, bool) for i in given):
            raise TypeError
        numbers = sorted(operator.index(i) for i in given)
    except (TypeError, ValueError):
        numbers = []
    if not numbers or numbers[0] < 0 or numbers[-1] > INT32_MAX or len(set(numbers)) != len(numbers):
        expected = "a list of at least one layer number, from 0 and each once"
        msg = f"PrefixConfig.layers: expected {expected}, got {shown(given)}"
        raise ConfigError(msg)
    return tuple(numbers)
