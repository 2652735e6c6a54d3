"""`prefixfast generate IN -o OUT`."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixfast.cli.options import flags
from prefixfast.config import EngineConfig, GenerationParams
from prefixfast.errors import ConfigError


@flags(GenerationParams, EngineConfig)
def command(
    requests: Annotated[Path, typer.Argument(metavar="IN", help="rows without their target (.jsonl .json .csv, also .gz)")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON lines, one a request, in order")],
    prefix: Annotated[list[Path] | None, typer.Option(help="folder of the prefix for all requests; several compose from left to right")] = None,
    prefixes: Annotated[Path | None, typer.Option(help="folder of prefix folders; a row's 'prefix' key names one")] = None,
    model: Annotated[str | None, typer.Option(help="hub id or folder of the base; by default the one that the prefix names")] = None,
    *,
    fields: dict[str, Any],
) -> None:
    """Generate for every row, each with its own prefix, in one batch."""
    from prefixfast import Prefix
    from prefixfast import generate as run
    from prefixfast.data.rows import read_rows
    from prefixfast.files import replace_file

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if prefix and prefixes:
        msg = "expected --prefix or --prefixes, got both"
        raise ConfigError(msg)
    rows = read_rows(requests)
    chosen: Any = None
    if prefix:
        chosen = [[Prefix.from_pretrained(p) for p in prefix]] * len(rows)
    elif prefixes:
        names = {row.get("prefix") for row in rows}
        if strange := [n for n in names if not isinstance(n, str) or Path(n).name != n or n == ".."]:
            msg = f"with --prefixes every row's 'prefix' names a folder in {prefixes}, got {strange[0]!r}"
            raise ConfigError(msg)
        chosen = {n: Prefix.from_pretrained(prefixes / n) for n in sorted(map(str, names))}
    results = run(rows, chosen, model=model, **fields)
    lines = (json.dumps(dataclasses.asdict(r), ensure_ascii=False) for r in results)
    replace_file(output, "".join(line + "\n" for line in lines).encode())
    typer.echo(f"{output}: {len(results)} texts")
