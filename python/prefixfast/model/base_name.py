"""`check_base_name`, the check that a base model exists where its name says. It imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefixfast.errors import ConfigError, DataError, did_you_mean, shown
from prefixfast.io.paths import as_path
from prefixfast.io.untrusted import read_json

EXPECTED = "a hub id, the folder of a model or a .gguf file"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PREFIX_FILE, ADAPTER_FILE = "prefixfast.json", "adapter_config.json"
MODEL_FILES = ("config.json", ADAPTER_FILE)  # transformers loads the base of an adapter, and the adapter into it


def check_base_name(model: str | Path, *, local_files_only: bool = False) -> None:
    """Check that a hub id, folder or file can be one of a base model. A hub id is only looked up in the local cache.

    Args:
        model: Name as the user gave it.
        local_files_only: Whether a hub id must be in the local cache.

    Raises:
        ConfigError: If there is no such folder or file, or it holds something else.
    """
    path, text = as_path("model", model), str(model)
    if path.is_dir():
        if reason := _not_a_model(path):
            msg = f"model: expected {EXPECTED}, got the folder {shown(text)}, {reason}"
            raise ConfigError(msg)
    elif path.exists() and path.suffix.lower() != ".gguf":
        msg = f"model: expected {EXPECTED}, got the file {shown(text)}; the base comes before the data"
        raise ConfigError(msg)
    elif not path.exists() and not (isinstance(model, str) and HUB_ID.fullmatch(text) and path.suffix != ".gguf"):
        hint = did_you_mean(path.name, _neighbours(path))
        msg = f"model: expected {EXPECTED}, got {shown(text)}: there is no such folder or file"
        raise ConfigError(f"{msg}; {hint}" if hint else msg)
    elif not path.exists() and (local_files_only or _is_offline()) and not _is_cached(text):
        why = "local_files_only was asked for" if local_files_only else "HF_HUB_OFFLINE is set"
        msg = (
            f"model: {shown(text)} is neither a folder here nor in the local cache of the hub, and {why}; load it once "
            "while online, or give a folder"
        )
        raise ConfigError(msg)


def different_bases(names: Iterable[str]) -> list[str]:
    """Names of base models without those that stand for the same existing folder or file, sorted.

    Args:
        names: Names that prefixes hold: hub ids, or paths of folders or files.
    """
    found: dict[str, str] = {}
    for name in sorted(set(names)):
        found.setdefault(os.path.realpath(name) if Path(name).exists() else name, name)
    return list(found.values())


def _not_a_model(folder: Path) -> str:
    """Reason why a folder holds no model, empty if it holds one."""
    if (folder / "config.json").exists():
        return ""
    if (folder / PREFIX_FILE).exists():
        return f"which holds a prefix{_base_of(folder)}"
    if (folder / ADAPTER_FILE).exists():
        return ""
    return "which has no config.json"


def _base_of(folder: Path) -> str:
    """Advice with the base that a prefix names, empty if it names none."""
    try:
        base: Any = read_json(folder / PREFIX_FILE).get("base")
    except DataError:
        return ""
    name = base.get("name") if isinstance(base, dict) else None
    return f"; give its base, {shown(name)}" if isinstance(name, str) and name else "; give its base"


def _neighbours(path: Path) -> list[str]:
    """Names of the folders beside a path that does not exist."""
    try:
        return [p.name for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        return []


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("TRANSFORMERS_OFFLINE", "").upper() in ("1", "TRUE", "YES")


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file), str) for file in MODEL_FILES)
