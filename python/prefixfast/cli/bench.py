"""`prefixfast bench SUITE`: measurements on the machine at hand."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure on this machine.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Measure on this machine."""


def _known(*options: tuple[str, str, Collection[str]]) -> None:
    """Refuse an option's value that is not among the known ones."""
    for option, value, known in options:
        if value not in known:
            msg = f"expected one of {', '.join(known)}, got {value!r}"
            raise typer.BadParameter(msg, param_hint=option)


def _numbers(**lists: str) -> list[list[int]]:
    """Whole numbers from lists with commas."""
    try:
        return [[int(x) for x in text.split(",")] for text in lists.values()]
    except ValueError as e:
        raise typer.BadParameter(str(e), param_hint=", ".join(f"--{name}" for name in lists)) from e


def _command(suite: str, model: str | None, shape: str, **options: object) -> str:
    """How to measure again."""
    return " ".join(
        [
            f"prefixfast bench {suite}",
            *(f"--{k} {v}" for k, v in options.items()),
            f"--model {model}" if model else f"--shape {shape}",
        ]
    )


@app.command("generate")
def generate(
    out: Annotated[Path, typer.Option("-o", "--output", help="folder for results.jsonl and the plot")] = Path(
        "bench-out"
    ),
    model: Annotated[str | None, typer.Option(help="base; by default GPT-2 124M with random weights")] = None,
    shape: Annotated[
        str, typer.Option(help="without a model: gpt2 (124M) or llama (12 layers, grouped heads), random weights")
    ] = "gpt2",
    dtype: Annotated[str, typer.Option(help="compute dtype")] = "float32",
    lengths: Annotated[str, typer.Option(help="prefix lengths; llama takes up to 4096")] = "0,10,100,200,512",
    distinct: Annotated[str, typer.Option(help="numbers of distinct prefixes in the batch")] = "1,4,32",
    requests: Annotated[
        str, typer.Option(help="requests in the batch; several numbers: one table and panel each")
    ] = "32",
    rounds: Annotated[int, typer.Option(min=1, help="repetitions, contenders alternating")] = 3,
) -> None:
    """Throughput of generation versus prefix length, distinct prefixes and batch, against PEFT (when installed) and a batch mixed by hand."""
    from prefixfast.bench.generate import SHAPES, run
    from prefixfast.model.base import DTYPES

    _known(("--shape", shape, SHAPES), ("--dtype", dtype, DTYPES))
    numbers = _numbers(lengths=lengths, distinct=distinct, requests=requests)
    command = _command(
        "generate", model, shape, lengths=lengths, distinct=distinct, requests=requests, rounds=rounds, dtype=dtype
    )
    run(
        out,
        model=model,
        shape=shape,
        dtype=dtype,
        lengths=numbers[0],
        distinct=numbers[1],
        requests=numbers[2],
        rounds=rounds,
        command=command,
    )


@app.command("train")
def train(
    out: Annotated[Path, typer.Option("-o", "--output", help="folder for results.jsonl and the plot")] = Path(
        "bench-train"
    ),
    model: Annotated[str | None, typer.Option(help="base; by default GPT-2 124M with random weights")] = None,
    shape: Annotated[
        str, typer.Option(help="without a model: gpt2 (124M) or llama (12 layers, grouped heads), random weights")
    ] = "gpt2",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    lengths: Annotated[str, typer.Option(help="prefix lengths")] = "10,100,200",
    prefixes: Annotated[str, typer.Option(help="numbers of prefixes trained at once")] = "1,8",
    rounds: Annotated[int, typer.Option(min=1, help="repetitions, contenders alternating")] = 2,
) -> None:
    """Throughput of training versus prefix length and number of prefixes at once, against PEFT's usual loop (when installed)."""
    from prefixfast.bench.generate import SHAPES
    from prefixfast.bench.train import LIMIT, run

    _known(("--shape", shape, SHAPES), ("--dtype", dtype, LIMIT))
    numbers = _numbers(lengths=lengths, prefixes=prefixes)
    command = _command("train", model, shape, lengths=lengths, prefixes=prefixes, rounds=rounds, dtype=dtype)
    run(
        out,
        model=model,
        shape=shape,
        dtype=dtype,
        lengths=numbers[0],
        counts=numbers[1],
        rounds=rounds,
        command=command,
    )


@app.command("tokenize")
def tokenize(
    tokenizer: Annotated[str, typer.Argument(help="folder or hub id of a model whose tokenizer is measured")],
    data: Annotated[
        Path, typer.Argument(help="rows whose prompts and targets are tokenized, as for `train`", exists=True)
    ],
    task: Annotated[str | None, typer.Option(help="how rows are read, as for `train`")] = None,
    out: Annotated[Path, typer.Option("-o", "--output", help="folder for results.jsonl")] = Path("bench-tokenize"),
    rounds: Annotated[int, typer.Option(min=1, help="repetitions, contenders alternating")] = 5,
) -> None:
    """Tokenization of many short texts, against transformers and tokenizers."""
    from prefixfast.bench.tokenize import run

    command = (
        f"prefixfast bench tokenize {tokenizer} {data}" + (f" --task {task}" if task else "") + f" --rounds {rounds}"
    )
    run(out, tokenizer=tokenizer, data=data, task=task, rounds=rounds, command=command)


@app.command("kernels")
def kernels(
    out: Annotated[Path, typer.Option("-o", "--output", help="folder for results.jsonl and the plot")] = Path(
        "bench-kernels"
    ),
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="repetitions, contenders alternating")] = 7,
) -> None:
    """Packed attention with shared prefixes, forward and backward, against torch's attention on copied prefixes."""
    from prefixfast.bench.kernels import run

    run(out, dtype=dtype, rounds=rounds)


@app.command("decode")
def decode(
    out: Annotated[Path, typer.Option("-o", "--output", help="folder for decode.jsonl")] = Path("bench-decode"),
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="repetitions, contenders alternating")] = 7,
) -> None:
    """Decode attention of one layer with shared prefixes, against torch's attention on gathered or copied prefixes."""
    from prefixfast.bench.decode import run

    run(out, dtype=dtype, rounds=rounds)
