"""`prefixfast score IN -o OUT`."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixfast.cli.generate import MODEL, PREFIX, PREFIXES, STORE, chosen_prefixes
from prefixfast.cli.options import flags
from prefixfast.config import EngineConfig


@flags(EngineConfig)
def command(
    rows_file: Annotated[
        Path, typer.Argument(metavar="IN", help="rows with one target each (.jsonl .json .csv .parquet, also .gz)")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON lines, one a row, in order")],
    prefix: Annotated[list[Path] | None, PREFIX] = None,
    prefixes: Annotated[Path | None, PREFIXES] = None,
    store: Annotated[Path | None, STORE] = None,
    model: Annotated[str | None, MODEL] = None,
    end_token: Annotated[
        bool,
        typer.Option("--end-token/--no-end-token", help="score the end token after each target too, as training does"),
    ] = False,
    *,
    fields: dict[str, Any],
) -> None:
    """Log-probabilities of every row's target, each with its own prefix."""
    from prefixfast import score as run
    from prefixfast.data.rows import read_rows
    from prefixfast.io.atomic import replace_file

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = read_rows(rows_file)
    results = run(
        rows, chosen_prefixes(rows, prefix, prefixes, store), model=model, store=store, end_token=end_token, **fields
    )
    replace_file(
        output, "".join(json.dumps(dataclasses.asdict(r), ensure_ascii=False) + "\n" for r in results).encode()
    )
    tokens = sum(len(r.token_ids) for r in results)
    typer.echo(
        f"{output}: {len(results)} rows, {tokens} tokens, mean log-probability of a token {sum(r.logprob for r in results) / tokens:.4f}"
    )
