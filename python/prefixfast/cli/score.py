"""Command ``prefixfast score IN -o OUT``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from prefixfast.cli.generate import DETAILS, ENCODING, FORMATS, MODEL, OUTPUT, SPLIT
from prefixfast.cli.options import flags
from prefixfast.cli.output import QUIET, start_logging
from prefixfast.cli.prefix_flags import PREFIX, PREFIXES, STORE, PrefixFlags, read_prefixes
from prefixfast.cli.records import Records, scored
from prefixfast.cli.requests import errors_by_place, known_rows, read_input, read_references
from prefixfast.cli.result_file import STDOUT, check_ids, check_path, open_results, print_counts
from prefixfast.config import EngineConfig
from prefixfast.io.text import counted

if TYPE_CHECKING:
    from prefixfast.engine.request_prefixes import Prefixes

EXAMPLE = "prefixfast score rows.jsonl -o scores.jsonl --prefix my-prefix"
INPUT = f"File of rows with one target each ({FORMATS}), or - for JSON lines on standard input."


@flags(EngineConfig)
def command(
    rows_file: Annotated[Path, typer.Argument(metavar="IN", help=INPUT)],
    output: Annotated[Path, OUTPUT] = STDOUT,
    prefix: Annotated[list[str] | None, PREFIX] = None,
    prefixes: Annotated[Path | None, PREFIXES] = None,
    store: Annotated[Path | None, STORE] = None,
    model: Annotated[str | None, MODEL] = None,
    encoding: Annotated[str | None, ENCODING] = None,
    split: Annotated[str | None, SPLIT] = None,
    details: Annotated[bool, DETAILS] = False,
    end_token: Annotated[
        bool,
        typer.Option("--end-token/--no-end-token", help="Score the end token after each target too, as training does."),
    ] = False,
    quiet: Annotated[bool, QUIET] = False,
    *,
    fields: dict[str, Any],
) -> None:
    """Compute the log-probability of every row's target, each with its own prefix.

    With --split each reference of an official file is a row of its own.

    Nothing is generated, so that these engine options do not change a score: max_model_len, max_num_seqs,
    kv_cache_memory, gpu_memory_utilization, prefix_memory, host_prefix_memory, prefix_dtype, max_waiting,
    share_prompts, enforce_eager, compile_decode and seed.
    """
    from prefixfast.engine.call_checks import Call, check_options, check_score
    from prefixfast.prefix.header import PrefixHeader

    start_logging(quiet=quiet)
    check_path(output, rows_file)
    check_options(fields)
    chosen = PrefixFlags(prefix, prefixes, store)
    rows = read_input(rows_file, encoding) if split is None else read_references(rows_file, split, chosen, encoding)
    check_ids(rows)
    opened = chosen.open_store()
    headers = chosen.headers(rows, opened)
    known = known_rows(rows, headers, opened)
    makes, details_of = (Records(rows, scored(details=all_fields)) for all_fields in (details, True))
    with open_results(output, makes, details_of) as file, errors_by_place(rows):
        call = Call(known, cast("Prefixes", headers), model, opened, PrefixHeader)
        check_score(call, None, fields, end_token=end_token)
        from prefixfast import score

        results = score(
            known,
            read_prefixes(headers, model, fields),
            model=model,
            store=opened,
            end_token=end_token,
            progress=False if quiet else None,
            **fields,
        )
        file.finish(results)
    if quiet:
        return
    tokens = sum(len(r.token_ids) for r in results)
    mean = sum(r.logprob for r in results) / tokens
    counts = f"{counted(len(results), 'row')}, {counted(tokens, 'token')}"
    print_counts(output, f"{counts}, mean log-probability of a token {mean:.4f}")
