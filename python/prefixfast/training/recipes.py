"""Recipes, presets of options in YAML files. The built-in recipes are in the folder ``recipes`` beside this module."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from prefixfast.config import MethodConfig, PrefixConfig, TrainConfig, unknown_option
from prefixfast.config.fields import MethodName
from prefixfast.errors import ConfigError, did_you_mean, shown
from prefixfast.io.yaml import read_yaml_file

FOLDER = Path(__file__).parent / "recipes"
FIELDS = (*TrainConfig.names(), *PrefixConfig.names(), *MethodConfig.names())
SEQ2SEQ = "encoder_decoder"  # key of a task's options for encoder-decoder base models
OPTIONS = tuple(n for n in (*FIELDS, "init", "init_text") if n not in ("recipe", "method"))


def recipe_names() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def read_recipe(
    recipe: str,
    task: str,
    method: str = "prefix",
    adapter_size: float | None = None,
    *,
    is_seq2seq: bool = False,
) -> dict[str, Any]:
    """Read the options of a recipe.

    Args:
        recipe: Name of a built-in recipe, or path of a ``.yaml`` file. A file holds fields of `TrainConfig`,
            `PrefixConfig` and `MethodConfig` but ``method``, ``init`` and ``init_text``. The mapping ``tasks`` holds,
            by task name, options that replace them for a task, and under ``encoder_decoder`` options of the task for
            encoder-decoder base models. The mapping ``methods`` holds, by name of a method,
            further options and a mapping ``tasks`` of its own. That of ``adapter`` can hold ``sizes``, a mapping from
            ``adapter_size`` to options and ``tasks`` of that size.
        task: Name of the task.
        method: Name of the method.
        adapter_size: Size of the adapters that the caller gave, None for that of the recipe.
        is_seq2seq: Whether the base model is an encoder-decoder model.

    Returns:
        Values by option.

    Raises:
        ConfigError: If the recipe or one of its options is unknown, the file cannot be read, or it has no values for
            the size of the adapters.
    """
    path = FOLDER / f"{recipe}.yaml" if recipe in recipe_names() else Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        msg = f"recipe: expected {', '.join(recipe_names())} or a .yaml file, got {shown(recipe)}"
        msg += f"; {hint}" if (hint := did_you_mean(recipe, recipe_names())) else ""
        raise ConfigError(msg)
    where = f"recipe {recipe}"
    options = _checked_options(read_yaml_file(path, where), (*OPTIONS, "tasks", "methods"), where)
    by_method = _mapping(options.pop("methods", None), f"{where}: methods", "methods")
    found = _of_task(options, task, where, is_seq2seq=is_seq2seq)
    for name, own in by_method.items():
        if name not in get_args(MethodName):
            raise ConfigError(unknown_option(str(name), get_args(MethodName), f"{where}: methods"))
        place = f"{where}: methods.{name}"
        own_options = _checked_options(own, (*OPTIONS, "tasks", *(("sizes",) if name == "adapter" else ())), place)
        by_size = _by_size(own_options.pop("sizes", None), task, f"{place}.sizes")
        of_method = _of_task(own_options, task, place, is_seq2seq=is_seq2seq)
        if name == method:
            found |= of_method
            found |= _of_size(by_size, adapter_size or found.get("adapter_size"), where) if by_size else {}
    return found


def _by_size(content: Any, task: str, where: str) -> dict[float, dict[str, Any]]:
    """Options of a task for each size of the adapters."""
    found = {}
    for size, own in _mapping(content, where, "values of adapter_size").items():
        if not isinstance(size, int | float) or isinstance(size, bool):
            msg = f"{where}: expected values of adapter_size, got {shown(size)}"
            raise ConfigError(msg)
        place = f"{where}.{size}"
        options = _checked_options(own, (*OPTIONS, "tasks"), place)
        found[float(size)] = _of_task(options, task, place, is_seq2seq=False)  # which have no adapters
    return found


def _of_size(by_size: dict[float, dict[str, Any]], size: float | None, where: str) -> dict[str, Any]:
    """Options of the size of the adapters, None for the default size."""
    size = MethodConfig.make({} if size is None else {"adapter_size": size}).adapter_size
    if size not in by_size:
        msg = (
            f"adapter_size: {where} has values for {' and '.join(map(str, by_size))}, got {size}; give one of them, or "
        )
        msg += "options of your own without the recipe"
        raise ConfigError(msg)
    return by_size[size]


def _of_task(options: dict[str, Any], task: str, where: str, *, is_seq2seq: bool) -> dict[str, Any]:
    """Options with those of a task, for the kind of base model, in place of the common ones."""
    tasks = _mapping(options.pop("tasks", None), f"{where}: tasks", "task names")
    by_task: dict[str, dict[str, Any]] = {}
    for name, given in tasks.items():
        place = f"{where}: tasks.{name}"
        own = _checked_options(given, (*OPTIONS, SEQ2SEQ), place)
        section = _checked_options(own.pop(SEQ2SEQ, None), OPTIONS, f"{place}.{SEQ2SEQ}")
        by_task[name] = own | section if is_seq2seq else own
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
