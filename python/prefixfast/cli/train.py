"""`prefixfast train MODEL DATA`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixfast.cli.options import flags
from prefixfast.config import PrefixConfig, TrainConfig
from prefixfast.errors import ConfigError

DATA = typer.Argument(help="rows (.jsonl .json .csv, also .gz) for one prefix, or NAME=FILE for each of several prefixes")


@flags(TrainConfig, PrefixConfig)
def command(
    model: Annotated[str, typer.Argument(help="hub id or folder of the base model")],
    data: Annotated[list[str], DATA],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder for the prefix, or for one folder a name")],
    task: Annotated[str | None, typer.Option(help="e2e, table or prompt; by default told by the rows' keys")] = None,
    eval_data: Annotated[list[str] | None, typer.Option(help="held-out rows, like DATA")] = None,
    init: Annotated[str, typer.Option(help="text, random, zero, or the folder of a prefix")] = "text",
    init_text: Annotated[str | None, typer.Option(help="words to start from")] = None,
    dtype: Annotated[str, typer.Option(help="compute dtype of the base")] = "auto",
    *,
    fields: dict[str, Any],
) -> None:
    """Train one prefix, or several in the same batches, on a frozen base."""
    from prefixfast import Prefix, load
    from prefixfast import train as run

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = Prefix.from_pretrained(init) if init not in ("text", "random", "zero") else init
    evaluation = named(eval_data) if eval_data else None
    result = run(load(model, dtype=dtype), named(data), task=task, eval_data=evaluation, init=start, init_text=init_text, output_dir=output, **fields)
    metrics = {"": result.training["metrics"]} if isinstance(result, Prefix) else result.metrics
    for name, values in metrics.items():
        typer.echo(f"{output / name}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items()))


def named(data: list[str]) -> str | dict[str, str]:
    """One file, or a mapping from NAME=FILE arguments."""
    pairs = [d.partition("=") for d in data]
    if len(data) == 1 and (not pairs[0][1] or Path(data[0]).exists()):
        return data[0]
    if any(not (name and sep and path) for name, sep, path in pairs) or len({p[0] for p in pairs}) != len(pairs):
        msg = f"DATA: expected one file, or NAME=FILE with different names, got {' '.join(data)}"
        raise ConfigError(msg)
    return {name: path for name, _, path in pairs}
