"""Commands ``prefixfast bench SUITE``, which measure prefixfast on this machine."""

from __future__ import annotations

import typer

from prefixfast.cli.bench import attention, quality, serving, throughput
from prefixfast.cli.help import Command, Group

app = typer.Typer(
    cls=Group,
    help="Measure prefixfast on this machine. Results files name the processor, the versions and the commit.",
    epilog="prefixfast bench generate --lengths 0,100,200",
    no_args_is_help=True,
)
for name, command, example in (
    ("generate", throughput.generate, "--model gpt2 --lengths 0,100,200 --rounds 3"),
    ("train", throughput.train, "--model gpt2 --lengths 10,100 --prefixes 1,8"),
    ("seq2seq", throughput.seq2seq, "--dtype bfloat16"),
    ("tokenize", throughput.tokenize, "gpt2 rows.jsonl"),
    ("kernels", attention.kernels, "--dtype bfloat16"),
    ("decode", attention.decode, "--dtype bfloat16"),
    ("decode-step", serving.decode_step, "--dtype bfloat16 --steps 10 --rounds 6"),
    ("fairness", serving.fairness, "--seconds 10 --rounds 5"),
    ("tiering", serving.tiering, "--stored 10000 --resident 100"),
    ("store", serving.store, "--stored 10000"),
    ("users", quality.users, "SmolLM2-135M-Instruct e2e-dataset"),
    ("quality", quality.quality, "smollm2-text SmolLM2-135M-Instruct e2e-dataset"),
):
    app.command(name, cls=Command, epilog=f"prefixfast bench {name} {example}")(command)
