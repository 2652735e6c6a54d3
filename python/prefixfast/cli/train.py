"""Command ``prefixfast train MODEL DATA``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from prefixfast.cli.columns import PROMPT, SPLIT, TABLE, TARGET, TASK, column_arguments
from prefixfast.cli.generate import ENCODING, FORMATS
from prefixfast.cli.options import flags
from prefixfast.cli.output import QUIET, printable, start_logging
from prefixfast.cli.prefixes import Json
from prefixfast.cli.read_prefix import read_prefix
from prefixfast.cli.row_files import named_files
from prefixfast.cli.train_summary import KeepRun, Summary, without_result_log
from prefixfast.config import MethodConfig, PrefixConfig, TrainConfig
from prefixfast.errors import ConfigError, shown
from prefixfast.io.paths import check_not_input
from prefixfast.io.yaml import read_yaml, read_yaml_file
from prefixfast.model.base_name import check_base_name
from prefixfast.training.ranks import rank_and_size

if TYPE_CHECKING:
    from prefixfast.training.settings import BaseKind

DATA = typer.Argument(
    metavar="DATA...",
    help=f"File of rows ({FORMATS}) of one prefix. A folder, a glob pattern or several files train one prefix for each "
    "file, which is named by the file's stem or by NAME=FILE.",
)
PREFIX_COLUMN = typer.Option(
    help="Key of the rows that names their prefix; every value of it becomes a prefix.",
    show_default="one prefix for all rows",
)
EVAL_DATA = typer.Option(
    help="Held-out rows for all prefixes, or by the same names in a form of DATA. With --split the dev split.",
    show_default="no evaluation",
)
INIT = typer.Option(
    help="Initial values: text, random, zero, or the folder or hub id of a prefix.",
    show_default="init of the recipe; the default recipe has text",
)
INIT_TEXT = typer.Option(
    help="Text whose keys and values are the initial values of --init text.",
    show_default="init text of the recipe or the task",
)
ON_TOP_OF = typer.Option(help="Folder of a frozen prefix that comes before the trained ones.", show_default="no prefix")
SWEEP = typer.Option(
    help="Field and values as FIELD=VALUE,VALUE,...; a prefix is trained for each value, and with several fields for "
    "each combination.",
    show_default="no sweep",
)
OVERRIDES = typer.Option(
    help="YAML file that maps names of prefixes to options of their own.", show_default="the same options for all"
)
OUTPUT = typer.Option(
    "-o",
    "--output",
    help="Folder of the prefix; of several prefixes, the folder of their folders. It may be left out beside --store.",
    show_default="no folder",
)
STORE = typer.Option(
    help="Folder of a store that gets each prefix when it finishes. Without -o the prefix of one file is named by the "
    "file's stem, and the store keeps log and checkpoints of the run.",
    show_default="no store",
)
ON_ERROR = typer.Option(
    help="Effect of a failed prefix among several: isolate reports it and trains the others, raise stops the run."
)
DRY_RUN = typer.Option(
    "--dry-run",
    help="Print learning rate, steps, parameters, memory and time, which is estimated from two measured steps, and "
    "write nothing.",
)
RESUME = typer.Option(
    "--resume",
    help="Continue from the checkpoint in the output folder. Without one, continue from checkpoints in the store, and "
    "train no prefix that the store holds of the same rows and options.",
)
OVERWRITE = typer.Option(
    "--overwrite",
    help="Replace the results of an earlier run in the output folder, each prefix when its new one is saved.",
)
INIT_WORDS = ("text", "random", "zero")
EXAMPLE = """prefixfast train gpt2 rows.jsonl -o my-prefix --prefix-length 10
prefixfast train gpt2 a.csv -o my-prefix --prompt '{name} ->' --target text
prefixfast train gpt2 users/ --store prefixes --resume"""


def resolved(data: list[str], *, fields: dict[str, Any], **given: Any) -> Mapping[str, Any]:
    """All options that the run reads, with those of the recipe, and the values that automatic ones mean.

    A learning rate and a number of steps of None stay None, since they follow the base model and the rows. Options of a
    recipe for encoder-decoder bases count if the config of the base can be read.
    """
    from prefixfast.model.load import compute_dtype
    from prefixfast.training.job import JobArguments, prepare
    from prefixfast.training.method import METHODS

    arguments = _train_arguments(given, fields)
    kept = {k: v for k, v in arguments.items() if k not in ("output_dir", "resume", "overwrite", "store")}
    files = named_files(data, by_stem=_by_stem(given), official=given["split"] is not None)
    job = prepare(JobArguments(files, fields=fields, **kept)).for_kind(_kind(given["model"]))
    group = job.groups[0]
    typical = min(group.jobs, key=lambda own: len(own.own))  # one without options of its own, if there is one
    configs = (group.config, typical.prefix_config, group.method_config)
    reads = METHODS[group.method_config.method].reads | {"method"}
    automatic = {
        "dtype": compute_dtype(group.config.dtype),
        "reparameterization": "mlp" if typical.uses_mlp else "none",
    }
    values = {n: getattr(c, n) for c in configs for n in c.names()} | automatic
    return {n: v for n, v in values.items() if n in reads}


@flags(TrainConfig, PrefixConfig, MethodConfig, resolve=resolved)
def command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder of the base model.")],
    data: Annotated[list[str], DATA],
    output: Annotated[Path | None, OUTPUT] = None,
    task: Annotated[str | None, TASK] = None,
    prompt: Annotated[str | None, PROMPT] = None,
    target: Annotated[str | None, TARGET] = None,
    table: Annotated[str | None, TABLE] = None,
    prefix_column: Annotated[str | None, PREFIX_COLUMN] = None,
    encoding: Annotated[str | None, ENCODING] = None,
    split: Annotated[str | None, SPLIT] = None,
    eval_data: Annotated[list[str] | None, EVAL_DATA] = None,
    init: Annotated[str | None, INIT] = None,
    init_text: Annotated[str | None, INIT_TEXT] = None,
    on_top_of: Annotated[Path | None, ON_TOP_OF] = None,
    sweep: Annotated[list[str] | None, SWEEP] = None,
    overrides: Annotated[Path | None, OVERRIDES] = None,
    store: Annotated[Path | None, STORE] = None,
    resume: Annotated[bool, RESUME] = False,
    overwrite: Annotated[bool, OVERWRITE] = False,
    on_error: Annotated[Literal["isolate", "raise"], ON_ERROR] = "isolate",
    dry_run: Annotated[bool, DRY_RUN] = False,
    as_json: Json = False,
    quiet: Annotated[bool, QUIET] = False,
    *,
    fields: dict[str, Any],
) -> None:
    """Train one prefix, or several in the same batches, on a frozen base.

    Under torchrun or accelerate launch all processes train together, and the first one prints.

    The exit status is 3 if some prefixes failed, and 130 if the run was interrupted after a checkpoint.
    """
    given = {n: v for n, v in locals().items() if n not in ("data", "dry_run", "as_json", "quiet", "fields")}
    from prefixfast import TrainRun, train

    if output is None and store is None and not dry_run:
        msg = "expected -o FOLDER for the prefix, --store STORE to keep it by its name, or both; got neither"
        raise typer.BadParameter(msg, param_hint="--output")
    is_first = rank_and_size()[0] == 0  # of the processes that train together
    start_logging(quiet=quiet or not is_first)
    check_order(model)
    files = named_files(data, by_stem=_by_stem(given), official=split is not None)
    held_out = {} if eval_data is None else _by_name(named_files(eval_data, official=split is not None))
    _check_output(output, [files, held_out])
    _check_before_reading(given, fields)
    arguments = _train_arguments(given, fields)
    if dry_run:
        if is_first:
            _print_estimate(model, files, arguments | fields)
        return
    kept: Any = KeepRun()  # a `Callback`, which only needs one of the hooks
    progress = False if quiet else None
    with _said_how_to_resume(store if output is None else output), without_result_log():
        result = train(model, files, **arguments, callbacks=[kept], progress=progress, **fields)
    if not is_first:
        return
    dtype = None if fields.get("dtype") in (None, "auto") else str(fields["dtype"])
    is_single, by_rows = not isinstance(result, TrainRun), prefix_column == "prefix"
    own = (dtype, encoding, by_rows, split, held_out)
    summary = Summary(kept.run, output, store, is_single, _by_name(files), *own)
    summary.show(as_json=as_json, quiet=quiet)


def _print_estimate(model: str, files: str | Mapping[str, str | Path], arguments: Mapping[str, Any]) -> None:
    """Print the estimate of ``--dry-run``."""
    from prefixfast.training.estimate import estimate

    typer.echo(json.dumps(dataclasses.asdict(estimate(model, files, **arguments)), indent=2))


@contextlib.contextmanager
def _said_how_to_resume(place: Path | None) -> Iterator[None]:
    """Context manager that says after an interrupt where a run goes on from."""
    try:
        yield
    except KeyboardInterrupt:
        if rank_and_size()[0] == 0:
            typer.echo(f"stopped; --resume goes on from the checkpoint in {printable(str(place))}", err=True)
        raise


def _kind(model: str) -> BaseKind:
    """Kind of a base by its config; decoder-only if it cannot be read."""
    from transformers import AutoConfig

    from prefixfast.model.seq2seq.families import FAMILIES
    from prefixfast.training.settings import BaseKind

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        return BaseKind()
    family = FAMILIES.get(config.model_type) if config.is_encoder_decoder else None
    return BaseKind() if family is None else BaseKind(True, not family.has_distances)


def _by_name(files: str | Mapping[str, str | Path]) -> Mapping[str, str | Path]:
    """Files by the name of their prefix; a single file without a name has the empty name."""
    return {"": files} if isinstance(files, str) else files


def _check_output(output: Path | None, inputs: Sequence[str | Mapping[str, str | Path]]) -> None:
    """Raise `ConfigError` if the run would replace a file of rows with its log or its list of failures."""
    from prefixfast.store.runs import FAILED, LOG

    paths = [p for files in inputs for p in (files.values() if isinstance(files, Mapping) else (files,))]
    if output is not None:
        check_not_input("--output", [output / LOG, output / FAILED], filter(os.path.isfile, paths))


def check_order(model: str) -> None:
    """Raise `ConfigError` for a base that is a file of rows, since base and data may be swapped."""
    if Path(model).is_file():
        check_base_name(model)


def _check_before_reading(given: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Check options and folders without torch, which reads the prefixes of ``--init`` and ``--on-top-of``.

    Raises:
        ConfigError: If an option is wrong.
        DataError: If a folder holds no prefix.
    """
    from prefixfast.prefix.header import check_is_prefix, read_header
    from prefixfast.training.settings import GivenOptions, resolve_settings

    folders = [path for path in (given["init"], given["on_top_of"]) if path not in (None, *INIT_WORDS)]
    if not folders:
        return
    check_base_name(given["model"])
    column_arguments(given["prompt"], given["target"], given["table"])
    if given["sweep"]:
        _sweep(given["sweep"])
    if given["overrides"] is not None:
        _overrides(given["overrides"])
    resolve_settings(GivenOptions(fields=fields, init_text=given["init_text"]), "")
    for folder in folders:
        check_is_prefix(read_header(folder))


def _by_stem(given: Mapping[str, Any]) -> bool:
    """Whether one file is trained under its stem: where the store alone gets it, so that it needs a name."""
    return given["output"] is None and given["store"] is not None and given["prefix_column"] is None


def _train_arguments(given: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `prefixfast.train` from the values of the flags and the options."""
    model, eval_data = given["model"], given["eval_data"]
    init, on_top_of, overrides = given["init"], given["on_top_of"], given["overrides"]
    return {
        "task": given["task"],
        **column_arguments(given["prompt"], given["target"], given["table"]),
        "prefix_column": given["prefix_column"],
        "encoding": given["encoding"],
        "split": given["split"],
        "eval_data": named_files(eval_data, official=given["split"] is not None) if eval_data else None,
        "init": init if init is None or init in INIT_WORDS else read_prefix(init, model, fields),
        "init_text": given["init_text"],
        "on_top_of": None if on_top_of is None else read_prefix(on_top_of, model, fields),
        "sweep": _sweep(given["sweep"]) if given["sweep"] else None,
        "overrides": None if overrides is None else _overrides(overrides),
        "store": given["store"],
        "output_dir": given["output"],
        "resume": given["resume"],
        "overwrite": given["overwrite"],
        "on_error": given["on_error"],
    }


def _sweep(words: list[str]) -> dict[str, list[Any]]:
    """Values by field from FIELD=VALUE,VALUE,... arguments."""
    found: dict[str, list[Any]] = {}
    for word in words:
        name, sep, values = word.partition("=")
        if not sep or not values or name in found:
            msg = f"--sweep: expected FIELD=VALUE,VALUE,... with different fields, got {shown(word)}"
            raise ConfigError(msg)
        try:
            found[name.replace("-", "_")] = read_yaml(f"[{values}]")
        except ConfigError as e:
            msg = f"--sweep: expected FIELD=VALUE,VALUE,... with values as in YAML, got {shown(word)}"
            raise ConfigError(msg) from e
    return found


def _overrides(path: Path) -> Any:
    """Contents of the YAML file of ``--overrides``."""
    return read_yaml_file(path, f"--overrides {path}")
