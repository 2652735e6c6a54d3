"""The compared methods, with the options of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from prefixfast.config.fields import MethodName
from prefixfast.config.sites import SITES
from prefixfast.errors import ConfigError, did_you_mean, shown
from prefixfast.io.yaml import read_yaml

# Names with options of their own, beside the methods themselves.
VARIANTS: dict[str, dict[str, Any]] = {
    "prefix-mlp": {"method": "prefix", "init": "random", "reparameterization": "mlp"},
    "prefix-random": {"method": "prefix", "init": "random", "reparameterization": "none"},
    **{f"prefix-{site}": {"method": "prefix", "sites": site} for site in SITES},
    "adapter-0.1": {"method": "adapter", "adapter_size": 0.001},
}
METHOD_NAMES: tuple[str, ...] = get_args(MethodName)
NAMES = (*METHOD_NAMES, *VARIANTS)
ARGUMENTS = ("init", "init_text")  # of `train`, beside the fields of the option classes
WORDS = ("text", "random", "zero")


@dataclass(frozen=True)
class Variant:
    """A method with options.

    Attributes:
        name: Name of the method or of one of the `VARIANTS`.
        given: Options that the user gave for it, by name.
    """

    name: str
    given: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Name with the options that the user gave."""
        options = ", ".join(f"{k}={v}" for k, v in sorted(self.given.items()))
        return f"{self.name} ({options})" if options else self.name

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `train`."""
        return {**VARIANTS.get(self.name, {"method": self.name}), **self.given}


def read_variants(names: str, settings: Sequence[str]) -> list[Variant]:
    """Variants of the words of a command line.

    Args:
        names: Names with commas between them.
        settings: Options as NAME.OPTION=VALUE, with values as in YAML.

    Raises:
        ConfigError: If a name is unknown or given twice, or an option belongs to none of the names.
    """
    found = [name.strip() for name in names.split(",")]
    for name in found:
        if name not in NAMES or found.count(name) > 1:
            hint = did_you_mean(name, NAMES) if name not in NAMES else ""
            msg = f"--methods: expected different names of {', '.join(NAMES)}, got {shown(name)}"
            raise ConfigError(f"{msg}; {hint}" if hint else msg)
    given: dict[str, dict[str, Any]] = {name: {} for name in found}
    for word in settings:
        name, option, value = _split(word, found)
        if option in given[name]:
            msg = f"--set: expected each option once, got {shown(f'{name}.{option}')} twice"
            raise ConfigError(msg)
        given[name][option] = value
    return [Variant(name, given[name]) for name in found]


def _split(word: str, names: Sequence[str]) -> tuple[str, str, Any]:
    """Name, option and value of NAME.OPTION=VALUE."""
    left, sep, text = word.partition("=")
    name, dot, option = left.rpartition(".")  # a name may hold a dot, an option does not
    option = option.replace("-", "_")
    if not (sep and dot and option and text):
        msg = f"--set: expected METHOD.OPTION=VALUE, got {shown(word)}"
        raise ConfigError(msg)
    if name not in names:
        msg = f"--set: expected one of the compared methods {', '.join(names)}, got {shown(name)}"
        raise ConfigError(msg)
    if option in ("method", "seed"):
        other = "--methods" if option == "method" else "--seeds"
        msg = f"--set: expected an option of {name}, got {option}, which {other} sets"
        raise ConfigError(msg)
    value = read_yaml(text)
    if option == "init" and value not in WORDS:
        msg = f"--set {name}.init: expected one of {', '.join(WORDS)}, got {shown(value)}"
        raise ConfigError(msg)
    return name, option, value
