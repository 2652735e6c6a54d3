"""Recipes, presets of options in YAML files. The built-in recipes are in the folder ``recipes`` beside this module."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from prefixfast.config import PrefixConfig, TrainConfig, unknown_option
from prefixfast.config.fields import MethodName
from prefixfast.errors import ConfigError, did_you_mean, shown
from prefixfast.io.yaml import read_yaml_file

FOLDER = Path(__file__).parent / "recipes"
OPTIONS = tuple(n for n in (*TrainConfig.names(), *PrefixConfig.names(), "init", "init_text") if n != "recipe")


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def read_recipe(recipe: str, task: str, method: str = "prefix") -> dict[str, Any]:
    """Read the options of a recipe.

    Args:
        recipe: Name of a built-in recipe, or path of a ``.yaml`` file. A file holds fields of `TrainConfig` and
            `PrefixConfig`, ``init`` and ``init_text``; the mapping ``tasks`` holds, by task name, options that replace
            them for a task. The mapping ``methods`` holds, by name of a method, further options and a mapping
            ``tasks`` of its own.
        task: Name of the task.
        method: Name of the method.

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
    options = _checked_options(content, (*OPTIONS, "tasks", "methods"), f"recipe {recipe}")
    by_method = _mapping(options.pop("methods", None), f"recipe {recipe}: methods", "methods")
    found = _of_task(options, task, f"recipe {recipe}")
    for name, own in by_method.items():
        where = f"recipe {recipe}: methods.{name}"
        if name not in get_args(MethodName):
            raise ConfigError(unknown_option(str(name), get_args(MethodName), f"recipe {recipe}: methods"))
        of_method = _of_task(_checked_options(own, (*OPTIONS, "tasks"), where), task, where)
        if name == method:
            found |= of_method
    return found


def _of_task(options: dict[str, Any], task: str, where: str) -> dict[str, Any]:
    """Options with those of a task in place of the common ones."""
    tasks = _mapping(options.pop("tasks", None), f"{where}: tasks", "task names")
    by_task = {name: _checked_options(own, OPTIONS, f"{where}: tasks.{name}") for name, own in tasks.items()}
    return options | by_task.get(task, {})


def _mapping(content: Any, where: str, of: str) -> dict[Any, Any]:
    if not isinstance(content or {}, dict):
        msg = f"{where}: expected a mapping of {of}, got {type(content).__name__}"
        raise ConfigError(msg)
    return dict(content or {})


def _checked_options(content: Any, known: tuple[str, ...], where: str) -> dict[str, Any]:
    """A mapping of known options; ``where`` names it in errors."""
    if not isinstance(content or {}, dict):
        msg = f"{where}: expected a mapping of options, got {type(content).__name__}"
        raise ConfigError(msg)
    for name in content or {}:
        if name not in known:
            raise ConfigError(unknown_option(str(name), known, where))
    return dict(content or {})
