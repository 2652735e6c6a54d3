"""Command-line flags from the fields of the configuration dataclasses: name, type, default and help stand there once."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
import yaml

from prefixfast.config import Options, unknown_option
from prefixfast.errors import ConfigError
from prefixfast.io.yaml import read_yaml


def flags(
    *configs: type[Options], resolve: Callable[..., Mapping[str, Any]] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a flag for every field of ``configs``, ``--config FILE`` and ``--print-config`` to a command.

    The command receives ``fields: dict``: values of the file, overridden by the flags that were given.

    Args:
        configs: Their fields are the flags.
        resolve: Called like the command: the options that it would work with, for ``--print-config``; by default the defaults under the given ones.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "fields"]
        fields = {f.name: (config, f) for config in reversed(configs) for f in dataclasses.fields(config)}  # type: ignore[arg-type] # the first one's name wins
        types = {name: get_type_hints(config)[name] for name, (config, _) in fields.items()}
        extra = [_parameter(name, f, types[name], config.__name__) for name, (config, f) in fields.items()]
        extra.append(inspect.Parameter("config_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=CONFIG))
        extra.append(inspect.Parameter("print_config", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=PRINT))

        def command(**given: Any) -> None:
            path, shown = given.pop("config_file"), given.pop("print_config")
            flagged = {n: _value(v, n, types[n]) for n in fields if (v := given.pop(n)) not in (None, [])}
            options = _read(path, set(fields)) | flagged
            if shown:
                typer.echo(_shown(configs, options if resolve is None else resolve(**given, fields=options)), nl=False)
            else:
                function(**given, fields=options)

        hints = get_type_hints(function, include_extras=True)
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name]) for p in own] + extra
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__doc__ = function.__doc__
        return command

    return decorate


CONFIG = Annotated[Path | None, typer.Option("--config", help="YAML file with any of the fields below; flags win")]
PRINT = Annotated[
    bool,
    typer.Option(
        "--print-config", help="print all fields below as they would be used, as such a file, and do nothing else"
    ),
]


def _shown(configs: tuple[type[Options], ...], options: Mapping[str, Any]) -> str:
    """All fields as YAML that ``--config`` reads."""
    made = [c.make({n: v for n, v in options.items() if n in c.names()}) for c in configs]
    return str(yaml.safe_dump({n: getattr(c, n) for c in made for n in c.names()}, sort_keys=False, allow_unicode=True))


def _parameter(name: str, field: dataclasses.Field[Any], hint: Any, group: str) -> inspect.Parameter:
    default = "" if field.default is None else f" [default: {field.default}]"
    choices = _choices(hint)
    kinds = [k for k in get_args(hint) or (hint,) if k is not type(None) and get_origin(k) is not Literal]
    kind = (
        Literal[choices]
        if choices and (not kinds or get_origin(hint) is Literal)
        else str
        if choices
        else next(iter(kinds), str)
    )
    if numbers := _is_numbers(kind):
        kind = str
    elif get_origin(kind) is tuple:  # given several times
        kind = list[str]
    flag = f"--{name.replace('_', '-')}"
    spelt = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    metavar = "INT,INT,..." if numbers else "|".join((kinds[0].__name__, *choices)) if choices and kind is str else None
    option = typer.Option(
        spelt, metavar=metavar, help=field.metadata["help"] + default, rich_help_panel=group, show_default=False
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _choices(hint: Any) -> tuple[str, ...]:
    """Words of a Literal, booleans spelt as true and false."""
    literal = next((h for h in (hint, *get_args(hint)) if get_origin(h) is Literal), None)
    return tuple(str(a).lower() if isinstance(a, bool) else a for a in get_args(literal)) if literal else ()


def _is_numbers(kind: Any) -> bool:
    return get_origin(kind) is tuple and get_args(kind)[0] is int


def _value(value: Any, name: str, hint: Any) -> Any:
    """A flag's word as a value: booleans of a choice, numbers where a number or a word may stand, several words as a tuple."""
    if isinstance(value, list):
        nested = any(get_origin(kind) is tuple and _is_numbers(get_args(kind)[0]) for kind in get_args(hint))
        return tuple(_numbers(v, name) if nested else v for v in value)
    if any(_is_numbers(kind) for kind in get_args(hint)):
        return _numbers(value, name)
    if not isinstance(value, str):
        return value
    return int(value) if value.isdecimal() else {"true": True, "false": False}.get(value, value)


def _numbers(text: str, name: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as e:
        msg = f"--{name.replace('_', '-')}: expected numbers with commas between them, got {text!r}"
        raise ConfigError(msg) from e


def _read(path: Path | None, known: set[str]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = read_yaml(path.read_text(encoding="utf8")) or {}
    except (OSError, UnicodeDecodeError, ConfigError) as e:
        msg = f"--config {path}: cannot be read: {e}"
        raise ConfigError(msg) from e
    if not isinstance(values, dict):
        msg = f"--config {path}: expected a mapping of options, got {type(values).__name__}"
        raise ConfigError(msg)
    for name in values:
        if name not in known:
            raise ConfigError(unknown_option(str(name), tuple(known), f"--config {path}"))
    return values
