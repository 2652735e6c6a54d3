"""YAML with numbers as its version 1.2 has them."""

from __future__ import annotations

import re
from typing import Any

from prefixfast.errors import ConfigError


def read_yaml(text: str) -> Any:
    """The value of a YAML text, with ``1e-3`` a number as in YAML 1.2 (PyYAML's 1.1 takes it for a word).

    Raises:
        ConfigError: If it is no YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as e:
        raise ConfigError(str(e)) from e
