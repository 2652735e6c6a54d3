"""Row formats: the keys that hold the input and the target of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

FormatName: TypeAlias = Literal["prompt", "table", "document", "messages", "text", "columns"]


@dataclass(frozen=True)
class Format:
    """Keys of a format.

    Attributes:
        inputs: Keys for the input, of which a row has one.
        targets: Keys for the target, of which a training row has one; empty if the target is part of the input.
        tasks: Name of the task that reads a row with each input key if no task is named.
    """

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    tasks: tuple[str, ...]


FORMATS: dict[FormatName, Format] = {
    "prompt": Format(("prompt",), ("completion",), ("prompt",)),
    "table": Format(("mr", "table", "triples"), ("ref", "refs"), ("e2e", "table", "dart")),
    "document": Format(("document",), ("summary",), ("summary",)),
    "messages": Format(("messages",), (), ("messages",)),
    "text": Format(("text",), (), ("text",)),
    "columns": Format((), (), ()),  # the task names the columns of inputs and targets
}
INPUT_KEYS = tuple(k for f in FORMATS.values() for k in f.inputs)
TARGET_KEYS = tuple(k for f in FORMATS.values() for k in f.targets)
REQUEST_KEYS = ("prefix", "id", "params")
CHAT_KEYS = ("tools", "chat_template_kwargs")
MASK_KEYS = ("completion_mask", "assistant_masks")  # 1 marks a target
TOKENIZED_KEYS = ("input_ids", "labels", *MASK_KEYS, "attention_mask", "position_ids")
JSON_KEYS = ("messages", "table", "triples", "mr", "refs", "params", *CHAT_KEYS, *TOKENIZED_KEYS)  # lists or mappings
KNOWN_KEYS = frozenset({*INPUT_KEYS, *TARGET_KEYS, *REQUEST_KEYS, *CHAT_KEYS, *TOKENIZED_KEYS})
TASK_BY_KEY = {k: t for f in FORMATS.values() for k, t in zip(f.inputs, f.tasks, strict=True)}
