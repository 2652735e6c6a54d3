"""Command-line flags from the fields of the configuration dataclasses: name, type, default and help stand there once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
import yaml

from prefixfast.config import Options, unknown_option
from prefixfast.errors import ConfigError


def flags(*configs: type[Options]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a flag for every field of ``configs`` and ``--config FILE`` to a command.

    The command receives ``fields: dict``: values of the file, overridden by the flags that were given.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "fields"]
        fields = {f.name: (config, f) for config in reversed(configs) for f in dataclasses.fields(config)}  # type: ignore[arg-type] # the first one's name wins
        extra = [_parameter(name, f, get_type_hints(config)[name], config.__name__) for name, (config, f) in fields.items()]
        extra.append(inspect.Parameter("config_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=CONFIG))

        def command(**given: Any) -> None:
            path = given.pop("config_file")
            flagged = {n: _value(v, n) for n in fields if (v := given.pop(n)) not in (None, [])}
            function(**given, fields=_read(path, set(fields)) | flagged)

        hints = get_type_hints(function, include_extras=True)
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name]) for p in own] + extra
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__doc__ = function.__doc__
        return command

    return decorate


CONFIG = Annotated[Path | None, typer.Option("--config", help="YAML file with any of the fields below; flags win")]


def _parameter(name: str, field: dataclasses.Field[Any], hint: Any, group: str) -> inspect.Parameter:
    default = "" if field.default is None else f" [default: {field.default}]"
    choices = _choices(hint)
    kind = Literal[choices] if choices else next((k for k in get_args(hint) or (hint,) if k is not type(None)), str)
    if get_origin(kind) is tuple:  # given several times
        kind = list[str]
    flag = f"--{name.replace('_', '-')}"
    spelt = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    option = typer.Option(spelt, help=field.metadata["help"] + default, rich_help_panel=group, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _choices(hint: Any) -> tuple[str, ...]:
    """Words of a Literal, booleans spelt as true and false."""
    literal = next((h for h in (hint, *get_args(hint)) if get_origin(h) is Literal), None)
    return tuple(str(a).lower() if isinstance(a, bool) else a for a in get_args(literal)) if literal else ()


def _value(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return tuple(_ids(v, name) if name.endswith("_ids") else v for v in value)
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


def _ids(text: str, name: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as e:
        msg = f"--{name.replace('_', '-')}: expected token ids with commas between them, got {text!r}"
        raise ConfigError(msg) from e


def _read(path: Path | None, known: set[str]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf8")) or {}
    except (OSError, yaml.YAMLError) as e:
        msg = f"--config {path}: cannot be read: {e}"
        raise ConfigError(msg) from e
    if not isinstance(values, dict):
        msg = f"--config {path}: expected a mapping of options, got {type(values).__name__}"
        raise ConfigError(msg)
    for name in values:
        if name not in known:
            raise ConfigError(unknown_option(str(name), tuple(known), f"--config {path}"))
    return values
