"""Recipes: presets of options as YAML files. Beside this module lie the built-in ones; a path names one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefixfast.config import PrefixConfig, TrainConfig, unknown_option
from prefixfast.errors import ConfigError
from prefixfast.io.yaml import read_yaml

FOLDER = Path(__file__).parent / "recipes"
FIELDS = tuple(n for n in (*TrainConfig.names(), *PrefixConfig.names(), "init", "init_text") if n != "recipe")


def names() -> list[str]:
    """The built-in recipes."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def read_recipe(recipe: str, task: str) -> dict[str, Any]:
    """The options that a recipe sets.

    Args:
        recipe: A built-in name, or the path of a ``.yaml`` file with fields of `TrainConfig` and `PrefixConfig`, ``init`` and ``init_text``, and under
            ``tasks:`` by task name what differs there.
        task: The task's name.

    Raises:
        ConfigError: For an unknown recipe or option.
    """
    path = FOLDER / f"{recipe}.yaml" if recipe in names() else Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        msg = f"recipe: expected {', '.join(names())} or a .yaml file, got {recipe!r}"
        raise ConfigError(msg)
    try:
        found = read_yaml(path.read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, ConfigError) as e:
        msg = f"recipe {recipe}: cannot be read: {e}"
        raise ConfigError(msg) from e
    fields = _fields(found, recipe, "")
    tasks = fields.pop("tasks", None) or {}
    if not isinstance(tasks, dict):
        msg = f"recipe {recipe}: tasks: expected a mapping of task names, got {type(tasks).__name__}"
        raise ConfigError(msg)
    by_task = {name: _fields(own, recipe, f"tasks.{name}: ") for name, own in tasks.items()}
    return fields | by_task.get(task, {})


def _fields(found: Any, recipe: str, where: str) -> dict[str, Any]:
    if not isinstance(found or {}, dict):
        msg = f"recipe {recipe}: {where}expected a mapping of options, got {type(found).__name__}"
        raise ConfigError(msg)
    known = FIELDS if where else (*FIELDS, "tasks")
    for name in found or {}:
        if name not in known:
            raise ConfigError(unknown_option(str(name), known, f"recipe {recipe}: {where}".rstrip(": ")))
    return dict(found or {})
