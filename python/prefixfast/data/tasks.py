"""Tasks: how a row becomes a prompt and a target. A task is data, stored in the prefix, so that generation builds the prompts of training."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefixfast import _rust
from prefixfast.data.formats import (
    BY_KEY,
    FORMATS,
    INPUT_KEYS,
    Chat,
    chat_pair,
    chat_text,
    conversation,
    is_conversation,
    one_of,
    references,
    text,
)
from prefixfast.data.rows import Row, row_error
from prefixfast.errors import ConfigError, DataError

LOSS_ON = ("auto", "last", "assistant", "all")


@dataclass(frozen=True)
class Task:
    r"""How rows are read.

    Attributes:
        name: For messages.
        linearizer: Spec of a `_rust.Linearizer` for rows with a table (key ``mr``, ``table`` or ``triples``).
        prompt: Around the input; ``{src}`` is the linearized table, the document or the prompt, ``{eos}`` the model's end token. Conversations are written
            by the tokenizer's chat template, a ``text`` as it is.
        target: Around the reference, summary or completion; ``{ref}``. The end token itself is added as a token, unless the target ends with it.
        strip: Whether generated text loses leading and trailing space.
        init_text: The task in words, to start a prefix from.
        decoding: Default generation parameters.
        bad_words: Texts that generation never chooses; training writes their tokens into the prefix's own parameters (``bad_words_ids``).
        input: Format of the rows, a key of `FORMATS`; None: ``"table"`` with a linearizer, else ``"prompt"``.
        loss_on: Of ``messages``: ``"last"`` the last answer, ``"assistant"`` every turn that the chat template marks with ``{% generation %}``, ``"all"`` every
            token but the first; ``"auto"``: ``"assistant"`` if the template has such marks, else ``"last"``.

    Example:
        >>> task = Task("question", prompt="Q: {src}\nA:", target=" {ref}")
        >>> task.prompts([{"prompt": "2+2?"}], None), task.targets({"prompt": "2+2?", "completion": "4"}, 0)
        (['Q: 2+2?\nA:'], [' 4'])
        >>> TASKS["e2e"].prompts([{"mr": "name[Blue Spice], area[riverside]"}], "<|endoftext|>")
        [' name : Blue Spice | area : riverside <|endoftext|>']
        >>> TASKS["dart"].prompts([{"triples": [["Mars Hill College", "JOINED", "1973"]]}], "<|endoftext|>")
        [' Mars Hill College : joined : 1973 <|endoftext|>']
    """

    name: str
    linearizer: str | None = None
    prompt: str = "{src}"
    target: str = "{ref}"
    strip: bool = False
    init_text: str = "Answer the request:"
    decoding: Mapping[str, Any] = field(default_factory=dict)
    bad_words: Sequence[str] = ()
    input: str | None = None
    loss_on: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.bad_words, str) or not all(isinstance(w, str) and w for w in self.bad_words):
            msg = f"task {self.name!r}: bad_words: expected texts that are not empty, got {self.bad_words!r:.80}"
            raise ConfigError(msg)
        object.__setattr__(self, "bad_words", tuple(self.bad_words))
        for name, known in (("input", (None, *FORMATS)), ("loss_on", LOSS_ON)):
            if getattr(self, name) not in known:
                msg = f"task {self.name!r}: {name}: expected one of {known}, got {getattr(self, name)!r}"
                raise ConfigError(msg)
        if (self.format == "table") != (self.linearizer is not None):
            msg = f"task {self.name!r}: expected a linearizer exactly for input 'table', got {self.linearizer!r} for {self.format!r}"
            raise ConfigError(msg)

    @property
    def format(self) -> str:
        """The key of `FORMATS` that says which keys its rows have."""
        return self.input or ("prompt" if self.linearizer is None else "table")

    def prompts(self, rows: Sequence[Row], eos: str | None, chat: Chat | None = None) -> list[str]:
        """Prompts of requests of this task: rows of which the target, if there is one, is not read.

        Args:
            rows: Any number of rows.
            eos: The model's end token.
            chat: `Tokenizer.chat`, for messages. What it writes holds the special tokens already: tokenize it without adding any.

        Raises:
            DataError: For a row without its input, with the row's number or line. Messages that end with the assistant's are no request.
        """
        if self.format == "table":
            return [self._wrap(s, eos) for s in self._sources(rows)]
        return [self._prompt(row, i, eos, chat) for i, row in enumerate(rows)]

    def targets(self, row: Row, number: int) -> list[str]:
        """All targets of a row that is no conversation: several references are several examples, a whole text has none beside it.

        Raises:
            DataError: For a row without its target, with the row's number or line.
        """
        if self.format == "text":
            return []
        refs = (
            references(row, number) if self.format == "table" else [text(row, number, FORMATS[self.format].targets[0])]
        )
        return refs if self.target == "{ref}" else [_fill(self.target, ref=r) for r in refs]

    def pairs(self, rows: Sequence[Row], eos: str | None, chat: Chat | None = None) -> list[tuple[str, list[str]]]:
        """Prompt and targets of training rows; of a conversation the answer is the target.

        Raises:
            DataError: For a malformed row, with its number or line.
        """
        if self.format == "table":
            return [
                (prompt, self.targets(row, i))
                for i, (prompt, row) in enumerate(zip(self.prompts(rows, eos), rows, strict=True))
            ]
        out = []
        for i, row in enumerate(rows):
            if self.is_chat(row):
                prompt, target = chat_pair(row, i, chat)
                out.append((prompt, [target]))
            else:
                out.append((self._prompt(row, i, eos, chat), self.targets(row, i)))
        return out

    def is_chat(self, row: Row) -> bool:
        """Whether the tokenizer's chat template writes this row."""
        return self.format in ("prompt", "messages") and is_conversation(row)

    def clean(self, text: str) -> str:
        """Generated text as users want it."""
        return text.strip() if self.strip else text

    def spec(self) -> dict[str, Any]:
        """JSON-ready form for `Prefix.task`."""
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
            kind = {"decoding": Mapping, "strip": bool, "bad_words": Sequence}.get(f.name, str)
            missing = f.name == "name" and "name" not in spec
            if missing or (
                f.name in spec
                and not isinstance(value, kind)
                and not (f.name in ("linearizer", "input") and value is None)
            ):
                msg = f"task: {f.name}: expected {kind.__name__.lower()}, got {'nothing' if missing else repr(value)}"
                raise ConfigError(msg)
        return cls(**spec)

    def _sources(self, rows: Sequence[Row]) -> list[str]:
        """Linearized tables; a wrong one is found by itself once the whole list was refused."""
        linearizer = _rust.Linearizer.from_spec(self.linearizer or "")
        tables = [row[one_of(row, i, FORMATS["table"].inputs)] for i, row in enumerate(rows)]
        try:
            return linearizer.linearize(tables)
        except (DataError, UnicodeEncodeError) as first:
            for i, (row, table) in enumerate(zip(rows, tables, strict=True)):
                try:
                    linearizer.linearize([table])
                except (DataError, UnicodeEncodeError) as e:
                    what = (
                        "the table: expected Unicode text, got half a surrogate pair"
                        if isinstance(e, UnicodeEncodeError)
                        else str(e)
                    )
                    raise row_error(row, i, what.removeprefix("row 0: ")) from first
            raise

    def _prompt(self, row: Row, number: int, eos: str | None, chat: Chat | None) -> str:
        key = one_of(row, number, FORMATS[self.format].inputs)
        if self.is_chat(row):
            context, answer = conversation(row, number)
            if answer and key == "messages":
                raise row_error(
                    row,
                    number,
                    "messages: expected a request, which ends before the answer, got the assistant's message as the last; leave it out",
                )
            return chat_text(row, number, chat, context, generation_prompt=True)
        source = text(row, number, key)
        return source if self.format == "text" else self._wrap(source, eos)

    def _wrap(self, source: str, eos: str | None) -> str:
        return source if self.prompt == "{src}" else _fill(self.prompt, src=source, eos=eos or "")


def table_task(
    *,
    item: str = "{key} : {value}",
    separator: str = " | ",
    prompt: str = "{src}\n",
    target: str = "{ref}",
    init_text: str = "Describe the following data in a sentence:",
) -> Task:
    r"""A task for own tables: rows ``{"table": {...}, "ref": ...}``.

    Args:
        item: Text of one slot; ``{key}`` and ``{value}``, and ``{{`` or ``}}`` for a brace.
        separator: Between slots.
        prompt: Around the slots.
        target: Around the reference.
        init_text: The task in words.

    Raises:
        ConfigError: For an item without key or value.

    Example:
        >>> task = table_task(item="{key}={value}", separator="; ", prompt="{src} ->", target=" {ref}")
        >>> row = {"table": {"name": "Ada", "born": "1815"}, "refs": ["Ada was born in 1815.", "Born in 1815: Ada."]}
        >>> task.prompts([row], None)
        ['name=Ada; born=1815 ->']
        >>> task.targets(row, 0)
        [' Ada was born in 1815.', ' Born in 1815: Ada.']
        >>> Task.from_spec(task.spec()) == task
        True
    """
    return Task(
        "table",
        _rust.Linearizer.template(item=item, separator=separator).spec,
        prompt,
        target,
        strip=True,
        init_text=init_text,
    )


# Li & Liang's strings (branch `cleaned`, language_modeling.py and run_generation.py): " {src} {bos} " + tgt + " {eos}" with bos = eos;
# beam 5, words "table-to-text:". Their minimum of 5 tokens counts the prompt, so it binds nothing.
AUTHORS: dict[str, Any] = {
    "prompt": " {src} {eos}",
    "target": " {ref} ",
    "strip": True,
    "init_text": "table-to-text:",
    "decoding": {"num_beams": 5, "max_new_tokens": 100},
    "bad_words": ("\n\n", "\n"),  # their bad_words_ids, [[628], [198]]
}
E2E = Task("e2e", _rust.Linearizer.e2e().spec, **AUTHORS)
WEBNLG = Task("webnlg", _rust.Linearizer.webnlg().spec, **AUTHORS)
DART = Task("dart", _rust.Linearizer.dart().spec, **AUTHORS)
SUMMARY = Task("summary", prompt="{src}\n", strip=True, init_text="Summarize the following text:", input="document")
# Their summaries on a decoder-only base: source, end token, target, end token, nothing between; decoding as for BART in the paper (at most 62 tokens and
# at least 11, begin and end included).
XSUM = Task(
    "xsum",
    prompt="{src}{eos}",
    strip=True,
    init_text="summarize",
    decoding={"num_beams": 6, "max_new_tokens": 60, "min_new_tokens": 10, "length_penalty": 0.8},
    input="document",
)
TASKS = {
    "e2e": E2E,
    "webnlg": WEBNLG,
    "dart": DART,
    "table": table_task(),
    "summary": SUMMARY,
    "xsum": XSUM,
    "prompt": Task("prompt"),
    "messages": Task("messages", input="messages"),
    "text": Task("text", input="text", init_text="The following text"),
}
PLAIN, STRIPPED = TASKS["prompt"], Task("prompt", strip=True)


def find_task(task: str | Task | Mapping[str, Any] | None, row: Row) -> Task:
    """The task by name, object or spec; None: by the row's keys.

    Raises:
        ConfigError: For an unknown name.
        DataError: If the row says nothing, or several things.

    Example:
        >>> find_task(None, {"document": "...", "summary": "..."}).name
        'summary'
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return Task.from_spec(task)
    if task is None:
        task = BY_KEY[one_of(row, 0, INPUT_KEYS, " (or input_ids, or say which task)")]
    if task not in TASKS:
        msg = f"task: expected one of {', '.join(TASKS)} or a Task, got {task!r}"
        raise ConfigError(msg)
    return TASKS[task]


def request_task(task: Task, row: Row) -> Task:
    """The task that reads one request: ``task`` (its prefix's) if the row has that task's keys, else what the row's keys tell.

    Raises:
        DataError: If the row has no input, or several.
    """
    key = one_of(row, 0, (*INPUT_KEYS, "input_ids"))
    if key in FORMATS[task.format].inputs:
        return task
    if key in ("prompt", "input_ids"):
        return STRIPPED if task.strip else PLAIN
    return TASKS[BY_KEY[key]]


def _fill(template: str, **values: str) -> str:
    """Replace ``{name}`` of the known names only, in one pass: braces inside the values are data."""
    return re.sub("|".join(f"{{{name}}}" for name in values), lambda m: values[m[0][1:-1]], template)
