"""The command line: `prefixfast train`, `generate`, `score`, `prefixes`, `convert`, `data`, `doctor`, `bench`.

Exit status 0 done, 1 a problem that the message explains, 2 a command line that cannot be understood, 3 some of several failed, 130 interrupted.
"""

from __future__ import annotations

import sys

import typer

from prefixfast.cli import bench, convert, data, doctor, generate, prefixes, score, train
from prefixfast.errors import PrefixFastError

app = typer.Typer(
    name="prefixfast",
    help="Prefix-tuning: train, generate, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.command)
app.command("generate")(generate.command)
app.command("score")(score.command)
app.command("convert")(convert.command)
app.command("doctor")(doctor.command)
app.add_typer(prefixes.app, name="prefixes")
app.add_typer(bench.app, name="bench")
app.add_typer(data.app, name="data")


def main() -> None:
    """Run the command line; errors that users can mend are one message, not a traceback."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except PrefixFastError as e:
        where = ":".join(str(x) for x in (getattr(e, "path", None), getattr(e, "line", None)) if x is not None)
        sys.exit(f"prefixfast: {where + ': ' if where and where not in str(e) else ''}{e}")
    except OSError as e:  # a full disk, a missing permission
        sys.exit(f"prefixfast: {e}")
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except typer.Exit as e:
        sys.exit(e.exit_code)
    except Exception as e:
        if hasattr(e, "show"):  # a usage error of the command line itself
            e.show()
            sys.exit(2)
        raise
