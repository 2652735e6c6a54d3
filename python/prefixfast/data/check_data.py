"""Check of a row file before training: problems with their lines, lengths, and examples as the model sees them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypedDict

import numpy as np

from prefixfast.data.builtin_tasks import find_task
from prefixfast.data.chat import split_conversation
from prefixfast.data.columns import TaskLike, check_columns, empty_values, reserved_notes, unread_columns
from prefixfast.data.corpora import count_warning, other_split, task_items
from prefixfast.data.encode import ANY_VOCABULARY, DecoderTokens, Example, encode_examples
from prefixfast.data.files import file_items
from prefixfast.data.formats import FORMATS
from prefixfast.data.join import Joins
from prefixfast.data.layouts import layout_note
from prefixfast.data.row_reader import RowReader
from prefixfast.data.rows import Row
from prefixfast.data.task import Task
from prefixfast.errors import DataError, check_string
from prefixfast.io.paths import as_path
from prefixfast.io.progress import Progress, track
from prefixfast.model.tokenizer import Tokenizer

ROWS_PER_CHUNK = 256
SHOWN_ROWS = 3
PERCENTILES = (50, 90, 99, 100)
Percentiles: TypeAlias = dict[str, int]


class Problem(TypedDict):
    """A problem of a file: ``line``, None for the whole file, and ``message``."""

    line: int | None
    message: str


class ShownExample(TypedDict):
    """An example: ``which`` of the rows, its file and ``line``, and the text of ``prompt`` and ``target``."""

    which: str
    path: str | None
    line: int | None
    prompt: str
    target: str


@dataclass(frozen=True)
class BaseVocabulary:
    """Properties of a base model that a check needs; the weights are not needed.

    Attributes:
        tokenizer: Tokenizer that counts tokens and writes conversations; None counts characters only.
        vocab_size: Number of tokens of the vocabulary, against which ``input_ids`` are checked.
        max_length: Largest number of tokens of an example, for an encoder-decoder base model those of the
            source; None for no limit.
        decoder: Tokens of the decoder of an encoder-decoder base model, None for a decoder-only one.
    """

    tokenizer: Tokenizer | None = None
    vocab_size: int = ANY_VOCABULARY
    max_length: int | None = None
    decoder: DecoderTokens | None = None


@dataclass
class DataReport:
    """Result of `check_data`.

    Attributes:
        path: Path of the file.
        task: Name of the task.
        rows: Number of rows, malformed rows included.
        examples: Number of training examples; each reference of a row is one.
        num_problems: Number of problems.
        problems: First problems, in the order of their lines.
        characters: Percentiles 50, 90, 99 and 100 of the lengths of ``prompt`` and ``target`` in characters. All
            messages of a conversation count as prompt.
        tokens: Percentiles of the lengths of ``example``, of ``source`` for an encoder-decoder base model, and of
            ``target`` in tokens; empty without a tokenizer.
        max_length: Limit that ``too_long`` counts against, None without one.
        too_long: Number of examples, or of sources of an encoder-decoder base model, with more than ``max_length``
            tokens.
        unread: Columns that the task's format does not read.
        warnings: Sentences on rows that training takes, but that are likely a mistake.
        notes: Sentences on columns whose names have a meaning in other rows, and on how rows of a public data set are
            read.
        shown: Examples of the first valid row, of the row of median length and of the longest.
    """

    path: str
    task: str
    rows: int = 0
    examples: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    characters: dict[str, Percentiles] = field(default_factory=dict)
    tokens: dict[str, Percentiles] = field(default_factory=dict)
    max_length: int | None = None
    too_long: int = 0
    unread: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    shown: list[ShownExample] = field(default_factory=list)


def check_data(
    task: TaskLike,
    path: str | Path,
    *,
    split: str | None = None,
    base: BaseVocabulary | None = None,
    max_errors: int = 100,
    encoding: str | None = None,
) -> DataReport:
    """Read a file as training does, and continue after an error, at which training stops.

    A row without a target is a problem, except in the splits dev and test, of which generation reads it.

    Args:
        task: Task as for `train`. None chooses the task by the keys of the first row.
        path: Path of the file.
        split: Split of an official file of the task, which is then read as by `read_task`. None reads a file of rows.
        base: Tokenizer and sizes of the base model. None counts characters only.
        max_errors: Largest number of problems to list; all problems are counted.
        encoding: Encoding of a file of rows, as for `read_rows`. Official files are UTF-8.

    Returns:
        Report with the problems and the lengths.

    Raises:
        ConfigError: If the task, the split or the encoding is unknown, the task has no official files, or ``encoding``
            is given with ``split``.
    """
    task = Task.from_spec(task) if isinstance(task, Mapping) else task
    name = task.name if isinstance(task, Task) else "auto" if task is None else task
    check_string("task", name, "the name of a task, a Task or None")
    RowReader(encoding, split, task)  # reports a split that is unknown or does not fit
    base, path = base or BaseVocabulary(), as_path("path", path)
    report = DataReport(str(path), name, max_length=base.max_length)
    checker = _Checker(report, base, max_errors, reads_requests=split not in (None, "train"))
    rows: list[Row] = []
    try:
        with Progress(f"read {path}"):
            own = file_items(path, encoding, has_option=True) if split is None else None
            for item in task_items(name, path, split or "train") if own is None else own:
                report.rows += 1
                if isinstance(item, DataError):
                    checker.add_problem(item)
                else:
                    rows.append(item)
        if not report.rows:
            checker.add_problem(DataError("expected at least one row, got none"))
        if split is not None and (error := other_split(name, rows, split)):
            checker.add_problem(DataError(f"{path}: {error}"))
        elif split is not None and (warning := count_warning(name, rows, split)):
            report.warnings.append(warning)
        if rows:
            tokenized = "input_ids" in rows[0] and task is None
            checker.measure(rows, Task("input_ids") if tokenized else find_task(task, rows[0]))
    except DataError as e:
        checker.add_problem(e)
    report.problems.sort(key=lambda p: p["line"] or 0)
    return report


class _ValidRow(TypedDict):
    """A row that training can read: its texts (empty for ``input_ids``) and, with a tokenizer, its examples."""

    row: Row
    prompt: str
    targets: list[str]
    examples: list[Example]


class _Checker:
    """Fills a report.

    Attributes:
        num_requests: Number of rows without a target, where these are no problem.
    """

    def __init__(
        self, report: DataReport, base: BaseVocabulary, max_errors: int, *, reads_requests: bool = False
    ) -> None:
        self.report, self.base, self.max_errors = report, base, max_errors
        self.reads_requests, self.num_requests = reads_requests, 0

    def add_problem(self, error: DataError) -> None:
        """Count a problem, and list it if the list is not full."""
        self.report.num_problems += 1
        if len(self.report.problems) < self.max_errors:
            self.report.problems.append({"line": error.line, "message": str(error)})

    def measure(self, rows: list[Row], task: Task) -> None:
        """Fill the fields that need the task: examples, lengths, columns, and the shown examples."""
        report, tokenizer = self.report, self.base.tokenizer
        report.task = task.name
        check_columns(task, rows)
        report.unread, report.notes = unread_columns(task, rows), reserved_notes(task, rows)
        if note := layout_note(rows, task.format):
            report.notes.append(note)
        characters: dict[str, list[int]] = {"prompt": [], "target": []}
        whole = "example" if self.base.decoder is None else "source"
        tokens: dict[str, list[int]] = {whole: [], "target": []}
        counted = tokenizer is not None or task.is_tokenized(rows[0])
        joins, sizes = Joins(), list[tuple[int, Row]]()
        starts = range(0, len(rows), ROWS_PER_CHUNK)
        with track(starts, "check", len(starts), f"chunks of {ROWS_PER_CHUNK} rows") as each:
            for start in each:
                for valid in self._valid_rows(rows[start : start + ROWS_PER_CHUNK], task):
                    targets, examples = valid["targets"], valid["examples"]
                    characters["prompt"].append(len(valid["prompt"]))
                    characters["target"] += map(len, targets)
                    if self._is_request(valid["row"], task):
                        self.num_requests += 1
                    else:
                        report.examples += len(examples) if counted else max(1, len(targets))
                        joins.add(valid["prompt"], targets)
                    tokens[whole] += (len(e.ids if e.encoder_ids is None else e.encoder_ids) for e in examples)
                    tokens["target"] += (len(e.targets) for e in examples)
                    size = len(examples[0].ids) if examples else len(valid["prompt"]) + sum(map(len, targets[:1]))
                    sizes.append((size, valid["row"]))
        report.characters = {k: _percentiles(v) for k, v in characters.items() if any(v)}
        report.tokens = {k: _percentiles(v) for k, v in tokens.items() if v}
        limit = report.max_length
        report.too_long = sum(n > limit for n in tokens[whole]) if limit else 0
        together = joins.warning() if self.base.decoder is None else ""  # an encoder reads the prompt alone
        report.warnings += [*filter(None, [together]), *empty_values(task, rows)]
        if self.num_requests:
            have = f"{self.num_requests} of {len(rows)} rows have no texts"
            report.warnings.append(f"{have}; generate reads them, but eval and training need texts")
        report.shown = [
            _shown(tokenizer, which, valid)
            for which, row in _typical_rows(sizes).items()
            for valid in self._read([row], task)
        ]

    def _valid_rows(self, rows: Sequence[Row], task: Task) -> Iterator[_ValidRow]:
        """The valid rows of a chunk. If the chunk is refused, its rows are read one by one."""
        try:
            yield from self._read(rows, task)
        except DataError as e:
            if len(rows) == 1:
                self.add_problem(e)
                return
            for row in rows:
                yield from self._valid_rows([row], task)

    def _read(self, rows: Sequence[Row], task: Task) -> list[_ValidRow]:
        tokenizer, tokenized = self.base.tokenizer, task.is_tokenized(rows[0])
        texts: list[tuple[str, list[str]]] = [("", [])] * len(rows)
        if not tokenized:
            eos = "" if self.base.decoder is not None else "{eos}" if tokenizer is None else tokenizer.eos
            plain = [i for i, row in enumerate(rows) if not (task.is_chat(row) or self._is_request(row, task))]
            for i, row in enumerate(rows):
                if self._is_request(row, task):
                    texts[i] = task.prompts([row], eos)[0], []
            for i, pair in zip(plain, task.pairs([rows[i] for i in plain], eos), strict=True):
                texts[i] = pair
            for i, row in enumerate(rows):
                if task.is_chat(row):
                    parts = split_conversation(row, i)
                    texts[i] = "\n".join(str(m.get("content") or "") for part in parts for m in part), []
        examples: list[list[Example]] = [[] for _ in rows]
        if tokenized or tokenizer is not None:
            trained = [i for i, row in enumerate(rows) if not self._is_request(row, task)]
            own = [rows[i] for i in trained]
            encoded = encode_examples(tokenizer, self.base.vocab_size, own, task, decoder=self.base.decoder)
            for number, found in itertools.groupby(encoded if own else (), key=lambda e: e.row):
                examples[trained[number]] = list(found)
        return [
            {"row": row, "prompt": prompt, "targets": targets, "examples": own}
            for row, (prompt, targets), own in zip(rows, texts, examples, strict=True)
        ]

    def _is_request(self, row: Row, task: Task) -> bool:
        """Whether a row has no target, and is read for generation alone."""
        targets = FORMATS[task.format].targets
        return self.reads_requests and bool(targets) and all(row.get(key) is None for key in targets)


def _typical_rows(sizes: list[tuple[int, Row]]) -> dict[str, Row]:
    """The first row, the longest and the one of median length; a row that is two of them leaves room for another."""
    by_size = sorted(range(len(sizes)), key=lambda i: sizes[i][0])
    wanted = {"first": [0], "longest": by_size[-1:], "median": by_size[(len(by_size) - 1) // 2 :], "another": by_size}
    found: dict[str, int] = {}
    for which, places in wanted.items():
        place = next((p for p in places if p < len(sizes) and p not in found.values()), None)
        if place is not None and len(found) < SHOWN_ROWS:
            found[which] = place
    return {which: sizes[place][1] for which, place in found.items()}


def _shown(tokenizer: Tokenizer | None, which: str, valid: _ValidRow) -> ShownExample:
    """The first example of a row: the text up to the first target and the rest, with special tokens."""
    path, line = getattr(valid["row"], "path", None), getattr(valid["row"], "line", None)
    if tokenizer is None or not valid["examples"]:
        target = valid["targets"][0] if valid["targets"] else ""
        return {"which": which, "path": path, "line": line, "prompt": valid["prompt"], "target": target}
    example = valid["examples"][0]
    at = int(example.targets[0])
    source = example.ids[:at] if example.encoder_ids is None else example.encoder_ids
    parts = [source.tolist(), example.ids[at:].tolist()]
    prompt, target = tokenizer.decode(parts, skip_special_tokens=False)
    return {"which": which, "path": path, "line": line, "prompt": prompt, "target": target}


def _percentiles(values: list[int]) -> Percentiles:
    return {str(p): int(np.percentile(values, p, method="inverted_cdf")) for p in PERCENTILES}
