"""Help pages in plain text: no option name is cut, every default is shown, every command ends with an example."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

NAME_WIDTH = 26  # a longer name stands on a line of its own
FLAGS = {"help": "Show this help and exit.", "version": "Show the version and exit."}


class Command(TyperCommand):
    """Command with a plain help page; its ``epilog`` is the example."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Pieces of the usage line, in the help page and in errors."""
        return _usage_pieces(self, ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page: usage, description, arguments, groups of options, example."""
        _write_head(self, ctx, formatter)
        _write_parameters(self, ctx, formatter)
        _write_example(self, formatter)


class Group(TyperGroup):
    """Group of commands with a plain help page; its ``epilog`` is the example."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Pieces of the usage line, in the help page and in errors."""
        return _usage_pieces(self, ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page: usage, description, options, commands, example."""
        _write_head(self, ctx, formatter)
        _write_parameters(self, ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(command)) for name, command in self.commands.items()], NAME_WIDTH)
        _write_example(self, formatter)


def _write_head(command: Any, ctx: Any, formatter: Any) -> None:
    formatter.write_usage(ctx.command_path, " ".join(_usage_pieces(command, ctx)))
    for paragraph in _paragraphs(command.help):
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(paragraph)


def _usage_pieces(command: Any, ctx: Any) -> list[str]:
    pieces = [
        command.options_metavar,
        *(_usage(p) for p in command.get_params(ctx) if _is_argument(p) and not p.hidden),
    ]
    return [*pieces, "COMMAND ..."] if hasattr(command, "commands") else pieces


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _usage(argument: Any) -> str:
    """Argument as the usage line shows it: ``NAME``, ``NAME...``, ``[NAME]`` or ``[NAME...]``."""
    name = _argument_name(argument)
    return name if argument.required else f"[{name}]"


def _argument_name(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[]").removesuffix("...")
    return f"{name}..." if argument.nargs == -1 else name


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(p.split()) for p in inspect.cleandoc(text or "").split("\n\n") if p.strip()]


def _summary(command: Any) -> str:
    """First sentence of a command's description."""
    first, _, _ = next(iter(_paragraphs(command.help)), "").partition(". ")
    return first.rstrip(".") + "."


def _write_parameters(command: Any, ctx: Any, formatter: Any) -> None:
    sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(ctx):
        if (record := parameter.get_help_record(ctx)) is None:
            continue
        if _is_argument(parameter):
            title, name = "Arguments", _argument_name(parameter)
        else:
            title, name = getattr(parameter, "rich_help_panel", None) or "Options", _option_name(record[0])
        sections.setdefault(title, []).append((name, _description(parameter, record[1])))
    for title, records in sections.items():
        if records:
            with formatter.section(title):
                formatter.write_dl(records, NAME_WIDTH)


def _option_name(text: str) -> str:
    """Names and type of an option, without the words range and list."""
    return re.sub(r"<list\[(.*)\]>", r"<\1>", text.replace(" range>", ">").replace("Path", "path"))


def _description(parameter: Any, text: str) -> str:
    """Help text of a parameter with its default; a flag that is off by default says so."""
    if parameter.name in FLAGS:
        return FLAGS[parameter.name]
    text = " ".join(text.split())
    text = re.sub(r"\[default: \((.*?)\)", r"[default: \1", text)  # typer puts a described default in parentheses
    text = re.sub(r"\bx>=(\S+)\]", r"at least \1]", text)
    if getattr(parameter, "multiple", False):
        text = text.replace(" [default: ", " Can be given several times. [default: ")
    if getattr(parameter, "is_flag", False) and "[default: " not in text:
        return f"{text} [default: off]"
    return text


def _write_example(command: Any, formatter: Any) -> None:
    if command.epilog:
        with formatter.section("Example"):
            for line in command.epilog.splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands and groups below ``command`` and itself, each with its words on the command line."""
    yield path, command
    below: Iterable[tuple[str, Any]] = getattr(command, "commands", {}).items()
    for name, own in below:
        yield from commands(own, (*path, name))
