"""What `train` is given, as rows by prefix: one prefix, one for each name, or one for each value of a column; and the recipe's options under the caller's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from prefixfast.config import Options, PrefixConfig, TrainConfig, unknown_option
from prefixfast.data.files import FileRow
from prefixfast.data.rows import Row, Rows, read_rows, row_error
from prefixfast.errors import ConfigError, DataError
from prefixfast.training.recipes import read_recipe

ONLY = "prefix"  # the name of a lone prefix in logs and in a store
RESERVED = ("", ".", "..", "log.jsonl", "failed.jsonl", "checkpoint")
# What a given option takes out of the recipe: fields that would overrule it or that make no sense beside it.
REPLACES = {"num_train_epochs": ("max_steps",), "reparameterization": ("fit_steps",), "init": ("init_text",)}
O = TypeVar("O", bound=Options)


@dataclass(frozen=True)
class Given:
    """The rows of a run.

    Attributes:
        rows: By prefix.
        evaluation: By prefix, None without held-out rows; prefixes may share one list.
        single: Plain rows for one prefix.
        failed: Prefixes whose rows cannot be read, with the error's text.
        lines: With ``prefix_column``, for rows of no file: for each prefix the numbers of its rows in the whole data, counted from 1.
    """

    rows: dict[str, list[Row]]
    evaluation: dict[str, list[Row]] | None
    single: bool
    failed: dict[str, str]
    lines: dict[str, list[int]] = field(default_factory=dict)


def gather(data: Any, eval_data: Any, prefix_column: str | None, *, isolate: bool) -> Given:
    """Read all rows.

    Args:
        data: Rows, or rows by name.
        eval_data: Held-out rows: for all prefixes, or by the same names, or with the same column.
        prefix_column: The column of plain rows that names each row's prefix.
        isolate: Note a name whose rows cannot be read in ``failed``, instead of raising.

    Raises:
        ConfigError: For names that do not fit.
        DataError: For rows that cannot be read.
    """
    failed: dict[str, str] = {}
    lines: dict[str, list[int]] = {}
    if isinstance(data, Mapping):
        if prefix_column is not None:
            msg = "prefix_column: expected plain rows beside it, got a mapping of names; leave one of them out"
            raise ConfigError(msg)
        rows = _by_name(data, failed, isolate)
        if not data:
            msg = "data: expected at least one name with rows, got an empty mapping"
            raise DataError(msg)
    elif prefix_column is not None:
        rows, lines = _by_column(read_rows(data), prefix_column)
    else:
        rows = {ONLY: read_rows(data)}
    names = [*rows, *failed]
    evaluation = None if eval_data is None else _evaluation(eval_data, names, prefix_column, failed, isolate)
    rows = {n: r for n, r in rows.items() if n not in failed}
    if not rows:
        msg = f"data: none of the {len(names)} prefixes has rows that can be read; of {next(iter(failed))!r}: {next(iter(failed.values()))}"
        raise DataError(msg)
    single = not isinstance(data, Mapping) and prefix_column is None
    return Given(rows, evaluation, single, failed, lines)


def _by_name(data: Mapping[Any, Rows], failed: dict[str, str], isolate: bool) -> dict[str, list[Row]]:
    found = {}
    for name, rows in data.items():
        try:
            found[str(name)] = read_rows(rows)
        except DataError as e:
            if not isolate:
                raise
            failed[str(name)] = str(e)
    return found


def _by_column(rows: list[Row], column: str) -> tuple[dict[str, list[Row]], dict[str, list[int]]]:
    found: dict[str, list[Row]] = {}
    lines: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        name = row.get(column)
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            msg = f"{column}: expected the name of the row's prefix (prefix_column), got {name!r:.80}; the row has {sorted(row)}"
            raise row_error(row, i, msg)
        own = {k: v for k, v in row.items() if k != column}
        found.setdefault(str(name), []).append(FileRow(own, row.path, row.line) if isinstance(row, FileRow) else own)
        if not isinstance(row, FileRow):
            lines.setdefault(str(name), []).append(i + 1)
    return found, lines


def _evaluation(
    data: Any, names: list[str], column: str | None, failed: dict[str, str], isolate: bool
) -> dict[str, list[Row]]:
    if isinstance(data, Mapping):
        found = _by_name(data, failed, isolate)
    else:
        rows = read_rows(data)
        if column is None or not any(column in row for row in rows):
            return dict.fromkeys(names, rows)
        found, _ = _by_column(rows, column)
    if odd := sorted(set(names) ^ {*found, *failed}):
        msg = f"eval_data: expected the names of data, got {odd[:5]} in one of them only"
        raise ConfigError(msg)
    return found


def check_names(names: Any) -> None:
    """Raise `ConfigError` for a prefix name that cannot be a folder of ``output_dir``."""
    for name in names:
        if name in RESERVED or {"/", "\\", "\0"} & set(name):
            msg = f"prefix name {name!r} cannot be a folder of output_dir; rename it"
            raise ConfigError(msg)


@dataclass(frozen=True)
class Settings:
    """Options of a run, the recipe's under the caller's.

    Attributes:
        config: How it is trained.
        prefix_config: What is learned.
        init: Where it starts.
        init_text: The words of ``init="text"``, None: the task's.
        explicit: Names of the options that the caller gave.
    """

    config: TrainConfig
    prefix_config: PrefixConfig
    init: Any
    init_text: str | None
    explicit: frozenset[str]


def settings(
    config: Any, prefix_config: Any, fields: Mapping[str, Any], *, init: Any, init_text: str | None, task: str
) -> Settings:
    """The options of a run.

    Args:
        config: A `TrainConfig` (fields that differ from the defaults count as given), a mapping, or None.
        prefix_config: Likewise.
        fields: Fields of both, over these.
        init: None: the recipe's, else ``"text"``.
        init_text: None: the recipe's.
        task: The task's name, for recipes that differ by task.

    Raises:
        ConfigError: For unknown or wrong options.
    """
    known = (*TrainConfig.names(), *PrefixConfig.names())
    for name in fields:
        if name not in known:
            raise ConfigError(unknown_option(name, known, "train"))
    given = _explicit(TrainConfig, config) | _explicit(PrefixConfig, prefix_config) | dict(fields)
    starts = {k: v for k, v in (("init", init), ("init_text", init_text)) if v is not None}
    preset = read_recipe(TrainConfig.make({k: given[k] for k in ("recipe",) if k in given}).recipe, task)
    for name in {*given, *starts}:
        for other in REPLACES.get(name, ()):
            preset.pop(other, None)
    merged = preset | given | starts
    how = TrainConfig.make({k: v for k, v in merged.items() if k in TrainConfig.names()})
    what = PrefixConfig.make({k: v for k, v in merged.items() if k in PrefixConfig.names()})
    return Settings(how, what, merged.get("init", "text"), merged.get("init_text"), frozenset(given))


def _explicit(cls: type[O], config: Any) -> dict[str, Any]:
    """What was given: a mapping's items, or an object's fields that differ from the defaults."""
    if isinstance(config, Mapping):
        for name in config:
            if name not in cls.names():
                raise ConfigError(unknown_option(str(name), cls.names(), cls.__name__))
        return dict(config)
    made, default = cls.make(config), cls()
    return {n: getattr(made, n) for n in cls.names() if getattr(made, n) != getattr(default, n)}
