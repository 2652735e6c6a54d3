"""Suites of throughput: ``generate``, ``train``, ``seq2seq`` and ``tokenize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixfast.cli.bench.options import OUTPUT, Model, Rounds, Shape, check_known, spelt, whole_numbers
from prefixfast.io.paths import check_not_input

# Values of options with commas, which can be given several times.
LENGTHS, DISTINCT, REQUESTS = ["0,10,100,200,512"], ["1,4,32"], ["32"]
TRAINED_LENGTHS, COUNTS = ["10,100,200"], ["1,8"]
Output = Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.jsonl, throughput.png and report.html.")]


def generate(
    output: Output = Path("bench-out"),
    model: Model = None,
    shape: Shape = "gpt2",
    dtype: Annotated[str, typer.Option(help="Compute dtype: float32, bfloat16, float16 or float64.")] = "float32",
    lengths: Annotated[
        list[str], typer.Option(help="Prefix lengths; 0 measures without a prefix. llama takes up to 4096.")
    ] = LENGTHS,
    distinct: Annotated[list[str], typer.Option(help="Numbers of distinct prefixes in the batch.")] = DISTINCT,
    requests: Annotated[
        list[str], typer.Option(help="Numbers of requests in the batch; each makes a table and a panel of the plot.")
    ] = REQUESTS,
    rounds: Rounds = 3,
) -> None:
    """Measure the throughput of generation by prefix length, number of distinct prefixes and batch size.

    The contenders are PEFT, if it is installed, and a mixed batch written by hand on transformers' cache.
    """
    from prefixfast.bench.generate import Settings, run
    from prefixfast.bench.random_base import SHAPES
    from prefixfast.model.base import DTYPES

    check_known("--shape", shape, SHAPES)
    check_known("--dtype", dtype, DTYPES)
    lists = {"lengths": lengths, "distinct": distinct, "requests": requests}
    options = {**{n: ",".join(v) for n, v in lists.items()}, "rounds": rounds, "dtype": dtype}
    settings = Settings(
        model=model,
        shape=shape,
        dtype=dtype,
        lengths=whole_numbers("--lengths", lengths),
        distinct=whole_numbers("--distinct", distinct),
        requests=whole_numbers("--requests", requests),
        rounds=rounds,
        command=spelt("generate", **options, model=model, shape=None if model else shape),
    )
    run(output, settings)


def train(
    output: Output = Path("bench-train"),
    model: Model = None,
    shape: Shape = "gpt2",
    dtype: Annotated[str, typer.Option(help="Compute dtype: float32 or bfloat16.")] = "float32",
    lengths: Annotated[list[str], typer.Option(help="Prefix lengths.")] = TRAINED_LENGTHS,
    prefixes: Annotated[list[str], typer.Option(help="Numbers of prefixes that are trained at once.")] = COUNTS,
    batch_size: Annotated[int, typer.Option(help="Rows of each prefix in a step.", min=1)] = 10,
    lora_rank: Annotated[int, typer.Option(help="Rank of the LoRA layers of PEFT.", min=1)] = 8,
    rounds: Rounds = 2,
) -> None:
    """Measure the throughput of training by prefix length and number of prefixes at once.

    The contenders are prefix-tuning and LoRA of PEFT, if it is installed, in a plain PyTorch training loop, one user
    after another. A table shows the users of an hour, the memory of training, and the users that fit in memory.
    """
    from prefixfast.bench.random_base import SHAPES
    from prefixfast.bench.train import LIMIT, Settings, run

    check_known("--shape", shape, SHAPES)
    check_known("--dtype", dtype, LIMIT)
    lists = {"lengths": lengths, "prefixes": prefixes}
    options = {**{n: ",".join(v) for n, v in lists.items()}, "batch_size": batch_size, "lora_rank": lora_rank}
    options |= {"rounds": rounds, "dtype": dtype}
    settings = Settings(
        model=model,
        shape=shape,
        dtype=dtype,
        lengths=whole_numbers("--lengths", lengths),
        counts=whole_numbers("--prefixes", prefixes),
        batch_size=batch_size,
        lora_rank=lora_rank,
        rounds=rounds,
        command=spelt("train", **options, model=model, shape=None if model else shape),
    )
    run(output, settings)


def seq2seq(
    output: Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.jsonl.")] = Path("bench-seq2seq"),
    dtype: Annotated[str, typer.Option(help="Compute dtype: float32 or bfloat16.")] = "float32",
    rounds: Rounds = 2,
) -> None:
    """Measure an encoder-decoder base: beam search of 32 users with own prefixes, and training.

    The base has the shape of BART-base and random weights. The contender is PEFT, if it is installed, whose prefixes
    are in the decoder alone.
    """
    from prefixfast.bench.seq2seq import Settings, run
    from prefixfast.bench.train import LIMIT

    check_known("--dtype", dtype, LIMIT)
    run(output, Settings(dtype=dtype, rounds=rounds, command=spelt("seq2seq", dtype=dtype, rounds=rounds)))


def tokenize(
    tokenizer: Annotated[
        str, typer.Argument(metavar="TOKENIZER", help="Hub id or folder of a model whose tokenizer is measured.")
    ],
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA", help="File of rows whose prompts and targets are tokenized, as for `train`.", exists=True
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="Task that turns rows into text, as for `train`.", show_default="the task that fits the rows"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(*OUTPUT, help="Folder for results.jsonl.")] = Path("bench-tokenize"),
    rounds: Rounds = 5,
) -> None:
    """Measure the tokenization of many short texts, against transformers and tokenizers."""
    from prefixfast.bench.tokenize import Settings, run

    check_not_input("--output", [output / "results.jsonl"], [data])
    command = spelt("tokenize", tokenizer, data, task=task, rounds=rounds)
    run(output, Settings(tokenizer=tokenizer, data=data, task=task, rounds=rounds, command=command))
