"""The built-in tasks, and the choice of a task by its name or by the keys of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prefixfast import _rust
from prefixfast.config.json_types import JSON
from prefixfast.data.columns import has_own_columns, missing_columns
from prefixfast.data.formats import FORMATS, INPUT_KEYS, LAYOUTS, TARGET_KEYS, TASK_BY_KEY
from prefixfast.data.layouts import complete_layout, recognized_layout, request_layout
from prefixfast.data.row_values import only_key
from prefixfast.data.rows import Row, is_table_row, row_error
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, did_you_mean, is_text, shown


def table_task(
    *,
    item: str = "{key} : {value}",
    separator: str = " | ",
    prompt: str = "{src}\n",
    target: str = "{ref}",
    init_text: str = "Describe the following data in a sentence:",
) -> Task:
    r"""Make a task for your own tables, rows ``{"table": {...}, "ref": ...}``.

    Args:
        item: Template of one entry of the table, with ``{key}`` and ``{value}``; ``{{`` and ``}}`` are braces.
        separator: Text between two entries.
        prompt: Template of the prompt; ``{src}`` stands for the entries, ``{eos}`` for the model's end token.
        target: Template of the target; ``{ref}`` stands for the reference.
        init_text: Text whose keys and values a new prefix starts from.

    Returns:
        A task that removes leading and trailing white space from generated text.

    Raises:
        ConfigError: If ``item`` lacks ``{key}`` or ``{value}``.

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
    for name, text in (("item", item), ("separator", separator)):
        if not isinstance(text, str) or not is_text(text):
            msg = f"{name}: expected a string of Unicode text, got {shown(text)}"
            raise ConfigError(msg)
    linearizer = _rust.Linearizer.template(item=item, separator=separator).spec
    return Task("table", linearizer, prompt, target, strip=True, init_text=init_text)


# Strings of Li & Liang's code (branch `cleaned`, language_modeling.py and run_generation.py): " {src} {bos} " + tgt +
# " {eos}" with bos = eos, beam 5, init text "table-to-text:". Their minimum length of 5 counts the prompt, so that it
# has no effect. Their bad_words_ids are [[628], [198]], the tokens of "\n\n" and "\n".
TABLE_TO_TEXT: dict[str, Any] = {
    "prompt": " {src} {eos}",
    "target": " {ref} ",
    "strip": True,
    "init_text": "table-to-text:",
    "decoding": {"num_beams": 5, "max_new_tokens": 100},
    "bad_words": ("\n\n", "\n"),
}
E2E = Task("e2e", _rust.Linearizer.e2e().spec, **TABLE_TO_TEXT)
WEBNLG = Task("webnlg", _rust.Linearizer.webnlg().spec, **TABLE_TO_TEXT)
DART = Task("dart", _rust.Linearizer.dart().spec, **TABLE_TO_TEXT)
TOTTO = Task("totto", _rust.Linearizer.totto().spec, **TABLE_TO_TEXT)  # the table is text as in Parikh et al. 2020
SUMMARY = Task("summary", prompt="{src}\n", strip=True, init_text="Summarize the following text:", input="document")
# Li & Liang's summaries. On a decoder-only base: source, end token, target, end token. Decoding is that of BART in the
# paper: at most 62 tokens with start, begin and end token, and at least 11 with start and begin token before the end
# token. The start token is none of the new tokens, and targets of decoder-only bases have no begin token.
XSUM = Task(
    "xsum",
    prompt="{src}{eos}",
    strip=True,
    init_text="summarize",
    decoding={"num_beams": 6, "max_new_tokens": 60, "min_new_tokens": 9, "length_penalty": 0.8},
    input="document",
    encoder_decoding={"num_beams": 6, "max_new_tokens": 61, "min_new_tokens": 10, "length_penalty": 0.8},
)
# Decoding of BART's authors (fairseq, examples/bart/summarize.py: min_len=55, max_len_b=140). Both lengths count the
# begin token and not the end token.
BART_CNN: dict[str, Any] = {
    "num_beams": 4,
    "max_new_tokens": 140,
    "min_new_tokens": 54,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 3,
}
CNN_DAILYMAIL = Task(
    "cnn_dailymail",
    prompt="{src}{eos}",
    strip=True,
    init_text="summarize",
    decoding=BART_CNN,
    encoder_decoding=BART_CNN | {"max_new_tokens": 141, "min_new_tokens": 55},
    input="document",
)
SAMSUM = Task("samsum", prompt="{src}\n", strip=True, init_text="Summarize the following dialogue:", input="document")
# Decoding of the authors' baseline (cylnlp/dialogsum, Baseline/bart_train.py): at most 128 tokens with begin and end.
DIALOGSUM = replace(
    SAMSUM,
    name="dialogsum",
    decoding={"num_beams": 5, "max_new_tokens": 126},
    encoder_decoding={"num_beams": 5, "max_new_tokens": 127},
)
TASKS = {
    "e2e": E2E,
    "webnlg": WEBNLG,
    "dart": DART,
    "totto": TOTTO,
    "table": table_task(),
    "summary": SUMMARY,
    "xsum": XSUM,
    "cnn_dailymail": CNN_DAILYMAIL,
    "samsum": SAMSUM,
    "dialogsum": DIALOGSUM,
    "prompt": Task("prompt"),
    "messages": Task("messages", input="messages"),
    "text": Task("text", input="text", init_text="The following text"),
    # No fixed sentences around the instruction, as Alpaca's code has them: they cost tokens in every request, and the
    # prefix takes their place.
    "instruction": Task("instruction", prompt="{src}\n", strip=True, input="instruction"),
}
PLAIN, STRIPPED = TASKS["prompt"], Task("prompt", strip=True)


def find_task(task: str | Task | Mapping[str, JSON] | None, row: Row) -> Task:
    """Choose a task by its name, from its fields, or by the keys of a row.

    Args:
        task: Name of a built-in task, `Task`, or fields as `Task.spec` gives them. None chooses by the row's keys.
        row: First row of the data.

    Raises:
        ConfigError: If the name or a field is unknown.
        DataError: If ``task`` is None and the row has the input key of no format, or of several.

    Example:
        >>> find_task(None, {"document": "...", "summary": "..."}).name
        'summary'
        >>> TASKS["e2e"].prompts([{"mr": "name[Blue Spice], area[riverside]"}], "<|endoftext|>")
        [' name : Blue Spice | area : riverside <|endoftext|>']
        >>> TASKS["dart"].prompts([{"triples": [["Mars Hill College", "JOINED", "1973"]]}], "<|endoftext|>")
        [' Mars Hill College : joined : 1973 <|endoftext|>']
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, Mapping):
        return Task.from_spec(task)
    if task is None:
        task = _task_name(row)
    if not isinstance(task, str) or task not in TASKS:
        hint = did_you_mean(task, TASKS)
        msg = f"task: expected one of {', '.join(TASKS)} or a Task, got {shown(task)}" + (f"; {hint}" if hint else "")
        raise ConfigError(msg)
    return TASKS[task]


def _task_name(row: Row) -> str:
    """Name of the task that the keys of a row choose."""
    if (layout := recognized_layout(row)) is not None:
        return layout.task
    if "tripleset" in row and all(row.get(key) is None for key in INPUT_KEYS):
        raise row_error(
            row, 0, "expected a row, got an entry of a public corpus; give its split, and in training task dart"
        )
    others = f"input_ids, {', '.join(LAYOUTS)}, or prompt and target (--prompt, --target) for columns of your own"
    header = "; the first line of the file names the columns" if is_table_row(row) else ""
    key = only_key(row, 0, INPUT_KEYS, f" (or {others}{header})")
    if key == "text" and (targets := [k for k in TARGET_KEYS if row.get(k) is not None]):
        advice = f"'{{text}}\\n' and target {targets[0]} to learn {targets[0]}, or task text to learn the text alone"
        raise row_error(row, 0, f"expected text alone, got text and {targets[0]}; give prompt {advice}")
    if key == "text" and (both := complete_layout(row)) is not None:
        target = next(k for k in both.targets if row.get(k) is not None)
        advice = f"give task {both.task} to learn {target} from {both.key}, or task text to learn the text alone"
        raise row_error(row, 0, f"expected text alone, got text, {both.key} and {target}; {advice}")
    return TASK_BY_KEY[key]


def request_task(task: Task, row: Row) -> Task:
    """Choose the task that reads one request.

    Args:
        task: Task of the request's prefix. It reads the row if the row has an input key of its format, or of a task of
            columns, a column of its input.
        row: Row, whose keys choose the task otherwise.

    Raises:
        DataError: If the row has no input, or several.
    """
    if has_own_columns(task, row):
        return task
    if (layout := request_layout(row, task.format)) is not None:
        return task if layout.format == task.format else TASKS[layout.task]
    known = (*INPUT_KEYS, "input_ids")
    if task.format == "columns" and all(row.get(key) is None for key in known):
        raise row_error(row, 0, missing_columns(task, row))
    key = only_key(row, 0, known)
    if key in FORMATS[task.format].inputs:
        return task
    if key in ("prompt", "input_ids"):
        return STRIPPED if task.strip else PLAIN
    return TASKS[TASK_BY_KEY[key]]
