"""The row that a typed text stands for, such as a line of a conversation or an argument of a command."""

from __future__ import annotations

import json
from collections.abc import Sequence

from prefixfast.config.json_types import JSON
from prefixfast.data.chat import Message
from prefixfast.data.columns import input_columns
from prefixfast.data.formats import FORMATS
from prefixfast.data.rows import Row
from prefixfast.data.task import Task
from prefixfast.errors import DataError, shown


def typed_row(text: str, task: Task, earlier: Sequence[Message] = ()) -> Row:
    """Make the row of a typed text.

    Args:
        text: Text. For a task that reads tables it is a row as a JSON object, the table alone as JSON, or slots like
            ``name[Blue Spice]``. For a task of columns it is a row as a JSON object, or the value of its only column.
        task: Task that reads the row. The text is the document, prompt or whole text of other formats.
        earlier: Messages before the text, for the format ``"messages"``. The text is the user's next message.

    Returns:
        Row with an input and no target.

    Raises:
        DataError: If the text is no such row.

    Example:
        >>> from prefixfast.data import TASKS
        >>> typed_row("tea and rain", TASKS["summary"]), typed_row('{"name": "Ada"}', TASKS["table"])
        ({'document': 'tea and rain'}, {'table': {'name': 'Ada'}})
    """
    if task.format == "messages":
        return {"messages": [*earlier, {"role": "user", "content": text}]}
    keys = input_columns(task) if task.format == "columns" else FORMATS[task.format].inputs
    if task.format not in ("table", "columns"):
        return {keys[0]: text}
    value = _json_value(text)
    if task.format == "columns":
        if isinstance(value, dict):
            return value
        if value is None and len(keys) == 1:
            return {keys[0]: text}
        msg = f"expected a row with the columns {', '.join(keys)}, got {shown(text)}"
        raise DataError(msg)
    if isinstance(value, dict) and any(key in value for key in keys):
        return value
    return {"mr": text} if value is None else {"table": value}


def typed_form(task: Task) -> str | None:
    """Sentence that says in which form a task reads a typed text, None for one that reads any text."""
    if task.format == "columns":
        example = json.dumps(dict.fromkeys(input_columns(task), "..."), ensure_ascii=False)
        return f"the prefix reads rows: give one as JSON, such as {example}"
    if task.format == "table":
        return 'the prefix reads tables: give a row as JSON, such as {"table": {"name": "Ada", "born": "1815"}}'
    return None


def _json_value(text: str) -> JSON:
    """Object or list that a text holds as JSON, None for a text that does not begin like one.

    Raises:
        DataError: If the text begins like JSON and is not JSON.
    """
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        msg = f"expected a row as JSON, got {shown(text)}: {e}"
        raise DataError(msg) from e
