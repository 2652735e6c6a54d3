"""Conversations: lists of messages that the tokenizer's chat template turns into text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypedDict

from prefixfast.config.json_types import JSON
from prefixfast.data.row_values import check_text, json_hint
from prefixfast.data.rows import Row, row_error
from prefixfast.errors import DataError, shown

Message: TypeAlias = Mapping[str, JSON]
ROLES = {  # role by the ``from`` of ShareGPT's messages
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


class ChatTemplate(Protocol):
    """Function that turns a conversation into text, such as `Tokenizer.chat`."""

    def __call__(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        tools: list[Mapping[str, JSON]] | None = None,
        options: Mapping[str, JSON] | None = None,
    ) -> str:
        """Text of a conversation, special tokens included.

        Args:
            messages: Messages with ``role`` and ``content``.
            generation_prompt: Whether the text ends with the opening of the assistant's turn.
            tools: Tools that the template describes.
            options: Further variables of the template.
        """


class ChatOptions(TypedDict):
    """Arguments of a `ChatTemplate` from the row's ``tools`` and ``chat_template_kwargs``."""

    tools: list[Mapping[str, JSON]] | None
    options: dict[str, JSON]


def is_conversation(row: Row) -> bool:
    """Whether the input of the row is a list of messages."""
    if row.get("messages") is not None:
        return True
    if (prompt := row.get("prompt")) is not None:
        return isinstance(prompt, Sequence) and not isinstance(prompt, str)
    return row.get("conversations") is not None


def split_conversation(row: Row, number: int) -> tuple[list[Message], list[Message]]:
    """Split a conversation into its context and its answer.

    The answer is the ``completion``. Of ``messages`` it is the last message if the assistant wrote it, else empty.

    Raises:
        DataError: If the row holds something else than a list of messages.
    """
    if row.get("messages") is not None or row.get("prompt") is None:
        every = read_messages(row, number, "conversations" if row.get("messages") is None else "messages")
        answered = every[-1]["role"] == "assistant"
        return (every[:-1], every[-1:]) if answered else (every, [])
    context = read_messages(row, number, "prompt")
    return context, read_messages(row, number, "completion") if row.get("completion") is not None else []


def read_messages(row: Row, number: int, key: str) -> list[Message]:
    """The messages under a key of the row, each with role and content, at least one.

    Raises:
        DataError: If the value is something else.
    """
    value = row[key]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        both = " (prompt and completion are both strings or both lists of messages)"
        hint = both if key in ("prompt", "completion") else json_hint(value)
        msg = f'{key}: expected a list of messages like {{"role": "user", "content": "..."}}, got {shown(value)}{hint}'
        raise row_error(row, number, msg)
    found: list[Message] = []
    for i, message in enumerate(value):
        where = f"{key}[{i}]"
        if not isinstance(message, Mapping):
            msg = f"{where}: expected a message with role and content, got {shown(message)}"
            raise row_error(row, number, msg)
        if "role" not in message and "from" in message:
            message = _sharegpt_message(row, number, where, message)
        check_text(row, number, f"{where}.role", message.get("role"))
        if message.get("content") is not None or not message.get("tool_calls"):
            check_text(row, number, f"{where}.content", message.get("content"))
        found.append(message)
    system = row.get("system") if key == "conversations" and found[0]["role"] != "system" else None
    return [{"role": "system", "content": check_text(row, number, "system", system)}, *found] if system else found


def _sharegpt_message(row: Row, number: int, where: str, message: Message) -> Message:
    """A message with role and content of one with ``from`` and ``value``."""
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise row_error(row, number, f"{where}.from: expected one of {', '.join(ROLES)}, got {shown(speaker)}")
    return {"role": ROLES[speaker], "content": check_text(row, number, f"{where}.value", message.get("value"))}


def chat_text(
    row: Row, number: int, template: ChatTemplate | None, messages: list[Message], *, generation_prompt: bool
) -> str:
    """Text of a conversation by the chat template, with the row's ``tools`` and ``chat_template_kwargs``.

    Raises:
        DataError: If there is no template, or the template refuses the conversation.
    """
    if template is None:
        raise row_error(row, number, "messages need a tokenizer with a chat template")
    options = chat_options(row, number)
    try:
        written = template(messages, generation_prompt=generation_prompt, **options)
    except DataError as e:
        raise row_error(row, number, str(e)) from e
    return check_text(row, number, "messages", written)


def chat_options(row: Row, number: int) -> ChatOptions:
    """Arguments for the chat template that the row holds.

    Raises:
        DataError: If ``tools`` is not a list or ``chat_template_kwargs`` not a mapping.
    """
    options = row.get("chat_template_kwargs") or {}
    tools: Any = row.get("tools")
    if isinstance(tools, str):  # a column of a table holds the list as a JSON string
        try:
            tools = json.loads(tools)
        except ValueError as e:
            msg = f"tools: expected a list, or one as JSON, got {shown(tools[:80])}: {e}{json_hint(tools)}"
            raise row_error(row, number, msg) from e
    if not isinstance(options, Mapping) or not isinstance(tools, list | None):
        msg = f"expected tools as a list and chat_template_kwargs as a mapping, got {shown(tools)} and {shown(options)}"
        raise row_error(row, number, msg)
    return {"tools": tools, "options": dict(options)}


def chat_pair(row: Row, number: int, template: ChatTemplate | None) -> tuple[str, str]:
    """Prompt and target of a conversation.

    The prompt is the text up to the answer, as a request has it. The target is the rest of the whole conversation's
    text.

    Raises:
        DataError: If there is no answer, or the text of the whole conversation does not begin with the prompt.
    """
    context, answer = split_conversation(row, number)
    if not answer or not context:
        of_messages = "messages that end with the assistant's, after at least one other"
        what = "a completion" if row.get("messages") is None and row.get("prompt") is not None else of_messages
        msg = f"expected {what}, got {[m['role'] for m in (*context, *answer)]}"
        raise row_error(row, number, msg)
    prompt = chat_text(row, number, template, context, generation_prompt=True)
    whole = chat_text(row, number, template, context + answer, generation_prompt=False)
    if not whole.startswith(prompt):
        msg = (
            f"the chat template writes the conversation up to the answer as {shown(prompt[-60:])}, but the text of the "
            "whole conversation differs there; give prompt and completion as strings"
        )
        raise row_error(row, number, msg)
    return prompt, whole[len(prompt) :]
