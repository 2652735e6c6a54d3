"""Suite ``tokenize``: tokenization of many short texts, against transformers and tokenizers.

Each text is tokenized on its own with the tokenizer's special tokens. All contenders see the same texts several
times, so that their caches of words are warm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefixfast.bench.harness import Timing, WrongResultError, alternate, best_of, write_rows
from prefixfast.data import find_task, read_rows
from prefixfast.errors import DataError
from prefixfast.io.environment import cpu_name
from prefixfast.model.tokenizer import Tokenizer, read_tokenizer

OURS, LISTS, ARRAYS, FAST = (
    "prefixfast",
    "transformers, lists",
    "transformers, one int32 array",
    "tokenizers, encode_batch_fast",
)
Ragged = tuple[NDArray[np.int32], NDArray[np.int32]]


class Point(NamedTuple):
    """Time of one contender.

    Attributes:
        contender: Name of the contender.
        texts: Number of texts.
        bytes: Total size of the texts in UTF-8.
        timing: Seconds of each round.
    """

    contender: str
    texts: int
    bytes: int
    timing: Timing

    def row(self) -> dict[str, Any]:
        """Record of the results file."""
        rates = {
            "ns_a_text": round(1e9 * self.timing.best / self.texts),
            "mb_s": round(self.bytes / self.timing.best / 1e6, 1),
        }
        return {"contender": self.contender, "seconds": [round(s, 6) for s in self.timing.seconds], **rates}


def contenders(tokenizer: Any, texts: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Functions that turn all texts into tokens, by contender. `check_same_tokens` compares their results."""
    core, fast = Tokenizer.from_hf(tokenizer).core, tokenizer.backend_tokenizer

    def lists() -> list[list[int]]:
        found: list[list[int]] = tokenizer(list(texts)).input_ids
        return found

    def arrays() -> Ragged:
        ids = lists()
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32)
        return flat, np.cumsum([0, *map(len, ids)], dtype=np.int32)

    return {
        OURS: lambda: core.encode_batch(texts, add_special_tokens=True),
        ARRAYS: arrays,
        LISTS: lists,
        FAST: lambda: [e.ids for e in fast.encode_batch_fast(list(texts), add_special_tokens=True)],
    }


def check_same_tokens(calls: dict[str, Callable[[], Any]]) -> None:
    """Check that all contenders give the tokens of transformers.

    Raises:
        WrongResultError: If one does not. The message names the contender and the first text.
    """
    expected = calls[LISTS]()
    for name, call in calls.items():
        got = call()
        if isinstance(got, tuple):
            got = [got[0][a:b].tolist() for a, b in itertools.pairwise(got[1])]
        if got != expected:
            differ = (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b)
            i = next(differ, min(len(got), len(expected)))
            msg = f"{name}: other tokens than transformers' for text {i}; no speed is reported on wrong results"
            raise WrongResultError(msg)


def measure(tokenizer: Any, texts: Sequence[str], *, rounds: int) -> list[Point]:
    """Times of all contenders, which alternate.

    Raises:
        DataError: If there is no text.
        WrongResultError: If the tokens of two contenders differ.
    """
    if not texts:
        msg = "tokenize: expected at least one text, got none"
        raise DataError(msg)
    calls = contenders(tokenizer, texts)
    check_same_tokens(calls)
    size = sum(len(t.encode()) for t in texts)
    return [Point(name, len(texts), size, timing) for name, timing in alternate(calls, rounds).items()]


def table(points: Sequence[Point]) -> str:
    """Markdown table of the fastest rounds. The last column is the time as a multiple of prefixfast's."""
    (ours,) = (p.timing.best for p in points if p.contender == OURS)
    lines = ["| | ns a text | MB/s | times prefixfast |", "| --- | ---: | ---: | ---: |"]
    for p in points:
        row = p.row()
        lines.append(f"| {p.contender} | {row['ns_a_text']:,} | {row['mb_s']} | {p.timing.best / ours:.1f} |")
    return "\n".join(lines)


def texts_of(data: Path, task: str | None, tokenizer: Tokenizer) -> list[str]:
    """Prompts and targets of a file of rows.

    Raises:
        DataError: If a row cannot be read.
    """
    rows = read_rows(data)
    return [
        text
        for prompt, targets in find_task(task, rows[0]).pairs(rows, tokenizer.eos, tokenizer.chat)
        for text in (prompt, *targets)
    ]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the suite.

    Attributes:
        tokenizer: Hub id or folder of a model.
        data: File of rows.
        task: Name of the rows' task, or None for that of the rows' keys.
        rounds: Number of repetitions.
        command: Command that repeats the measurement.
    """

    tokenizer: str
    data: Path
    task: str | None
    rounds: int
    command: str


def run(output: Path, settings: Settings) -> list[Point]:
    """Measure, print the table, write ``results.jsonl``.

    Raises:
        ConfigError: If the tokenizer cannot be loaded.
        DataError: If a row cannot be read.
        WrongResultError: If the tokens of two contenders differ.
    """
    hf = read_tokenizer(settings.tokenizer)
    texts = texts_of(settings.data, settings.task, Tokenizer.from_hf(hf))
    points = measure(hf, texts, rounds=settings.rounds)
    head = {
        "suite": "tokenize",
        "tokenizer": settings.tokenizer,
        "texts": len(texts),
        "bytes": points[0].bytes,
        "command": settings.command,
    }
    write_rows(output / "results.jsonl", [head, *(p.row() for p in points)])
    size = f"{len(texts):,} texts, {points[0].bytes / 1e6:.1f} MB"
    print(f"{size}, {settings.tokenizer}, {cpu_name()}; {best_of(settings.rounds)}\n\n{table(points)}")
    print(f"\n{output / 'results.jsonl'}")
    return points
