"""Tasks for rows with a user's own columns, and what such a task reads of a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from prefixfast import _rust
from prefixfast.config.json_types import JSON
from prefixfast.data.column_names import column_error, listed
from prefixfast.data.column_text import cell_text, find_columns, template_columns
from prefixfast.data.formats import CHAT_KEYS, FORMATS, INPUT_KEYS, REQUEST_KEYS, TARGET_KEYS, TOKENIZED_KEYS
from prefixfast.data.layouts import layout_keys, layout_targets
from prefixfast.data.rows import Row, row_error
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, check_string, shown

TaskLike: TypeAlias = str | Task | Mapping[str, JSON] | None
# Columns with a meaning of their own, what of it a mapping that reads the column takes away, and what stays otherwise.
RESERVED = dict.fromkeys(
    (*INPUT_KEYS, *TARGET_KEYS, *TOKENIZED_KEYS, *CHAT_KEYS), ("has no other meaning", "is not read")
) | {
    "id": ("is not returned with a result", "is returned with the result of a request"),
    "prefix": ("names no prefix", "names the prefix of a request"),
    "params": ("sets no options of generation", "sets options of generation of a request"),
}


def column_task(
    *,
    target: str | None,
    prompt: str | None = None,
    table: Sequence[str] | None = None,
    item: str = "{key} : {value}",
    separator: str = " | ",
    init_text: str | None = None,
) -> Task:
    r"""Make a task for rows with columns of your own.

    A ``target`` without braces is the name of a column. Its text then starts with a space, unless the prompt ends with
    a line break or a tab: most tokenizers join a space to the word after it. Spaces at the end of ``prompt`` are moved
    there too. A ``target`` with braces is a template, and it and ``prompt`` are used exactly as they are.

    Args:
        target: Column of the target, or its template.
        prompt: Template of the prompt, in which ``{column}`` stands for a column's value, and ``{{`` and ``}}`` for
            braces.
        table: Columns that are written as a table, instead of ``prompt``. Missing values are left out.
        item: Template of one entry of the table, with ``{key}`` and ``{value}``.
        separator: Text between two entries.
        init_text: Text whose keys and values a new prefix starts from. None names the columns of the target.

    Returns:
        A task that removes leading and trailing white space from generated text.

    Raises:
        ConfigError: If not exactly one of ``prompt`` and ``table`` is given, or a template names no column.

    Example:
        >>> task = column_task(prompt="{product_name}, {price} ->", target="description")
        >>> row = {"product_name": "Mill", "price": 12.5, "description": "A mill."}
        >>> task.prompts([row], None), task.targets(row, 0)
        (['Mill, 12.5 ->'], [' A mill.'])
        >>> table = column_task(table=["name", "price"], target="text")
        >>> table.prompts([{"name": "Mill", "price": None}, {"Name": "Fan", "Price": 3}], None)
        ['name : Mill\n', 'name : Fan | price : 3\n']
    """
    if (prompt is None) == (table is None):
        got = "none of them" if prompt is None else "both"
        msg = f"prompt and table: expected one of them to say which columns the model reads, got {got}"
        raise ConfigError(msg)
    if target is None:
        msg = "target: expected the column (or the template) of the text to learn beside prompt or table, got nothing"
        raise ConfigError(msg)
    check_string("target", target, "the name of a column, or a template with columns in braces")
    if table is None:
        check_string("prompt", prompt, "a template with columns in braces")
        linearizer, start = None, str(prompt)
    else:
        columns = _checked_columns(table)
        linearizer, start = _rust.Linearizer.template(item=item, separator=separator).spec, "{src}\n"
    if "{" not in target and "}" not in target:
        start, target = _joined(start, target.strip())
    words = " and ".join(name.replace("_", " ") for name in _columns_of("target", target))
    if table is None:
        _columns_of("prompt", start)
    return Task(
        "columns",
        linearizer,
        start,
        target,
        strip=True,
        init_text=f"Write the {words}:" if init_text is None else init_text,
        input="columns",
        columns=() if table is None else columns,
    )


def task_of_columns(task: TaskLike, *, prompt: str | None, target: str | None, table: Sequence[str] | None) -> TaskLike:
    """The task that ``prompt``, ``target`` and ``table`` make, or ``task`` without any of them.

    Raises:
        ConfigError: If there are both, or the three do not make a task.
    """
    given = {n: v for n, v in (("prompt", prompt), ("target", target), ("table", table)) if v is not None}
    if not given:
        return task
    if task is not None:
        names, got = " and ".join(given), task.name if isinstance(task, Task) else task
        msg = f"task: expected none beside {names}, which make a task of their own, got {shown(got)}; leave one out"
        raise ConfigError(msg)
    return column_task(prompt=prompt, target=target, table=table)


def _checked_columns(table: object) -> tuple[str, ...]:
    names = tuple(table) if isinstance(table, Sequence) and not isinstance(table, str) else ()
    if not names or not all(isinstance(n, str) and n.strip() for n in names) or len(set(names)) != len(names):
        msg = f"table: expected different names of columns, as in table=['name', 'price'], got {shown(table)}"
        raise ConfigError(msg)
    return names


def _columns_of(field: str, template: str) -> tuple[str, ...]:
    try:
        names = template_columns(template)
    except ConfigError as e:
        msg = f"{field}: {e}"
        raise ConfigError(msg) from e
    if not names:
        msg = f"{field}: expected at least one column in braces, as in '{{name}} ->', got {shown(template)}"
        raise ConfigError(msg)
    return names


def _joined(prompt: str, column: str) -> tuple[str, str]:
    """Templates of a prompt and of the column that follows it."""
    if not column:
        msg = "target: expected the name of a column, or a template with columns in braces, got an empty string"
        raise ConfigError(msg)
    body = prompt.rstrip(" ")
    gap = prompt[len(body) :] or ("" if body[-1:].isspace() else " ")
    return body, f"{gap}{{{column}}}"


def input_columns(task: Task) -> tuple[str, ...]:
    """Columns that a task of columns reads as the input."""
    return tuple(task.columns) or template_columns(task.prompt)


def content_keys(task: Task, row: Row) -> frozenset[str]:
    """Keys of a row that a task of columns reads as text, of the input and the target; empty for another task."""
    if task.format != "columns":
        return frozenset()
    names = (*input_columns(task), *template_columns(task.target))
    return frozenset(key for key in find_columns(names, tuple(row)) if key is not None)


def has_own_columns(task: Task, row: Row) -> bool:
    """Whether the task is one of columns, and the row has at least one of those of its input."""
    return task.format == "columns" and any(k is not None for k in find_columns(input_columns(task), tuple(row)))


def missing_columns(task: Task, row: Row) -> str:
    """Error message for a row without any column of the input of a task of columns."""
    names = input_columns(task)
    return f"{'table' if task.columns else 'prompt'}: {column_error(names[0], row)}; the prefix reads {listed(names)}"


def has_target(task: Task, row: Row) -> bool:
    """Whether the row has a target: a key of one, or for a task of columns a value in each column of the target."""
    if task.format != "columns":
        return any(key in row for key in (*TARGET_KEYS, *layout_targets(row, task.format)))
    keys = find_columns(template_columns(task.target), tuple(row))
    return all(key is not None and (cell_text(row, 0, key) or "").strip() for key in keys)


def check_columns(task: Task, rows: Sequence[Row]) -> None:
    """Check that each column that a task of columns reads exists in some row.

    Raises:
        DataError: If a column is missing, with the columns that exist and the nearest of them.
    """
    if task.format == "columns":
        kinds = [*dict.fromkeys(map(tuple, rows))]
        fields = {"table" if task.columns else "prompt": input_columns(task), "target": template_columns(task.target)}
        for field, name in ((field, name) for field, names in fields.items() for name in names):
            if all(find_columns((name,), keys) == (None,) for keys in kinds):
                message = column_error(name, dict.fromkeys(key for keys in kinds for key in keys))
                raise row_error(rows[0], 0, f"{field}: {message}")


def unread_columns(task: Task, rows: Sequence[Row]) -> list[str]:
    """Columns that neither the task nor a request reads, in alphabetical order."""
    own = FORMATS[task.format]
    known = {*REQUEST_KEYS, *own.inputs, *own.targets, *(layout_keys(rows[0], task.format) if rows else ())}
    if task.format != "columns":
        known |= {*TOKENIZED_KEYS, *CHAT_KEYS}
    found: set[str] = set()
    for keys in dict.fromkeys(map(tuple, rows)):
        found |= {str(k) for k in keys} - known - content_keys(task, dict.fromkeys(keys))
    return sorted(found)


def empty_values(task: Task, rows: Sequence[Row]) -> list[str]:
    """Sentences on the columns of a prompt's template that are empty text in some rows."""
    counts: Counter[str] = Counter()
    if task.format == "columns" and not task.columns:
        names = input_columns(task)
        for row in rows:
            keys = find_columns(names, tuple(row))
            counts.update(k for k in keys if k is not None and isinstance(v := row[k], str) and not v.strip())
    advice = "leave the rows out, fill them in, or use table, which leaves out empty values"
    return [f"column {shown(k)} is empty in {n} of {len(rows)} rows; {advice}" for k, n in counts.items()]


def reserved_notes(task: Task, rows: Iterable[Row]) -> list[str]:
    """Sentences on columns of rows whose names have a meaning in other rows.

    Args:
        task: Task of columns; there are no notes for another task.
        rows: Rows.
    """
    if task.format != "columns":
        return []
    used: set[str] = set()
    unused: set[str] = set()
    for keys in dict.fromkeys(map(tuple, rows)):
        own = content_keys(task, dict.fromkeys(keys))
        used |= own & RESERVED.keys()
        unused |= (RESERVED.keys() & {*keys}) - own
    notes = [f"column {shown(k)} is read by the mapping, so that it {RESERVED[k][0]}" for k in sorted(used)]
    return notes + [f"column {shown(k)} is not in the mapping and {RESERVED[k][1]}" for k in sorted(unused)]
