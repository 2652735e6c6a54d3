"""Command ``prefixfast score IN -o OUT``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixfast.cli.generate import ENCODING, FORMATS, MODEL, PREFIX, PREFIXES, STORE, chosen_prefixes
from prefixfast.cli.options import flags
from prefixfast.cli.output import printable
from prefixfast.cli.result_file import ResultFile, check_ids
from prefixfast.cli.row_files import check_one_file
from prefixfast.config import EngineConfig

EXAMPLE = "prefixfast score rows.jsonl -o scores.jsonl --prefix my-prefix"


@flags(EngineConfig)
def command(
    rows_file: Annotated[Path, typer.Argument(metavar="IN", help=f"File of rows with one target each ({FORMATS}).")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="File of JSON lines, one for each row, in the order of IN.")
    ],
    prefix: Annotated[list[Path] | None, PREFIX] = None,
    prefixes: Annotated[Path | None, PREFIXES] = None,
    store: Annotated[Path | None, STORE] = None,
    model: Annotated[str | None, MODEL] = None,
    encoding: Annotated[str | None, ENCODING] = None,
    end_token: Annotated[
        bool,
        typer.Option("--end-token/--no-end-token", help="Score the end token after each target too, as training does."),
    ] = False,
    *,
    fields: dict[str, Any],
) -> None:
    """Compute the log-probability of every row's target, each with its own prefix.

    Nothing is generated, so that these engine options do not change a score: max_model_len, max_num_seqs,
    kv_cache_memory, gpu_memory_utilization, prefix_memory, host_prefix_memory, prefix_dtype, max_waiting,
    share_prompts, enforce_eager, compile_decode and seed.
    """
    from prefixfast import score
    from prefixfast.data import read_rows

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_one_file(rows_file)
    rows = read_rows(rows_file, encoding)
    check_ids(rows)
    chosen = chosen_prefixes(rows, prefix, prefixes, store, model, fields)
    with ResultFile(output) as file:
        results = score(rows, chosen, model=model, store=store, end_token=end_token, **fields)
        file.finish(results)
    tokens = sum(len(r.token_ids) for r in results)
    mean = sum(r.logprob for r in results) / tokens
    typer.echo(
        f"{printable(str(output))}: {len(results)} rows, {tokens} tokens, mean log-probability of a token {mean:.4f}"
    )
