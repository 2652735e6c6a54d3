"""`prefixfast generate IN -o OUT`."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prefixfast.cli.options import flags
from prefixfast.config import EngineConfig, GenerationParams
from prefixfast.errors import ConfigError

PREFIX = typer.Option(help="folder or hub id of the prefix for all requests; several compose from left to right")
PREFIXES = typer.Option(help="folder of prefix folders; a row's 'prefix' key names one")
STORE = typer.Option(help="folder of a store; a row's 'prefix' key names a prefix in it")
MODEL = typer.Option(help="hub id or folder of the base; by default the one that the prefixes name")
SOME_FAILED = 3


@flags(GenerationParams, EngineConfig)
def command(
    requests: Annotated[
        Path, typer.Argument(metavar="IN", help="rows without their target (.jsonl .json .csv .parquet, also .gz)")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON lines, one a request, in order")],
    prefix: Annotated[list[Path] | None, PREFIX] = None,
    prefixes: Annotated[Path | None, PREFIXES] = None,
    store: Annotated[Path | None, STORE] = None,
    model: Annotated[str | None, MODEL] = None,
    on_error: Annotated[
        Literal["raise", "return"],
        typer.Option(help="return: a bad request gets an error in OUT, the others run; exit status 3"),
    ] = "raise",
    *,
    fields: dict[str, Any],
) -> None:
    """Generate for every row, each with its own prefix, in one batch."""
    from prefixfast import generate as run
    from prefixfast.data.rows import read_rows
    from prefixfast.io.atomic import replace_file

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = read_rows(requests)
    results = run(
        rows, chosen_prefixes(rows, prefix, prefixes, store), model=model, store=store, on_error=on_error, **fields
    )
    lines = (json.dumps(dataclasses.asdict(r), ensure_ascii=False) for r in results)
    replace_file(output, "".join(line + "\n" for line in lines).encode())
    failed = sum(r.error is not None for r in results)
    typer.echo(f"{output}: {len(results) - failed} texts" + (f", {failed} requests failed" if failed else ""))
    if failed:
        raise typer.Exit(SOME_FAILED)


def chosen_prefixes(rows: list[Any], prefix: list[Path] | None, prefixes: Path | None, store: Path | None) -> Any:
    """What ``--prefix``, ``--prefixes`` and ``--store`` say, as `generate` takes it.

    Raises:
        ConfigError: If more than one of them is given, or a row names no folder of ``--prefixes``.
    """
    from prefixfast import Prefix

    if sum(map(bool, (prefix, prefixes, store))) > 1:
        msg = "expected one of --prefix, --prefixes and --store, got several"
        raise ConfigError(msg)
    if prefix:
        return [[Prefix.from_pretrained(p) for p in prefix]] * len(rows)
    if prefixes is None:
        return None
    names = {row.get("prefix") for row in rows}
    if strange := [n for n in names if not isinstance(n, str) or Path(n).name != n or n == ".."]:
        msg = f"with --prefixes every row's 'prefix' names a folder in {prefixes}, got {strange[0]!r}"
        raise ConfigError(msg)
    return {n: Prefix.from_pretrained(prefixes / n) for n in sorted(map(str, names))}
