"""`TextReader`, which reads typed texts as the prefix that answers them was trained to read its prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from prefixfast.errors import DataError, RequestError

if TYPE_CHECKING:
    from prefixfast.data.chat import Message
    from prefixfast.data.encode import Ints
    from prefixfast.data.rows import Row
    from prefixfast.data.task import Task
    from prefixfast.model.base import Model
    from prefixfast.prefix.prefix import Prefix
    from prefixfast.store import StoredPrefix


class TextReader:
    """Turns typed texts into token ids.

    Args:
        model: Base model.
        conversation: Whether the base's chat template writes the texts as messages. None does so for prefixes that were
            trained on messages, and without a prefix or for one that names no task if the base has a chat template.
    """

    def __init__(self, model: Model, conversation: bool | None) -> None:
        self.model, self.conversation = model, conversation
        self.has_template = bool(getattr(model.require_tokenizer().hf, "chat_template", None))

    def task(self, prefixes: Sequence[Prefix | StoredPrefix]) -> Task:
        """Task that reads the texts for a prefix composed of these, from left to right.

        Args:
            prefixes: Prefixes, none for the base alone.
        """
        from prefixfast.data.builtin_tasks import PLAIN, TASKS
        from prefixfast.data.task import Task

        spec = next((p.task for p in reversed(prefixes) if p.task is not None), None)
        own = None if spec is None else Task.from_spec(spec)
        if self.conversation or (self.conversation is None and own is None and self.has_template):
            return own if own is not None and own.format == "messages" else TASKS["messages"]
        return PLAIN if own is None or (self.conversation is False and own.format == "messages") else own

    def describe(self, task: Task) -> str:
        """Sentence that says how a text becomes a prompt.

        Args:
            task: Task that reads the texts.
        """
        from prefixfast.data.typed_text import typed_form

        if task.format == "messages":
            return "the base's chat template writes the conversation"
        if form := typed_form(task):
            return form
        if self.has_template and self.conversation is None:
            return "every text is a prompt of its own, as the prefix was trained; --conversation keeps the conversation"
        if self.has_template:
            return "every text is a prompt of its own, without the base's chat template"
        return "every text is a prompt of its own, since the base has no chat template"

    def ids(self, text: str, task: Task, earlier: Sequence[Message] = ()) -> Ints:
        """Token ids of the prompt of a text.

        Args:
            text: Typed text.
            task: Task that reads it.
            earlier: Messages before the text, for a conversation.

        Raises:
            RequestError: If the text is none that the task reads.
        """
        from prefixfast.data.typed_text import typed_row

        return self._encode(lambda: typed_row(text, task, earlier), task)

    def row_ids(self, row: Row, task: Task) -> Ints:
        """Token ids of the prompt of a row.

        Args:
            row: Row.
            task: Task that reads it if it has the task's keys; the row's keys choose the task otherwise.

        Raises:
            RequestError: If the row has no input, or a wrong one.
        """
        from prefixfast.data.builtin_tasks import request_task

        return self._encode(lambda: row, request_task(task, row))

    def _encode(self, make_row: Callable[[], Row], task: Task) -> Ints:
        from prefixfast.data.encode import encode_prompts
        from prefixfast.data.typed_text import typed_form

        try:
            return encode_prompts(self.model, [make_row()], [task])[0]
        except (DataError, RequestError) as e:
            message = str(e).removeprefix("request 0: ")
            raise RequestError(f"{message}; {form}" if (form := typed_form(task)) else message) from e
