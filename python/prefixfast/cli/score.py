"""Command ``prefixfast score IN -o OUT``."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixfast.cli.generate import FORMATS, MODEL, PREFIX, PREFIXES, STORE, chosen_prefixes
from prefixfast.cli.options import flags
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
    from prefixfast.io.atomic import replace_file

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = read_rows(rows_file)
    chosen = chosen_prefixes(rows, prefix, prefixes, store)
    results = score(rows, chosen, model=model, store=store, end_token=end_token, **fields)
    lines = (json.dumps(dataclasses.asdict(r), ensure_ascii=False) for r in results)
    replace_file(output, "".join(line + "\n" for line in lines).encode())
    tokens = sum(len(r.token_ids) for r in results)
    mean = sum(r.logprob for r in results) / tokens
    typer.echo(f"{output}: {len(results)} rows, {tokens} tokens, mean log-probability of a token {mean:.4f}")
