"""`prefixfast train MODEL DATA`."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from prefixfast.cli.options import flags
from prefixfast.config import PrefixConfig, TrainConfig
from prefixfast.errors import ConfigError
from prefixfast.io.yaml import read_yaml

DATA = typer.Argument(
    help="rows (.jsonl .json .csv .parquet, also .gz) for one prefix, or NAME=FILE for each of several prefixes"
)
DRY_RUN = typer.Option(
    "--dry-run", help="say what the run would take (parameters, memory, time from two measured steps) and write nothing"
)
WORDS = ("text", "random", "zero")


def resolved(
    data: list[str], eval_data: list[str] | None, *, fields: dict[str, Any], **given: Any
) -> Mapping[str, Any]:
    """All options of the run, the recipe's included."""
    from prefixfast.training.trainer import prepare

    arguments = _arguments(eval_data=eval_data, **given)
    left_out = ("output_dir", "resume")
    rest = {
        "callbacks": (),
        "objective": "sft",
        "prefix_config": None,
        "config": None,
        "store": None,
        "resume": False,
        "fields": fields,
    }
    job, config = prepare(named(data), **{k: v for k, v in arguments.items() if k not in left_out} | rest)
    own = job.groups[0].prefix_config
    return {n: getattr(c, n) for c in (config, own) for n in c.names()}


@flags(TrainConfig, PrefixConfig, resolve=resolved)
def command(
    model: Annotated[str, typer.Argument(help="hub id or folder of the base model")],
    data: Annotated[list[str], DATA],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the prefix, or for one folder a name")],
    task: Annotated[
        str | None,
        typer.Option(
            help="e2e, webnlg, dart, table, summary, xsum, prompt, messages or text; default: by the rows' keys"
        ),
    ] = None,
    prefix_column: Annotated[
        str | None, typer.Option(help="the rows' key that names their prefix: one prefix for each of its values")
    ] = None,
    eval_data: Annotated[list[str] | None, typer.Option(help="held-out rows, like DATA")] = None,
    init: Annotated[
        str | None, typer.Option(help="text, random, zero, or the folder of a prefix; by default the recipe's, text")
    ] = None,
    init_text: Annotated[str | None, typer.Option(help="words to start from")] = None,
    on_top_of: Annotated[
        Path | None, typer.Option(help="folder of a prefix that stays as it is and comes before the new ones")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="FIELD=VALUE,VALUE,...: train every combination; may be given again for other fields"),
    ] = None,
    overrides: Annotated[Path | None, typer.Option(help="YAML file: by name, options of that prefix alone")] = None,
    store: Annotated[Path | None, typer.Option(help="also put each prefix into this store when it finishes")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the checkpoint in the output folder")] = False,
    on_error: Annotated[
        Literal["isolate", "raise"], typer.Option(help="one of several prefixes fails: report it and go on, or stop")
    ] = "isolate",
    dry_run: Annotated[bool, DRY_RUN] = False,
    *,
    fields: dict[str, Any],
) -> None:
    """Train one prefix, or several in the same batches, on a frozen base. Exits with 3 if some failed, 130 if stopped after a checkpoint."""
    from prefixfast import Prefix
    from prefixfast import train as run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = _arguments(
        output, task, prefix_column, eval_data, init, init_text, on_top_of, sweep, overrides, store, resume, on_error
    )
    if dry_run:
        from prefixfast.training.estimate import estimate

        typer.echo(json.dumps(dataclasses.asdict(estimate(model, named(data), **arguments, **fields)), indent=2))
        return
    try:
        result = run(model, named(data), **arguments, **fields)
    except KeyboardInterrupt:
        typer.echo(f"stopped; --resume goes on from the checkpoint in {output}", err=True)
        raise
    metrics = {"": result.training["metrics"]} if isinstance(result, Prefix) else result.metrics
    for name, values in metrics.items():
        typer.echo(f"{output / name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
    failed = {} if isinstance(result, Prefix) else result.failed
    for name, error in failed.items():
        typer.echo(f"{name} failed: {error}", err=True)
    if failed:
        raise typer.Exit(3)


def _arguments(
    output: Path, task: str | None, prefix_column: str | None, eval_data: list[str] | None, init: str | None, init_text: str | None, on_top_of: Path | None,
    sweep: list[str] | None, overrides: Path | None, store: Path | None, resume: bool, on_error: str, **_: Any,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of `prefixfast.train` from those of the command."""
    from prefixfast import Prefix

    return {
        "task": task,
        "prefix_column": prefix_column,
        "eval_data": named(eval_data) if eval_data else None,
        "init": init if init is None or init in WORDS else Prefix.from_pretrained(init),
        "init_text": init_text,
        "on_top_of": None if on_top_of is None else Prefix.from_pretrained(on_top_of),
        "sweep": _sweep(sweep) if sweep else None,
        "overrides": None if overrides is None else _overrides(overrides),
        "store": store,
        "output_dir": output,
        "resume": resume,
        "on_error": on_error,
    }


def named(data: list[str]) -> str | dict[str, str]:
    """One file, or a mapping from NAME=FILE arguments."""
    pairs = [d.partition("=") for d in data]
    if len(data) == 1 and (not pairs[0][1] or Path(data[0]).exists()):
        return data[0]
    if any(not (name and sep and path) for name, sep, path in pairs) or len({p[0] for p in pairs}) != len(pairs):
        msg = f"DATA: expected one file, or NAME=FILE with different names, got {' '.join(data)}"
        raise ConfigError(msg)
    return {name: path for name, _, path in pairs}


def _sweep(words: list[str]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for word in words:
        name, sep, values = word.partition("=")
        if not sep or not values or name in found:
            msg = f"--sweep: expected FIELD=VALUE,VALUE,... with different fields, got {word!r}"
            raise ConfigError(msg)
        try:
            found[name.replace("-", "_")] = read_yaml(f"[{values}]")
        except ConfigError as e:
            msg = f"--sweep: expected FIELD=VALUE,VALUE,... with values as in YAML, got {word!r}"
            raise ConfigError(msg) from e
    return found


def _overrides(path: Path) -> Any:
    try:
        return read_yaml(path.read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, ConfigError) as e:
        msg = f"--overrides {path}: cannot be read: {e}"
        raise ConfigError(msg) from e
