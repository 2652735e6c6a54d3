"""Row formats: under which keys a row has its input and its target, and the checks of what stands there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixfast.data.rows import Row, row_error
from prefixfast.errors import DataError

Message = Mapping[str, Any]
Chat = Callable[..., str]  # `Tokenizer.chat`


@dataclass(frozen=True)
class Format:
    """The keys of a format.

    Attributes:
        inputs: A row has one of these.
        targets: A training row has one of these too; none: the target is part of the input.
        task: The task of a row with each input key when nobody names one.
    """

    inputs: tuple[str, ...]
    targets: tuple[str, ...]
    task: tuple[str, ...]


FORMATS = {
    "prompt": Format(("prompt",), ("completion",), ("prompt",)),
    "table": Format(("mr", "table", "triples"), ("ref", "refs"), ("e2e", "table", "dart")),
    "document": Format(("document",), ("summary",), ("summary",)),
    "messages": Format(("messages",), (), ("messages",)),
    "text": Format(("text",), (), ("text",)),
}
INPUT_KEYS = tuple(k for f in FORMATS.values() for k in f.inputs)
TARGET_KEYS = tuple(k for f in FORMATS.values() for k in f.targets)
CHAT_KEYS = ("tools", "chat_template_kwargs")
BY_KEY = {k: t for f in FORMATS.values() for k, t in zip(f.inputs, f.task, strict=True)}


def one_of(row: Row, number: int, keys: Sequence[str], hint: str = "") -> str:
    """The one key of ``keys`` that the row has; columns that are None are absent, as tables of mixed rows have them.

    Raises:
        DataError: If it has none or several.
    """
    found = [k for k in keys if row.get(k) is not None]
    if len(found) != 1:
        got = f"{' and '.join(found)}; remove all but one" if found else f"the keys {sorted(map(str, row))}"
        msg = f"expected one of the keys {', '.join(keys)}{hint}, got {got}"
        raise row_error(row, number, msg)
    return found[0]


def text(row: Row, number: int, key: str) -> str:
    """A string of the row.

    Raises:
        DataError: If it is missing, something else, or no Unicode text.
    """
    return checked(row, number, key, row.get(key))


def checked(row: Row, number: int, key: str, value: Any) -> str:
    """``value`` if it is a string that UTF-8 can hold.

    Raises:
        DataError: If not.
    """
    if not isinstance(value, str):
        msg = f"{key}: expected a string, got {value!r:.80}; the row has {sorted(map(str, row))}"
        raise row_error(row, number, msg)
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError as e:
        msg = f"{key}: expected Unicode text, got half a surrogate pair at character {e.start}"
        raise row_error(row, number, msg) from e
    return value


def references(row: Row, number: int) -> list[str]:
    """The references of a table, under ``ref`` (a string) or ``refs`` (a list of strings).

    Raises:
        DataError: If there are none.
    """
    if one_of(row, number, FORMATS["table"].targets) == "ref":
        return [text(row, number, "ref")]
    refs = row["refs"]
    if not isinstance(refs, Sequence) or isinstance(refs, str) or not refs:
        msg = f"refs: expected a list of strings, got {refs!r:.80}"
        raise row_error(row, number, msg)
    return [checked(row, number, f"refs[{i}]", r) for i, r in enumerate(refs)]


def is_conversation(row: Row) -> bool:
    """Whether the row's input is a list of messages, which the tokenizer's chat template writes."""
    prompt = row.get("prompt")
    return row.get("messages") is not None or (isinstance(prompt, Sequence) and not isinstance(prompt, str))


def conversation(row: Row, number: int) -> tuple[list[Message], list[Message]]:
    """What a conversation begins with, and its answer.

    The answer is the ``completion``, or of ``messages`` the last one if it is the assistant's (else there is none).

    Raises:
        DataError: For what is no list of messages.
    """
    if row.get("messages") is not None:
        every = messages(row, number, "messages")
        answered = every[-1]["role"] == "assistant"
        return (every[:-1], every[-1:]) if answered else (every, [])
    context = messages(row, number, "prompt")
    return context, messages(row, number, "completion") if row.get("completion") is not None else []


def messages(row: Row, number: int, key: str) -> list[Message]:
    """A list of messages with role and content, at least one.

    Raises:
        DataError: If it is something else.
    """
    value = row[key]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        other = (
            " (prompt and completion are both strings or both lists of messages)"
            if key in ("prompt", "completion")
            else ""
        )
        msg = f'{key}: expected a list of messages like {{"role": "user", "content": "..."}}, got {value!r:.80}{other}'
        raise row_error(row, number, msg)
    for i, message in enumerate(value):
        where = f"{key}[{i}]"
        if not isinstance(message, Mapping):
            msg = f"{where}: expected a message with role and content, got {message!r:.80}"
            raise row_error(row, number, msg)
        checked(row, number, f"{where}.role", message.get("role"))
        if message.get("content") is not None or not message.get("tool_calls"):
            checked(row, number, f"{where}.content", message.get("content"))
    return list(value)


def chat_text(row: Row, number: int, chat: Chat | None, history: list[Message], *, generation_prompt: bool) -> str:
    """A conversation as the chat template writes it, with the row's ``tools`` and ``chat_template_kwargs``.

    Raises:
        DataError: If the template refuses it.
    """
    if chat is None:
        raise row_error(row, number, "messages need a tokenizer with a chat template")
    options = chat_options(row, number)
    try:
        written = chat(history, generation_prompt=generation_prompt, **options)
    except DataError as e:
        raise row_error(row, number, str(e)) from e
    return checked(row, number, "messages", written)


def chat_options(row: Row, number: int) -> dict[str, Any]:
    """Arguments of `Tokenizer.chat` that stand in the row.

    Raises:
        DataError: For values of another kind.
    """
    options = row.get("chat_template_kwargs") or {}
    tools = row.get("tools")
    if isinstance(tools, str):  # as columns of tables hold them
        try:
            tools = json.loads(tools)
        except ValueError as e:
            msg = f"tools: expected a list, or one as JSON, got {tools[:80]!r}: {e}"
            raise row_error(row, number, msg) from e
    if not isinstance(options, Mapping) or not isinstance(tools, list | None):
        msg = f"expected tools as a list and chat_template_kwargs as a mapping, got {tools!r:.80} and {options!r:.80}"
        raise row_error(row, number, msg)
    return {"tools": tools, "options": dict(options)}


def chat_pair(row: Row, number: int, chat: Chat | None) -> tuple[str, str]:
    """Prompt and target of a conversation: the text up to its answer as a request would have it, and the rest.

    Raises:
        DataError: If there is no answer, or the template writes the beginning differently once the answer is known.
    """
    context, answer = conversation(row, number)
    if not answer or not context:
        what = (
            "messages that end with the assistant's, after at least one other"
            if row.get("messages") is not None
            else "a completion"
        )
        msg = f"expected {what}, got {[m['role'] for m in (*context, *answer)]}"
        raise row_error(row, number, msg)
    prompt = chat_text(row, number, chat, context, generation_prompt=True)
    whole = chat_text(row, number, chat, context + answer, generation_prompt=False)
    if not whole.startswith(prompt):
        msg = (
            f"the chat template writes the conversation up to the answer as {prompt[-60:]!r}, but the whole differently there; "
            "give prompt and completion as strings"
        )
        raise row_error(row, number, msg)
    return prompt, whole[len(prompt) :]
