"""YAML with the numbers of YAML 1.2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prefixfast.errors import ConfigError, PrefixFastError
from prefixfast.io.untrusted import file_size


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


def read_yaml_file(path: Path, what: str) -> Any:
    """Parse a YAML file.

    Args:
        path: Path of a regular file; a pipe would be waited for.
        what: Description of the file in the error's message.

    Raises:
        ConfigError: If the file cannot be read, or is not YAML.
    """
    try:
        file_size(path)
        return read_yaml(path.read_text(encoding="utf8"))
    except (OSError, ValueError, PrefixFastError) as e:
        msg = f"{what}: cannot be read: {e}"
        raise ConfigError(msg) from e
