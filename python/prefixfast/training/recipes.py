"""Recipes, presets of options in YAML files. The built-in recipes are in the folder ``recipes`` beside this module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefixfast.config import PrefixConfig, TrainConfig, unknown_option
from prefixfast.errors import ConfigError, did_you_mean, shown
from prefixfast.io.yaml import read_yaml_file

FOLDER = Path(__file__).parent / "recipes"
OPTIONS = tuple(n for n in (*TrainConfig.names(), *PrefixConfig.names(), "init", "init_text") if n != "recipe")


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def read_recipe(recipe: str, task: str) -> dict[str, Any]:
    """Read the options of a recipe.

    Args:
        recipe: Name of a built-in recipe, or path of a ``.yaml`` file. A file holds fields of `TrainConfig` and
            `PrefixConfig`, ``init`` and ``init_text``; the mapping ``tasks`` holds, by task name, options that replace
            them for a task.
        task: Name of the task.

    Returns:
        Values by option.

    Raises:
        ConfigError: If the recipe or one of its options is unknown, or the file cannot be read.
    """
    path = FOLDER / f"{recipe}.yaml" if recipe in recipe_names() else Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        msg = f"recipe: expected {', '.join(recipe_names())} or a .yaml file, got {shown(recipe)}"
        msg += f"; {hint}" if (hint := did_you_mean(recipe, recipe_names())) else ""
        raise ConfigError(msg)
    content = read_yaml_file(path, f"recipe {recipe}")
    options = _checked_options(content, (*OPTIONS, "tasks"), f"recipe {recipe}")
    tasks = options.pop("tasks", None) or {}
    if not isinstance(tasks, dict):
        msg = f"recipe {recipe}: tasks: expected a mapping of task names, got {type(tasks).__name__}"
        raise ConfigError(msg)
    by_task = {name: _checked_options(own, OPTIONS, f"recipe {recipe}: tasks.{name}") for name, own in tasks.items()}
    return options | by_task.get(task, {})


def _checked_options(content: Any, known: tuple[str, ...], where: str) -> dict[str, Any]:
    """A mapping of known options; ``where`` names it in errors."""
    if not isinstance(content or {}, dict):
        msg = f"{where}: expected a mapping of options, got {type(content).__name__}"
        raise ConfigError(msg)
    for name in content or {}:
        if name not in known:
            raise ConfigError(unknown_option(str(name), known, where))
    return dict(content or {})
