"""Tasks: how a row becomes a prompt and a target. A task is data, stored in the prefix, so that generation builds the prompts of training."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefixfast import _rust
from prefixfast.data.rows import Row
from prefixfast.errors import ConfigError, DataError

INPUT_KEYS = ("prompt", "mr", "table")
TARGET_KEYS = ("completion", "ref", "refs")


@dataclass(frozen=True)
class Task:
    """How rows are read.

    Attributes:
        name: For messages.
        linearizer: Spec of a `_rust.Linearizer` for rows with a table (key ``mr`` or ``table``); None: rows have a ``prompt``.
        prompt: Around the linearized table; ``{src}`` is the table, ``{eos}`` the model's end token.
        target: Around the reference; ``{ref}``. The end token itself is added as a token.
        strip: Whether generated text loses leading and trailing space.
        init_text: The task in words, to start a prefix from.
        decoding: Default generation parameters.
    """

    name: str
    linearizer: str | None = None
    prompt: str = "{src}"
    target: str = "{ref}"
    strip: bool = False
    init_text: str = "Answer the request:"
    decoding: Mapping[str, Any] = field(default_factory=dict)

    def prompts(self, rows: Sequence[Row], eos: str | None) -> list[str]:
        """Prompts of rows of this task.

        Raises:
            DataError: For a row without its input, with the row's number.
        """
        if self.linearizer is None:
            return [_text(row, i, "prompt") for i, row in enumerate(rows)]
        tables = [_table(row, i) for i, row in enumerate(rows)]
        sources = _rust.Linearizer.from_spec(self.linearizer).linearize(tables)
        return [_fill(self.prompt, src=s, eos=eos or "") for s in sources]

    def targets(self, row: Row, number: int) -> list[str]:
        """All targets of a row: several references are several examples."""
        if self.linearizer is None:
            return [_text(row, number, "completion")]
        refs = row["refs"] if "refs" in row else [_text(row, number, "ref")]
        if not isinstance(refs, Sequence) or isinstance(refs, str) or not refs or not all(isinstance(r, str) for r in refs):
            msg = f"row {number}: refs: expected a list of strings, got {refs!r:.80}"
            raise DataError(msg, line=number + 1)
        return [_fill(self.target, ref=r) for r in refs]

    def clean(self, text: str) -> str:
        """Generated text as users want it."""
        return text.strip() if self.strip else text

    def spec(self) -> dict[str, Any]:
        """JSON-ready form for `Prefix.linearizer`."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Task:
        """The inverse of `spec`.

        Raises:
            ConfigError: For unknown keys.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(spec) - known:
            msg = f"task: unknown keys {sorted(unknown)}; known are {sorted(known)}"
            raise ConfigError(msg)
        for f in dataclasses.fields(cls):
            value = spec.get(f.name, f.default)
            kind = Mapping if f.name == "decoding" else bool if f.name == "strip" else str
            missing = f.name == "name" and "name" not in spec
            if missing or (f.name in spec and not isinstance(value, kind) and not (f.name == "linearizer" and value is None)):
                msg = f"task: {f.name}: expected {kind.__name__.lower()}, got {'nothing' if missing else repr(value)}"
                raise ConfigError(msg)
        return cls(**spec)


def table_task(
    *,
    item: str = "{key} : {value}",
    separator: str = " | ",
    prompt: str = "{src}\n",
    target: str = "{ref}",
    init_text: str = "Describe the following data in a sentence:",
) -> Task:
    """A task for own tables: rows ``{"table": {...}, "ref": ...}``.

    Args:
        item: Text of one slot.
        separator: Between slots.
        prompt: Around the slots.
        target: Around the reference.
        init_text: The task in words.
    """
    return Task("table", _rust.Linearizer.template(item=item, separator=separator).spec, prompt, target, strip=True, init_text=init_text)


# Li & Liang's strings (branch `cleaned`, language_modeling.py and run_generation.py): " {src} {bos} " + tgt + " {eos}" with bos = eos;
# beam 5, words "table-to-text:".
E2E = Task(
    "e2e",
    _rust.Linearizer.e2e().spec,
    " {src} {eos}",
    " {ref} ",
    strip=True,
    init_text="table-to-text:",
    decoding={"num_beams": 5, "max_new_tokens": 100},
)
TASKS = {"e2e": E2E, "table": table_task(), "prompt": Task("prompt")}
BY_KEY = {"prompt": "prompt", "mr": "e2e", "table": "table"}


def find_task(task: str | Task | Mapping[str, Any] | None, row: Row) -> Task:
    """The task by name, object or spec; None: by the row's keys.

    Raises:
        ConfigError: For an unknown name.
        DataError: If the row says nothing.
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return Task.from_spec(task)
    if task is None:
        key = next((k for k in INPUT_KEYS if k in row), None)
        if key is None:
            msg = f"row 0: expected one of the keys {', '.join(INPUT_KEYS)} (or input_ids), got {sorted(row)}"
            raise DataError(msg, line=1)
        task = BY_KEY[key]
    if task not in TASKS:
        msg = f"task: expected one of {', '.join(TASKS)} or a Task, got {task!r}"
        raise ConfigError(msg)
    return TASKS[task]


def _fill(template: str, **values: str) -> str:
    """Replace ``{name}`` of the known names only, in one pass: braces inside the values are data."""
    return re.sub("|".join(f"{{{name}}}" for name in values), lambda m: values[m[0][1:-1]], template)


def _text(row: Row, number: int, key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        msg = f"row {number}: {key}: expected a string, got {value!r:.80}; the row has {sorted(row)}"
        raise DataError(msg, line=number + 1)
    return value


def _table(row: Row, number: int) -> Any:
    for key in ("mr", "table"):
        if key in row:
            return row[key]
    msg = f"row {number}: expected a table under 'mr' or 'table', got the keys {sorted(row)}"
    raise DataError(msg, line=number + 1)
