"""Command ``prefixfast generate IN -o OUT``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from prefixfast.cli.options import flags
from prefixfast.cli.output import QUIET, SOME_FAILED, start_logging
from prefixfast.cli.prefix_flags import PREFIX, PREFIXES, STORE, PrefixFlags, read_prefixes
from prefixfast.cli.records import Records, generated
from prefixfast.cli.requests import errors_by_place, known_rows, read_input, read_split
from prefixfast.cli.result_file import PARTIAL, STDOUT, check_ids, check_path, open_results, print_counts
from prefixfast.cli.result_formats import FORMATS as OUTPUT_FORMATS
from prefixfast.config import EngineConfig, GenerationParams
from prefixfast.data.files import SUFFIXES
from prefixfast.io.text import counted

if TYPE_CHECKING:
    from prefixfast.engine.request import Generation
    from prefixfast.engine.request_prefixes import Prefixes

SPLIT = typer.Option(
    help="Split that IN, an official file or folder of a corpus, holds: train, dev or test. The corpus is that of the "
    "prefix's task, or else the one whose layout IN has.",
    show_default="IN is a file of rows",
)
FORMATS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, each also with .gz"
INPUT = f"File of rows ({FORMATS}), or - for JSON lines on standard input."
UNFINISHED = f"While the command runs, its results are JSON lines in a file of this name with {PARTIAL} at its end."
UNREAD = "Targets and columns that have no meaning are not read by the model."
OUTPUT = typer.Option(
    "-o",
    "--output",
    help=f"File with the columns of IN and the result of each row, in the order of IN, as {OUTPUT_FORMATS}. "
    f"{UNFINISHED}",
    show_default="JSON lines on standard output, as with -",
)
DETAILS = typer.Option("--details", help="Write all fields of each result: also token ids, digests and counts.")
MODEL = typer.Option(help="Hub id or folder of the base.", show_default="the base that the prefixes name")
ENCODING = typer.Option(
    help="Encoding of text files, for example cp1252.", show_default="that of the byte order mark, or UTF-8"
)
EXAMPLE = "prefixfast generate requests.jsonl -o texts.jsonl --prefix my-prefix"


@flags(GenerationParams, EngineConfig)
def command(
    requests: Annotated[Path, typer.Argument(metavar="IN", help=f"{INPUT} {UNREAD}")],
    output: Annotated[Path, OUTPUT] = STDOUT,
    prefix: Annotated[list[str] | None, PREFIX] = None,
    prefixes: Annotated[Path | None, PREFIXES] = None,
    store: Annotated[Path | None, STORE] = None,
    model: Annotated[str | None, MODEL] = None,
    encoding: Annotated[str | None, ENCODING] = None,
    split: Annotated[str | None, SPLIT] = None,
    details: Annotated[bool, DETAILS] = False,
    on_error: Annotated[
        Literal["raise", "return"],
        typer.Option(
            help="Effect of a bad request: raise stops before any work, return writes its error into the output, runs "
            "the other requests and exits with 3."
        ),
    ] = "raise",
    quiet: Annotated[bool, QUIET] = False,
    *,
    fields: dict[str, Any],
) -> None:
    """Generate text for every row, each with its own prefix, in one batch."""
    from prefixfast.engine.call_checks import Call, check_generate, check_options
    from prefixfast.prefix.header import PrefixHeader

    start_logging(quiet=quiet)
    check_path(output, requests)
    check_options(fields)
    chosen = PrefixFlags(prefix, prefixes, store)
    rows = read_input(requests, encoding) if split is None else read_split(requests, split, chosen, encoding)
    check_ids(rows)
    opened = chosen.open_store()
    headers = chosen.headers(rows, opened)
    known = known_rows(rows, headers, opened)
    asked = {"logprobs": fields.get("logprobs") is not None or _any_logprobs(known), "errors": on_error == "return"}
    makes = Records(rows, generated(**asked, details=details))
    details_of = Records(rows, generated(**asked, details=True))
    with open_results(output, makes, details_of) as file, errors_by_place(rows):
        check_generate(Call(known, cast("Prefixes", headers), model, opened, PrefixHeader), None, on_error, fields)
        from prefixfast.engine import generate as engine

        results = engine.generate_each(
            file.add,
            known,
            read_prefixes(headers, model, fields),
            model=model,
            store=opened,
            on_error=on_error,
            progress=False if quiet else None,
            **fields,
        )
        file.finish(results)
    _report(results, output, quiet=quiet)


def _any_logprobs(rows: Sequence[Any]) -> bool:
    """Whether the ``params`` of a row ask for log-probabilities."""
    return any(isinstance(own := row.get("params"), dict) and own.get("logprobs") is not None for row in rows)


def _report(results: Sequence[Generation], output: Path, *, quiet: bool) -> None:
    """Print one line with the numbers of texts, failures and texts that were cut; exit with 3 if some failed."""
    failed = sum(r.error is not None for r in results)
    cut = sum(r.finish_reason == "length" for r in results)
    if not quiet:
        counts = counted(len(results) - failed, "text") + (f", {counted(failed, 'request')} failed" if failed else "")
        print_counts(output, counts + (f", {cut} cut at max_new_tokens" if cut else ""))
    if failed:
        raise typer.Exit(SOME_FAILED)
