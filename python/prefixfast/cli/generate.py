"""Command ``prefixfast generate IN -o OUT``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prefixfast.cli.options import flags
from prefixfast.cli.output import SOME_FAILED, printable
from prefixfast.cli.read_prefix import read_prefix
from prefixfast.cli.result_file import PARTIAL, ResultFile, check_ids
from prefixfast.cli.row_files import check_one_file
from prefixfast.config import EngineConfig, GenerationParams
from prefixfast.errors import ConfigError, shown

FORMATS = ".csv, .tsv, .jsonl, .json or .parquet, each also with .gz"
UNFINISHED = f"While the command runs, the results so far are in a file of this name with {PARTIAL} at its end."
REQUEST_KEYS = "Targets are ignored. A row with a key that no format has is refused."
PREFIX = typer.Option(
    help="Folder or hub id of the prefix of all rows. Several prefixes compose from left to right.",
    show_default="no prefix",
)
PREFIXES = typer.Option(
    help="Folder of prefix folders; the 'prefix' key of each row names one of them.", show_default="no folder"
)
ENCODING = typer.Option(
    help="Encoding of text files, for example cp1252.", show_default="that of the byte order mark, or UTF-8"
)
STORE = typer.Option(
    help="Folder of a store; the 'prefix' key of each row names a prefix in it.", show_default="no store"
)
MODEL = typer.Option(help="Hub id or folder of the base.", show_default="the base that the prefixes name")
EXAMPLE = "prefixfast generate requests.jsonl -o texts.jsonl --prefix my-prefix"


@flags(GenerationParams, EngineConfig)
def command(
    requests: Annotated[Path, typer.Argument(metavar="IN", help=f"File of rows ({FORMATS}). {REQUEST_KEYS}")],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help=f"File of JSON lines, one for each request, in the order of IN. {UNFINISHED}"
        ),
    ],
    prefix: Annotated[list[Path] | None, PREFIX] = None,
    prefixes: Annotated[Path | None, PREFIXES] = None,
    store: Annotated[Path | None, STORE] = None,
    model: Annotated[str | None, MODEL] = None,
    encoding: Annotated[str | None, ENCODING] = None,
    on_error: Annotated[
        Literal["raise", "return"],
        typer.Option(
            help="Effect of a bad request: raise stops before any work, return writes its error into the output, runs "
            "the other requests and exits with 3."
        ),
    ] = "raise",
    *,
    fields: dict[str, Any],
) -> None:
    """Generate text for every row, each with its own prefix, in one batch."""
    from prefixfast.data import read_rows
    from prefixfast.engine.generate import generate_each

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_one_file(requests)
    rows = read_rows(requests, encoding)
    check_ids(rows)
    chosen = chosen_prefixes(rows, prefix, prefixes, store, model, fields)
    with ResultFile(output) as file:
        results = generate_each(file.add, rows, chosen, model=model, store=store, on_error=on_error, **fields)
        file.finish(results)
    failed = sum(r.error is not None for r in results)
    typer.echo(
        f"{printable(str(output))}: {len(results) - failed} texts" + (f", {failed} requests failed" if failed else "")
    )
    if failed:
        raise typer.Exit(SOME_FAILED)


def chosen_prefixes(
    rows: list[Any],
    prefix: list[Path] | None,
    prefixes: Path | None,
    store: Path | None,
    model: str | None,
    fields: Mapping[str, Any],
) -> Any:
    """Prefixes that the flags name, in a form that `prefixfast.generate` takes.

    Args:
        rows: Rows of the requests.
        prefix: Value of ``--prefix``.
        prefixes: Value of ``--prefixes``.
        store: Value of ``--store``.
        model: Value of ``--model``.
        fields: Options of the engine.

    Raises:
        ConfigError: If more than one flag is given, or a row names no folder of ``--prefixes``.
    """
    if sum(map(bool, (prefix, prefixes, store))) > 1:
        msg = "expected one of --prefix, --prefixes and --store, got several"
        raise ConfigError(msg)
    if prefix:
        return [[read_prefix(p, model, fields) for p in prefix]] * len(rows)
    if prefixes is None:
        return None
    names = {row.get("prefix") for row in rows}
    if strange := [n for n in names if not isinstance(n, str) or Path(n).name != n or n == ".."]:
        got = shown(strange[0])
        msg = f"--prefixes: expected a 'prefix' key in every row that names a folder in {prefixes}, got {got}"
        raise ConfigError(msg)
    return {n: read_prefix(prefixes / n, model, fields) for n in sorted(map(str, names))}
