"""`Task`: how a row becomes a prompt and a target.

A task is data. It is stored in the prefix, so that generation builds the same prompts as training.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from prefixfast import _rust
from prefixfast.config.json_types import JSON
from prefixfast.data.chat import ChatTemplate, chat_pair, chat_text, is_conversation, split_conversation
from prefixfast.data.column_text import fill_template, table_entries, template_columns
from prefixfast.data.formats import FORMATS, FormatName
from prefixfast.data.layouts import input_key, input_text, target_text
from prefixfast.data.row_values import json_hint, only_key, references
from prefixfast.data.rows import Row, row_error
from prefixfast.errors import ConfigError, DataError, check_flag, check_mapping, check_string, shown, suggestion

LossOn = Literal["auto", "last", "assistant", "all"]


@dataclass(frozen=True)
class Task:
    r"""Rule that turns rows into prompts and targets.

    A task fits one row format. Rows with a table (key ``mr``, ``table`` or ``triples``) are first turned into text by
    the linearizer. `prefixfast.data.TASKS` holds the built-in tasks. `prefixfast.data.table_task` makes a task for
    your own tables, and `prefixfast.data.column_task` one for rows with columns of your own.

    Attributes:
        name: Name of the task, used in messages and recipes.
        linearizer: Settings, as a JSON string, of the linearizer that turns a table into text. None for rows without a
            table.
        prompt: Template of the prompt. ``{src}`` stands for the linearized table, the document or the prompt, ``{eos}``
            for the model's end token. Conversations and rows with ``text`` do not use the template: the tokenizer's
            chat template writes the former, and the latter are taken as they are. For the input ``"columns"`` without
            a linearizer, ``{name}`` stands for the value in column ``name``.
        target: Template of the target. ``{ref}`` stands for the reference, the summary or the completion. For the input
            ``"columns"``, ``{name}`` stands for the value in column ``name``. Training appends the end token, unless
            the target ends with it.
        strip: Whether leading and trailing white space is removed from generated text.
        init_text: Text whose keys and values a new prefix starts from.
        decoding: Default `GenerationParams` of prefixes that are trained on the task.
        bad_words: Strings that generation never produces. Training stores their tokens as ``bad_words_ids`` in the
            decoding defaults of the prefix.
        input: Format of the rows: ``"prompt"``, ``"table"``, ``"document"``, ``"messages"``, ``"text"`` or
            ``"columns"``. None is ``"table"`` if there is a linearizer, else ``"prompt"``.
        loss_on: Tokens of ``messages`` that count in the loss: ``"last"`` the last answer, ``"assistant"`` every turn
            that the chat template marks with ``{% generation %}``, ``"all"`` every token but the first. ``"auto"`` is
            ``"assistant"`` if the chat template has such marks, else ``"last"``.
        columns: Columns that the linearizer writes as a table, for the input ``"columns"`` with a linearizer.
        encoder_decoding: Default `GenerationParams` of prefixes of encoder-decoder base models, None for ``decoding``.

    Raises:
        ConfigError: If a field has a wrong value, or the linearizer does not match the format.

    Example:
        >>> task = Task("question", prompt="Q: {src}\nA:", target=" {ref}")
        >>> task.prompts([{"prompt": "2+2?"}], None), task.targets({"prompt": "2+2?", "completion": "4"}, 0)
        (['Q: 2+2?\nA:'], [' 4'])
    """

    name: str
    linearizer: str | None = None
    prompt: str = "{src}"
    target: str = "{ref}"
    strip: bool = False
    init_text: str = "Answer the request:"
    decoding: Mapping[str, JSON] = field(default_factory=dict)
    bad_words: Sequence[str] = ()
    input: FormatName | None = None
    loss_on: LossOn = "auto"
    columns: Sequence[str] = ()
    encoder_decoding: Mapping[str, JSON] | None = None

    def __post_init__(self) -> None:
        texts = ("name", "prompt", "target", "init_text") + (() if self.linearizer is None else ("linearizer",))
        for name in texts:
            check_string(f"task: {name}", getattr(self, name))
        check_flag(f"task {shown(self.name)}: strip", self.strip)
        check_mapping(f"task {shown(self.name)}: decoding", self.decoding)
        if self.encoder_decoding is not None:
            check_mapping(f"task {shown(self.name)}: encoder_decoding", self.encoder_decoding)
        for name in ("bad_words", "columns"):
            texts = getattr(self, name)
            if not isinstance(texts, list | tuple) or not all(isinstance(t, str) and t for t in texts):
                msg = f"task {shown(self.name)}: {name}: expected texts that are not empty, got {shown(texts)}"
                raise ConfigError(msg)
            object.__setattr__(self, name, tuple(texts))
        for name, known in (("input", (None, *FORMATS)), ("loss_on", get_args(LossOn))):
            if not isinstance(getattr(self, name), str | None) or getattr(self, name) not in known:
                msg = f"task {shown(self.name)}: {name}: expected one of {known}, got {shown(getattr(self, name))}"
                raise ConfigError(msg)
        self._check_linearizer()

    def _check_linearizer(self) -> None:
        """Raise `ConfigError` if linearizer, columns and templates do not match the format."""
        is_table = self.format == "table" or (self.format == "columns" and bool(self.columns))
        if is_table != (self.linearizer is not None) or (self.columns and self.format != "columns"):
            msg = (
                f"task {shown(self.name)}: expected a linearizer exactly for input 'table' and for columns of input "
                f"'columns', got {shown(self.linearizer)} and columns {shown(self.columns)} for {shown(self.format)}"
            )
            raise ConfigError(msg)
        if self.format == "columns":
            for name in ("target",) if is_table else ("prompt", "target"):
                try:
                    found = template_columns(getattr(self, name))
                except ConfigError as e:
                    msg = f"task {shown(self.name)}: {name}: {e}"
                    raise ConfigError(msg) from e
                if not found:
                    got = shown(getattr(self, name))
                    msg = f"task {shown(self.name)}: {name}: expected at least one column in braces, got {got}"
                    raise ConfigError(msg)

    @property
    def format(self) -> FormatName:
        """Format of the task's rows, a key of `prefixfast.data.formats.FORMATS`."""
        return self.input or ("prompt" if self.linearizer is None else "table")

    def prompts(self, rows: Sequence[Row], eos: str | None, chat: ChatTemplate | None = None) -> list[str]:
        """Prompts of requests. The target of a row, if there is one, is not read.

        Args:
            rows: Rows of the task's format, any number of them.
            eos: End token of the model; None counts as an empty string.
            chat: Chat template (`Tokenizer.chat`), needed for messages. The text of a conversation holds the special
                tokens already, so it is tokenized without adding any.

        Returns:
            One prompt for each row.

        Raises:
            DataError: If a row has no input, with the row's number or line, or if messages end with the assistant's
                message, which is no request.
        """
        if self.linearizer is not None:
            return [self._fill_prompt(source, eos) for source in self._linearize(rows)]
        return [self._prompt(row, i, eos, chat) for i, row in enumerate(rows)]

    def targets(self, row: Row, number: int) -> list[str]:
        """Targets of a row that is not a conversation.

        Args:
            row: Row. Each of its references is one target.
            number: Number of the row, for errors.

        Returns:
            Targets; empty for rows with ``text``, which are prompt and target in one.

        Raises:
            DataError: If the row has no target, with the row's number or line.
        """
        if self.format == "text":
            return []
        if self.format == "columns":
            target = fill_template(self.target, row, number, "target")
            if not target.strip():
                names = ", ".join(map(shown, template_columns(self.target)))
                msg = f"target: expected text in column {names}, got {shown(target)}; fill it in or leave the row out"
                raise row_error(row, number, msg)
            return [target]
        several = self.format == "table" or (self.format == "document" and row.get("refs") is not None)
        refs = references(row, number, self.format) if several else [target_text(row, number, self.format)]
        return refs if self.target == "{ref}" else [_fill(self.target, ref=r) for r in refs]

    def pairs(
        self, rows: Sequence[Row], eos: str | None, chat: ChatTemplate | None = None
    ) -> list[tuple[str, list[str]]]:
        """Prompt and targets of training rows. The target of a conversation is its answer.

        Args:
            rows: Rows of the task's format, any number of them.
            eos: End token of the model; None counts as an empty string.
            chat: Chat template (`Tokenizer.chat`), needed for messages.

        Returns:
            Prompt and targets of each row.

        Raises:
            DataError: If a row is malformed, with its number or line.
        """
        if self.linearizer is not None:
            prompts = self.prompts(rows, eos)
            return [(prompt, self.targets(row, i)) for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))]
        out = []
        for i, row in enumerate(rows):
            if self.is_chat(row):
                prompt, target = chat_pair(row, i, chat)
                out.append((prompt, [target]))
            else:
                out.append((self._prompt(row, i, eos, chat), self.targets(row, i)))
        return out

    def is_chat(self, row: Row) -> bool:
        """Whether the tokenizer's chat template writes the row."""
        return self.format in ("prompt", "messages") and is_conversation(row)

    def is_tokenized(self, row: Row) -> bool:
        """Whether the row is read by its token ids, which only a task of columns does not do."""
        return "input_ids" in row and self.format != "columns"

    def clean(self, text: str) -> str:
        """Generated text, without leading and trailing white space if ``strip`` is set."""
        return text.strip() if self.strip else text

    def spec(self) -> dict[str, JSON]:
        """Fields of the task as JSON values."""
        fields: dict[str, JSON] = json.loads(json.dumps(dataclasses.asdict(self)))
        for name in ("columns", "encoder_decoding"):
            if not getattr(self, name):
                del fields[name]  # earlier versions do not know the field
        return fields

    def stored_spec(self) -> dict[str, JSON]:
        """`spec` as it is stored as `Prefix.task`, beside the prefix's own defaults of generation."""
        return dataclasses.replace(self, encoder_decoding=None).spec()

    @classmethod
    def from_spec(cls, spec: Mapping[str, JSON]) -> Task:
        """Make the task that a `spec` describes. Missing fields take their defaults.

        Args:
            spec: Fields by name.

        Raises:
            ConfigError: If a key is unknown, the name is missing, or a value has a wrong type.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := set(spec) - known:
            first = min(map(str, unknown))
            msg = f"task: unknown key {shown(first)}; {suggestion(first, sorted(known), listed=99)}"
            raise ConfigError(msg)
        if "name" not in spec:
            msg = "task: name: expected str, got nothing"
            raise ConfigError(msg)
        for name, value in spec.items():
            kinds = {"strip": bool, "bad_words": Sequence, "columns": Sequence}
            kind = Mapping if name in ("decoding", "encoder_decoding") else kinds.get(name, str)
            optional = name in ("linearizer", "input", "encoder_decoding") and value is None
            if not isinstance(value, kind) and not optional:
                msg = f"task: {name}: expected {kind.__name__.lower()}, got {shown(value)}"
                raise ConfigError(msg)
        fields: dict[str, Any] = dict(spec)
        return cls(**fields)

    def _linearize(self, rows: Sequence[Row]) -> list[str]:
        """Texts of the rows' tables. If the batch is refused, each table is tried alone to find the wrong one."""
        linearizer = _rust.Linearizer.from_spec(self.linearizer or "")
        tables: list[Any] = [self._table(row, i) for i, row in enumerate(rows)]
        try:
            return linearizer.linearize(tables)
        except (DataError, UnicodeEncodeError) as first:
            for i, (row, table) in enumerate(zip(rows, tables, strict=True)):
                try:
                    linearizer.linearize([table])
                except UnicodeEncodeError:
                    message = "the table: expected Unicode text, got half a surrogate pair"
                    raise row_error(row, i, message) from first
                except DataError as e:
                    raise row_error(row, i, str(e).removeprefix("row 0: ") + json_hint(table)) from first
            raise

    def _table(self, row: Row, number: int) -> Any:
        """Table of a row, as the linearizer takes it."""
        if self.format == "columns":
            return table_entries(tuple(self.columns), row, number)
        return row[only_key(row, number, FORMATS["table"].inputs)]

    def _prompt(self, row: Row, number: int, eos: str | None, chat: ChatTemplate | None) -> str:
        if self.format == "columns":
            return fill_template(self.prompt, row, number, "prompt")
        key = input_key(row, number, self.format)
        if self.is_chat(row):
            context, answer = split_conversation(row, number)
            if answer and key != "prompt":
                msg = (
                    f"{key}: expected a request, which ends before the answer, got the assistant's message as the "
                    "last; leave it out"
                )
                raise row_error(row, number, msg)
            return chat_text(row, number, chat, context, generation_prompt=True)
        source = input_text(row, number, key)
        return source if self.format == "text" else self._fill_prompt(source, eos)

    def _fill_prompt(self, source: str, eos: str | None) -> str:
        return source if self.prompt == "{src}" else _fill(self.prompt, src=source, eos=eos or "")


def _fill(template: str, **values: str) -> str:
    """Replace ``{name}`` of the given names in one pass, so that braces inside the values stay as they are."""
    return re.sub("|".join(f"{{{name}}}" for name in values), lambda m: values[m[0][1:-1]], template)
