"""Suites on real weights and data: ``users`` and ``quality``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from prefixfast.cli.bench.options import OUTPUT, check_known
from prefixfast.io.paths import check_not_input

Base = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id or folder of the base.")]
Data = Annotated[
    Path,
    typer.Argument(
        metavar="DATA",
        help="Folder of the E2E data set with one file for each split, such as trainset.csv or e2e_train.jsonl.gz.",
    ),
]


def users(
    model: Base,
    data: Data,
    output: Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.jsonl.")] = Path("bench-users"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each prefix.")] = 12,
) -> None:
    """Train twenty users' prefixes at once on E2E rows, and generate 200 requests with all of them in one batch.

    Every tenth request is generated again alone and by transformers, and the tokens are compared.
    """
    from prefixfast.bench.users import Settings, run

    run(output, Settings(model=model, data=data, steps=steps))


def quality(
    setting: Annotated[
        str,
        typer.Argument(
            metavar="SETTING",
            help="Training run. smollm2-text: made for SmolLM2-135M-Instruct, no MLP, init text. smollm2-mlp: made for "
            "SmolLM2-135M-Instruct, MLP, init random. nlg-10m: made for a GPT-2 of 10 million parameters, MLP, init "
            "random, with the strings of Li & Liang.",
        ),
    ],
    model: Base,
    data: Data,
    output: Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.json and the prefix.")] = Path(
        "bench-quality"
    ),
    impl: Annotated[
        Literal["prefixfast", "peft", "none"],
        typer.Option(help="Implementation that trains and generates; none evaluates the base without a prefix."),
    ] = "prefixfast",
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of training steps, over which the learning rate decays and after which nothing is evaluated.",
            show_default="all steps of SETTING, and an evaluation",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float64"],
        typer.Option(
            help="Compute dtype. With float64 the norms and the training loss are computed in float64 too, where "
            "transformers itself rounds to float32."
        ),
    ] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="Number of CPU threads.")] = 2,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="File of rows with a meaning representation `mr` that --impl prefixfast generates from as well.",
            show_default="no more texts",
        ),
    ] = None,
) -> None:
    """Train a prefix on E2E and measure its loss, BLEU and training time, with prefixfast or with PEFT.

    Both train on the same rows in the same order, with the same strings, initialization, schedule and evaluation.
    """
    from prefixfast.bench.quality.run import run
    from prefixfast.bench.quality.settings import SETTINGS, Run

    check_known("SETTING", setting, SETTINGS)
    check_not_input("--output", [output / "results.json"], [] if texts is None else [texts])
    settings = Run(name=setting, model=model, data=data, output=output, steps=steps, dtype=dtype, texts=texts)
    run(settings, impl, threads)
