"""What training would make of a file of rows: every problem with its line, lengths, and one example as the model would see it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prefixfast.data.corpora import task_items
from prefixfast.data.encode import Example, encode_examples
from prefixfast.data.files import items
from prefixfast.data.formats import CHAT_KEYS, FORMATS, conversation
from prefixfast.data.rows import Row
from prefixfast.data.tasks import Task, find_task
from prefixfast.errors import DataError
from prefixfast.model.tokenizer import Tokenizer

CHUNK = 256
PERCENTILES = (50, 90, 99, 100)
ANY_ID = 2**31 - 1


@dataclass
class Report:
    """What `check` found.

    Attributes:
        path: The file.
        task: The task's name.
        rows: Rows read, the malformed ones included.
        examples: Examples that training would have; several references make several.
        num_problems: How many there are.
        problems: The first ones: ``line`` (None: the file's) and ``message``.
        characters: Percentiles 50, 90, 99 and 100 of ``prompt`` and ``target`` lengths; of a conversation all its messages count as prompt.
        tokens: The same of ``example`` and ``target`` lengths, with a tokenizer.
        max_length: The limit that ``too_long`` counts against; None without one.
        too_long: Examples of more tokens.
        unread: Columns that no format reads.
        example: The first sound row's ``line``, ``prompt`` and ``target``.
    """

    path: str
    task: str
    rows: int = 0
    examples: int = 0
    num_problems: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)
    characters: dict[str, dict[str, int]] = field(default_factory=dict)
    tokens: dict[str, dict[str, int]] = field(default_factory=dict)
    max_length: int | None = None
    too_long: int = 0
    unread: list[str] = field(default_factory=list)
    example: dict[str, Any] = field(default_factory=dict)


def check(
    task: str | Task | None,
    path: str | Path,
    *,
    split: str | None = None,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = ANY_ID,
    max_length: int | None = None,
    max_errors: int = 100,
) -> Report:
    """Read a file as training would, and go on where training would stop.

    Args:
        task: As in `train`; None: told by the first row's keys.
        path: The file.
        split: Read an official file of the task, see `read_task`; None: a file of rows.
        tokenizer: Count tokens; also needed for what a chat template makes of messages.
        vocab_size: Token ids in rows must be smaller.
        max_length: Longest example in tokens.
        max_errors: Problems to list; all are counted.

    Raises:
        ConfigError: For an unknown task or split.
    """
    name = task.name if isinstance(task, Task) else task or "auto"
    report = Report(str(path), name, max_length=max_length)
    rows: list[Row] = []
    try:
        for item in items(Path(path)) if split is None else task_items(name, Path(path), split):
            report.rows += 1
            if isinstance(item, DataError):
                _note(report, item, max_errors)
            else:
                rows.append(item)
        if not report.rows:
            _note(report, DataError("expected at least one row, got none"), max_errors)
        if rows:
            given = "input_ids" in rows[0] and task is None
            _measure(
                report,
                rows,
                Task("input_ids") if given else find_task(task, rows[0]),
                tokenizer,
                vocab_size,
                max_errors,
            )
    except DataError as e:
        _note(report, e, max_errors)
    report.problems.sort(key=lambda p: p["line"] or 0)
    return report


def _measure(
    report: Report, rows: list[Row], task: Task, tokenizer: Tokenizer | None, vocab_size: int, max_errors: int
) -> None:
    """Everything that needs the rows' meaning."""
    report.task = task.name
    known = {
        "input_ids",
        "labels",
        "id",
        "prefix",
        "params",
        *FORMATS[task.format].inputs,
        *FORMATS[task.format].targets,
        *CHAT_KEYS,
    }
    report.unread = sorted({str(k) for row in rows for k in row} - known)
    lengths: dict[str, list[int]] = {"prompt": [], "target": []}
    tokens: dict[str, list[int]] = {"example": [], "target": []}
    counted = tokenizer is not None or "input_ids" in rows[0]
    for start in range(0, len(rows), CHUNK):
        for row, texts, examples in _sound(
            report, rows[start : start + CHUNK], task, tokenizer, vocab_size, max_errors
        ):
            prompt, targets = texts
            lengths["prompt"].append(len(prompt))
            lengths["target"] += map(len, targets)
            report.examples += len(examples) if counted else max(1, len(targets))
            tokens["example"] += (len(e.ids) for e in examples)
            tokens["target"] += (len(e.targets) for e in examples)
            if not report.example:
                shown = (
                    _shown(tokenizer, examples[0])
                    if tokenizer is not None
                    else {"prompt": prompt, "target": targets[0] if targets else ""}
                )
                report.example = {"line": getattr(row, "line", None), **shown}
    report.characters = {k: _percentiles(v) for k, v in lengths.items() if any(v)}
    report.tokens = {k: _percentiles(v) for k, v in tokens.items() if v}
    report.too_long = sum(n > report.max_length for n in tokens["example"]) if report.max_length else 0


Sound = tuple[Row, tuple[str, list[str]], list[Example]]


def _sound(
    report: Report, rows: Sequence[Row], task: Task, tokenizer: Tokenizer | None, vocab_size: int, max_errors: int
) -> Iterator[Sound]:
    """The good rows of a chunk; a chunk that is refused is read row by row."""
    try:
        yield from _read(rows, task, tokenizer, vocab_size)
    except DataError as e:
        if len(rows) == 1:
            _note(report, e, max_errors)
            return
        for row in rows:
            yield from _sound(report, [row], task, tokenizer, vocab_size, max_errors)


def _read(rows: Sequence[Row], task: Task, tokenizer: Tokenizer | None, vocab_size: int) -> list[Sound]:
    given = "input_ids" in rows[0]
    texts: list[tuple[str, list[str]]] = [("", [])] * len(rows)
    if not given:
        eos = "{eos}" if tokenizer is None else tokenizer.eos
        plain = [i for i, row in enumerate(rows) if not task.is_chat(row)]
        for i, pair in zip(plain, task.pairs([rows[i] for i in plain], eos), strict=True):
            texts[i] = pair
        for i, row in enumerate(rows):
            if task.is_chat(row):
                texts[i] = ("\n".join(str(m.get("content") or "") for part in conversation(row, i) for m in part), [])
    examples: list[list[Example]] = [[] for _ in rows]
    if given or tokenizer is not None:
        for number, found in itertools.groupby(encode_examples(tokenizer, vocab_size, rows, task), key=lambda e: e.row):
            examples[number] = list(found)
    return list(zip(rows, texts, examples, strict=True))


def _shown(tokenizer: Tokenizer, example: Example) -> dict[str, str]:
    """The text up to the first target, and the rest with special tokens."""
    at = int(example.targets[0])
    prompt, target = tokenizer.decode([example.ids[:at].tolist(), example.ids[at:].tolist()], skip_special_tokens=False)
    return {"prompt": prompt, "target": target}


def _percentiles(values: list[int]) -> dict[str, int]:
    return {str(p): int(np.percentile(values, p, method="inverted_cdf")) for p in PERCENTILES}


def _note(report: Report, error: DataError, max_errors: int) -> None:
    report.num_problems += 1
    if len(report.problems) < max_errors:
        report.problems.append({"line": error.line, "message": str(error)})
