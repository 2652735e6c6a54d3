"""YAML with the numbers of YAML 1.2."""

from __future__ import annotations

import re
from typing import Any

from prefixfast.errors import ConfigError


def read_yaml(text: str) -> Any:
    """Parse a YAML text; ``1e-3`` is a number as in YAML 1.2, where PyYAML's YAML 1.1 has a string.

    Raises:
        ConfigError: If the text is not YAML.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    try:
        return yaml.load(text, Loader)  # safe: Loader is a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # a number of 5,000 digits, deep nesting
        raise ConfigError(str(e)) from e
