"""Command-line flags made from the option dataclasses, which hold the name, type, default and help text of each."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
import yaml

from prefixfast.config import Options, unknown_option
from prefixfast.config.sites import BySite
from prefixfast.errors import ConfigError, shown
from prefixfast.io.yaml import read_yaml_file

LONGEST_CHOICES = 66  # columns of the choices of a flag with which its line still has 80
SECTIONS = {
    "MethodConfig": "Method options (MethodConfig)",
    "PrefixConfig": "Prefix options (PrefixConfig)",
    "TrainConfig": "Training options (TrainConfig)",
    "GenerationParams": "Generation options (GenerationParams)",
    "EngineConfig": "Engine options (EngineConfig)",
}
CONFIG = Annotated[
    Path | None,
    typer.Option(
        "--config", help="YAML file with options of the sections below; flags override it.", show_default="no file"
    ),
]
PRINT_CONFIG = Annotated[
    bool,
    typer.Option("--print-config", help="Print the options of the sections below as YAML for --config, and exit."),
]


def words_of(values: Sequence[str]) -> list[str]:
    """Words of an option that takes a list with commas, and can be given several times.

    Args:
        values: Value of each occurrence of the option.
    """
    return [word.strip() for value in values for word in value.split(",")]


def flags(
    *configs: type[Options], resolve: Callable[..., Mapping[str, Any]] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a flag for every field of ``configs``, ``--config FILE`` and ``--print-config`` to a command.

    The command receives ``fields``, a mapping of the file's values, overridden by the flags that the user gave.

    Args:
        configs: Option dataclasses. A name that several of them have is the first one's.
        resolve: Function with the command's arguments that returns all options of the run, for ``--print-config``. None
            prints the given options over the defaults.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(function).parameters.values() if p.name != "fields"]
        fields = {name: (config, f) for config in reversed(configs) for name, f in _fields(config).items()}
        types = {name: get_type_hints(config)[name] for name, (config, _) in fields.items()}
        extra = [_keyword("config_file", CONFIG, None), _keyword("print_config", PRINT_CONFIG, False)]
        for config in configs:
            own_fields = [f for owner, f in fields.values() if owner is config]
            extra += [_parameter(f, types[f.name], SECTIONS[config.__name__]) for f in own_fields]

        def command(**given: Any) -> None:
            path, printed = given.pop("config_file"), given.pop("print_config")
            flagged = {n: _value(v, n, types[n]) for n in fields if (v := given.pop(n)) not in (None, [])}
            options = _read(path, set(fields)) | flagged
            if printed:
                shown = options if resolve is None else resolve(**given, fields=options)
                typer.echo(_as_yaml(configs, shown, None if resolve is None else set(shown)), nl=False)
            else:
                function(**given, fields=options)

        hints = get_type_hints(function, include_extras=True)
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name]) for p in own] + extra
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__doc__ = function.__doc__
        return command

    return decorate


def _fields(config: type[Options]) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(config)}  # type: ignore[arg-type]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _as_yaml(configs: tuple[type[Options], ...], options: Mapping[str, Any], only: set[str] | None) -> str:
    """YAML of the fields in ``only``, None for all of them, which ``--config`` reads."""
    made = [c.make({n: v for n, v in options.items() if n in c.names()}) for c in configs]
    values = {n: _plain(getattr(c, n)) for c in made for n in c.names() if only is None or n in only}
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    """Value of a type that YAML holds."""
    return dict(value) if isinstance(value, BySite) else value


def _parameter(field: dataclasses.Field[Any], hint: Any, section: str) -> inspect.Parameter:
    """Parameter of a command for a field with type ``hint``."""
    choices = _choices(hint)
    kinds = [k for k in get_args(hint) or (hint,) if k is not type(None) and get_origin(k) is not Literal]
    kind, metavar = next(iter(kinds), str), None
    if any(get_origin(k) is BySite for k in kinds):
        words = (kind.__name__, *choices) if kind is int else ("int,int,...",)
        kind, metavar = list[str], f"<{'|'.join((*words, 'site=int,...'))}>"
    elif _is_words(kind):
        kind, metavar = list[str], f"<{'|'.join(get_args(get_args(kind)[0]))},...>"
    elif get_origin(kind) is tuple:
        kind = list[str]  # a flag that can be given several times
    elif choices and (not kinds or get_origin(hint) is Literal):
        kind = Literal[choices]
        if len("|".join(choices)) > LONGEST_CHOICES:  # whose help names all of them
            metavar = "<name>"
    elif choices:
        kind, metavar = str, f"<{'|'.join((kinds[0].__name__, *choices))}>"
    flag = f"--{field.name.replace('_', '-')}"
    spelt = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    default = ("on" if field.default else "off") if field.default in (True, False) and kind is bool else field.default
    text = f"{_sentence(field.metadata['help'])} [default: {default}]"
    option = typer.Option(spelt, metavar=metavar, help=text, rich_help_panel=section, show_default=False)
    return _keyword(field.name, Annotated[kind | None, option], None)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def _choices(hint: Any) -> tuple[str, ...]:
    """Words of a Literal; booleans are spelt as true and false."""
    literal = next((h for h in (hint, *get_args(hint)) if get_origin(h) is Literal), None)
    return tuple(str(a).lower() if isinstance(a, bool) else a for a in get_args(literal)) if literal else ()


def _is_numbers(kind: Any) -> bool:
    return get_origin(kind) is tuple and get_args(kind)[0] is int


def _is_words(kind: Any) -> bool:
    """Whether a type is a tuple of words from a list, which a flag takes with commas between them."""
    return get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal


def _value(value: Any, name: str, hint: Any) -> Any:
    """Value of a field from the value of its flag.

    Several words become a tuple. The words true and false become booleans, and decimal digits a number, where a word
    and a boolean or a number are possible.
    """
    kinds = get_args(hint)
    if isinstance(value, list):
        if any(get_origin(kind) is BySite for kind in kinds):
            is_list = any(map(_is_numbers, kinds))
            if any("=" in word for word in value):
                return _by_site(value, name, is_list=is_list)
            if not is_list:
                return _value(value[-1], name, hint)
        if any(_is_numbers(kind) for kind in kinds):
            return _numbers(value, name)
        if any(_is_words(kind) for kind in kinds):
            return tuple(words_of(value))
        nested = any(get_origin(kind) is tuple and _is_numbers(get_args(kind)[0]) for kind in kinds)
        return tuple(_numbers([v], name) if nested else v for v in value)
    if not isinstance(value, str):
        return value
    return int(value) if value.isdecimal() else {"true": True, "false": False}.get(value, value)


def _numbers(values: Sequence[str], name: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, words_of(values)))
    except ValueError as e:
        given = ",".join(values)
        msg = f"--{name.replace('_', '-')}: expected numbers with commas between them, got {shown(given)}"
        raise ConfigError(msg) from e


def _by_site(values: Sequence[str], name: str, *, is_list: bool) -> dict[str, int] | dict[str, tuple[int, ...]]:
    """Numbers by site from words such as ``enc=3`` and ``self=5``; a word without a site counts for the site before."""
    found: dict[str, list[str]] = {}
    site = ""
    for word in words_of(values):
        before, mark, number = word.rpartition("=")
        site = before.strip() if mark else site
        found.setdefault(site, []).append(number)
    numbers = {site: _numbers(own, name) for site, own in found.items()}
    if is_list:
        return numbers
    if any(len(own) != 1 or not site for site, own in numbers.items()):
        given = ",".join(values)
        msg = f"--{name.replace('_', '-')}: expected site=number with commas between them, got {shown(given)}"
        raise ConfigError(msg)
    return {site: own[0] for site, own in numbers.items()}


def _read(path: Path | None, known: set[str]) -> dict[str, Any]:
    if path is None:
        return {}
    values = read_yaml_file(path, f"--config {path}") or {}
    if not isinstance(values, dict):
        msg = f"--config {path}: expected a mapping of options, got {type(values).__name__}"
        raise ConfigError(msg)
    for name in values:
        if name not in known:
            raise ConfigError(unknown_option(str(name), tuple(known), f"--config {path}"))
    return values
