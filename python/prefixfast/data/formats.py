"""Row formats: the keys that hold the input and the target of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

FormatName: TypeAlias = Literal["prompt", "table", "document", "messages", "text", "instruction", "columns"]


@dataclass(frozen=True)
class Format:
    """Keys of a format.

    Attributes:
        inputs: Keys for the input, of which a row has one.
        targets: Keys for the target, of which a training row has one; empty if the target is part of the input. Where
            the targets are texts, the first key counts that the row has; ``refs`` holds several, and stands alone.
        tasks: Name of the task that reads a row with each input key if no task is named.
    """

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    tasks: tuple[str, ...]


FORMATS: dict[FormatName, Format] = {
    "prompt": Format(("prompt",), ("completion", "response"), ("prompt",)),
    "table": Format(("mr", "table", "triples"), ("ref", "refs"), ("e2e", "table", "dart")),
    "document": Format(("document",), ("summary", "refs"), ("summary",)),
    "messages": Format(("messages",), (), ("messages",)),
    "text": Format(("text",), (), ("text",)),
    "instruction": Format((), (), ()),  # layouts name the keys
    "columns": Format((), (), ()),  # the task names the columns of inputs and targets
}


@dataclass(frozen=True)
class Layout:
    """Keys of rows as public data sets have them, read where a row has no input key of `FORMATS`.

    Attributes:
        key: Key that shows the layout.
        format: Format of the task that reads the rows.
        task: Name of that task.
        parts: Keys whose texts are the input, with a blank line between them. A part other than ``key`` may be absent
            or empty.
        targets: Keys for the target, of which a training row has one; empty for conversations.
    """

    key: str
    format: FormatName
    task: str
    parts: tuple[str, ...]
    targets: tuple[str, ...]


ANSWERS = ("output", "response", "answer", "completion")
LAYOUTS = {
    layout.key: layout
    for layout in (
        Layout("instruction", "instruction", "instruction", ("instruction", "context", "input"), ANSWERS),
        Layout("question", "instruction", "instruction", ("context", "question"), ANSWERS),
        Layout("query", "instruction", "instruction", ("context", "query"), ("answer", "response")),
        Layout("input", "instruction", "instruction", ("input",), ("output",)),
        Layout("article", "document", "summary", ("article",), ("summary", "highlights")),
        Layout("dialogue", "document", "summary", ("dialogue",), ("summary",)),
        Layout("conversations", "messages", "messages", ("conversations",), ()),
    )
}
LAYOUT_KEYS = tuple(dict.fromkeys(k for one in LAYOUTS.values() for k in (*one.parts, *one.targets)))
INPUT_KEYS = tuple(k for f in FORMATS.values() for k in f.inputs)
TARGET_KEYS = tuple(k for f in FORMATS.values() for k in f.targets)
REQUEST_KEYS = ("prefix", "id", "params")
CHAT_KEYS = ("tools", "chat_template_kwargs")
MASK_KEYS = ("completion_mask", "assistant_masks")  # 1 marks a target
TOKENIZED_KEYS = ("input_ids", "labels", *MASK_KEYS, "attention_mask", "position_ids")
JSON_KEYS = ("messages", "conversations", "table", "triples", "mr", "refs", "params", *CHAT_KEYS, *TOKENIZED_KEYS)
TOPIC_KEYS = ("topic", "topic1", "topic2", "topic3")  # DialogSum has one for each summary
CORPUS_KEYS = frozenset({"category", "subset", "shape", "lang", "source", "fname", *TOPIC_KEYS})  # of official files
KNOWN_KEYS = frozenset({*INPUT_KEYS, *TARGET_KEYS, *REQUEST_KEYS, *CHAT_KEYS, *TOKENIZED_KEYS})
NAMED_KEYS = KNOWN_KEYS | {*LAYOUT_KEYS}  # names of columns with a meaning in some row
TASK_BY_KEY = {k: t for f in FORMATS.values() for k, t in zip(f.inputs, f.tasks, strict=True)}
