"""Command line ``prefixfast``: train, generate, score, eval, compare, chat, try, convert, doctor and groups of others.

Exit status: 0 for success, 1 for a problem that the message explains, 2 for a wrong command line, 3 if some of several
prefixes, requests or folders failed, 130 after an interrupt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixfast.cli import bench, chat, compare, convert, data, doctor, eval_, generate, prefixes, score, train, try_
from prefixfast.cli.help import Command, Group
from prefixfast.config.hints import HINTS
from prefixfast.errors import PrefixFastError

app = typer.Typer(
    name="prefixfast",
    cls=Group,
    help="Prefix-tuning of language models: train prefixes, generate with them, store and measure them.",
    epilog="prefixfast train gpt2 rows.jsonl -o my-prefix",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for module in (train, generate, score, eval_, compare, chat, try_, convert, doctor):
    app.command(module.__name__.rpartition(".")[2].rstrip("_"), cls=Command, epilog=module.EXAMPLE)(module.command)
for group in (prefixes, data, bench):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2])


def _print_version(wanted: bool) -> None:
    if wanted:
        from prefixfast import __version__

        typer.echo(f"prefixfast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_print_version)] = False,
) -> None:
    """Prefix-tuning of language models: train prefixes, generate with them, store and measure them."""


def _suggest_known_flag(error: Any) -> None:
    """Let the error of an unknown flag suggest the flag that does what the name means in another library."""
    name = getattr(error, "option_name", "").lstrip("-").replace("-", "_")
    flag = "--" + HINTS.get(name, name).split("=")[0].split(" ")[0].replace("_", "-")
    if name in HINTS and any(flag in p.opts for p in error.ctx.command.params):
        error.possibilities = [flag]


def _with_place(e: PrefixFastError) -> str:
    """Message of an error, which begins with the path and line of its file."""
    path, line, text = getattr(e, "path", None), getattr(e, "line", None), str(e)
    where = ":".join(str(x) for x in (path, line) if x is not None)
    if not where or where in text:
        return text
    return f"{where}: {text.removeprefix(f'{Path(str(path)).name}: ')}"


def main() -> None:
    """Run the command line; an error that the user can mend is printed as one message, without a traceback."""
    try:
        sys.exit(app(prog_name="prefixfast", standalone_mode=False) or 0)
    except PrefixFastError as e:
        sys.exit(f"prefixfast: {_with_place(e)}")
    except OSError as e:  # such as a full disk or a missing permission
        sys.exit(f"prefixfast: {e}")
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except typer.Exit as e:
        sys.exit(e.exit_code)
    except Exception as e:
        if hasattr(e, "show"):  # a wrong command line
            _suggest_known_flag(e)
            e.show()
            sys.exit(2)
        raise
