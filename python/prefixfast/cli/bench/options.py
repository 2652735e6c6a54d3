"""Options that several suites share, and their checks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated

import typer

from prefixfast.cli.options import words_of
from prefixfast.errors import shown

OUTPUT = ("-o", "--output")
Model = Annotated[
    str | None,
    typer.Option(help="Hub id or folder of the base.", show_default="random weights of the architecture --shape"),
]
Shape = Annotated[
    str,
    typer.Option(help="Architecture of a base with random weights: gpt2 (124M), or llama (12 layers, grouped heads)."),
]
Rounds = Annotated[int, typer.Option(min=1, help="Number of repetitions; contenders alternate.")]
AttentionDtype = Annotated[
    str,
    typer.Option(help="auto, float32, bfloat16 or float16; auto is bfloat16 on a GPU and float32 on a CPU."),
]


def check_known(option: str, value: str, known: Collection[str]) -> None:
    """Check that an option's value is a known one.

    Raises:
        BadParameter: If it is not.
    """
    if value not in known:
        msg = f"expected one of {', '.join(known)}, got {shown(value)}"
        raise typer.BadParameter(msg, param_hint=option)


def whole_numbers(option: str, values: Sequence[str]) -> list[int]:
    """Whole numbers of an option that takes a list with commas, and can be given several times.

    Raises:
        BadParameter: If a part is not a whole number.
    """
    try:
        return list(map(int, words_of(values)))
    except ValueError as e:
        msg = f"expected whole numbers with commas between them, got {shown(','.join(values))}"
        raise typer.BadParameter(msg, param_hint=option) from e


def spelt(suite: str, *arguments: object, **options: object) -> str:
    """Command line that repeats a measurement; options whose value is None are left out."""
    given = [f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None]
    return " ".join(["prefixfast bench", suite, *map(str, arguments), *given])
