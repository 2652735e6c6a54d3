"""Tokens of many short texts, each as one of its own with the tokenizer's special tokens: prefixfast against transformers and tokenizers.

All contenders see the same texts several times, so whatever they remember of words is warm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prefixfast.bench.harness import Timing, alternate, cpu_name, write_rows
from prefixfast.data.rows import read_rows
from prefixfast.data.tasks import find_task
from prefixfast.errors import DataError
from prefixfast.model.tokenizer import Tokenizer

OURS, LISTS, ARRAYS, FAST = (
    "prefixfast",
    "transformers, lists",
    "transformers, one int32 array",
    "tokenizers, encode_batch_fast",
)
Ragged = tuple[NDArray[np.int32], NDArray[np.int32]]


class Point(NamedTuple):
    """One measured contender."""

    contender: str
    texts: int
    bytes: int
    timing: Timing

    def row(self) -> dict[str, Any]:
        """For the results file."""
        rates = {
            "ns_a_text": round(1e9 * self.timing.best / self.texts),
            "mb_s": round(self.bytes / self.timing.best / 1e6, 1),
        }
        return {"contender": self.contender, "seconds": [round(s, 6) for s in self.timing.seconds], **rates}


def contenders(tokenizer: Any, texts: Sequence[str]) -> dict[str, Callable[[], Any]]:
    """Who turns all texts into tokens; what each gives is compared by `check`."""
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


def check(calls: dict[str, Callable[[], Any]]) -> None:
    """No speed on other tokens.

    Raises:
        RuntimeError: Names a contender whose tokens differ from transformers', and the first text.
    """
    expected = calls[LISTS]()
    for name, call in calls.items():
        got = call()
        if isinstance(got, tuple):
            got = [got[0][a:b].tolist() for a, b in itertools.pairwise(got[1])]
        if got != expected:
            i = next(
                (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
            )
            msg = f"{name}: other tokens than transformers' for text {i}; no speed is reported on wrong results"
            raise RuntimeError(msg)


def measure(tokenizer: Any, texts: Sequence[str], *, rounds: int) -> list[Point]:
    """All contenders, alternating, on the same texts.

    Raises:
        DataError: Without texts.
        RuntimeError: If the tokens of one differ.
    """
    if not texts:
        msg = "tokenize: expected at least one text, got none"
        raise DataError(msg)
    calls = contenders(tokenizer, texts)
    check(calls)
    size = sum(len(t.encode()) for t in texts)
    return [Point(name, len(texts), size, timing) for name, timing in alternate(calls, rounds).items()]


def table(points: Sequence[Point]) -> str:
    """A Markdown table of the best rounds; the last column is how many times as long as prefixfast a contender takes."""
    (ours,) = (p.timing.best for p in points if p.contender == OURS)
    lines = ["| | ns a text | MB/s | times prefixfast |", "| --- | ---: | ---: | ---: |"]
    for p in points:
        row = p.row()
        lines.append(f"| {p.contender} | {row['ns_a_text']:,} | {row['mb_s']} | {p.timing.best / ours:.1f} |")
    return "\n".join(lines)


def texts_of(data: Path, task: str | None, tokenizer: Tokenizer) -> list[str]:
    """The prompts and targets of a file of rows.

    Raises:
        DataError: For rows that cannot be read.
    """
    rows = read_rows(data)
    return [
        text
        for prompt, targets in find_task(task, rows[0]).pairs(rows, tokenizer.eos, tokenizer.chat)
        for text in (prompt, *targets)
    ]


def run(out: Path, *, tokenizer: str, data: Path, task: str | None, rounds: int, command: str) -> list[Point]:
    """Measure, print the table, write ``results.jsonl``."""
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tokenizer)
    texts = texts_of(data, task, Tokenizer.from_hf(hf))
    points = measure(hf, texts, rounds=rounds)
    head = {
        "suite": "tokenize",
        "tokenizer": tokenizer,
        "texts": len(texts),
        "bytes": points[0].bytes,
        "command": command,
    }
    write_rows(out / "results.jsonl", [head, *(p.row() for p in points)])
    size = f"{len(texts):,} texts, {points[0].bytes / 1e6:.1f} MB"
    print(f"{size}, {tokenizer}, {cpu_name()}; best of {rounds} rounds\n\n{table(points)}\n\n{out / 'results.jsonl'}")
    return points
