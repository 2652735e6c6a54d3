"""Rewrite the generated blocks of README.md and docs/: tables of measurements, options, commands and corpora.

A block lies between ``<!-- table: NAME -->`` and ``<!-- end -->``. ``python docs/tables.py`` rewrites all blocks,
``python docs/tables.py --check`` exits with 1 and names the blocks that are stale. Measurements come from
``benches/results``, options from the fields of the configuration dataclasses, commands from the command line itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from measurements import TABLES, Record, Table, records

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
WIDTH = 118
# ---- tables of options and commands ----


def options(name: str) -> str:
    """Fields of a configuration dataclass with defaults and descriptions."""
    from prefixfast import config

    rows = [
        [f"`{f.name}`", f"`{f.default!r}`", f.metadata["help"].replace("|", "\\|")]
        for f in dataclasses.fields(getattr(config, name))
    ]
    return grid(["option", "default", "meaning"], rows, numbers=False)


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command by its full name."""
    for word, own in command.commands.items():
        yield from leaves(own, (*path, word)) if hasattr(own, "commands") else [(" ".join((*path, word)), own)]


def commands() -> str:
    """Every command of the command line with what it does and its own flags."""
    import typer

    from prefixfast import config
    from prefixfast.cli import app

    shared = {f.name for c in OPTIONS for f in dataclasses.fields(getattr(config, c))} | {"config_file", "print_config"}
    rows = []
    for name, command in leaves(typer.main.get_command(app)):
        common = shared if any(p.name == "config_file" for p in command.params) else set()
        arguments = "".join(f" {usage(p)}" for p in command.params if p.param_type_name == "argument" and not p.hidden)
        own = [
            max(p.opts, key=len)
            for p in command.params
            if p.param_type_name == "option" and p.name not in {*common, "help"}
        ]
        summary = " ".join((command.help or "").partition("\n\n")[0].split())
        rows.append([f"`{name}{arguments}`", summary, " ".join(f"`{flag}`" for flag in own)])
    return grid(["command", "purpose", "other flags"], rows, numbers=False)


def usage(argument: Any) -> str:
    """An argument as a usage line shows it."""
    name = (argument.metavar or argument.name.upper()).strip("[]")
    shown = name + ("..." if argument.nargs == -1 and not name.endswith("...") else "")
    return shown if argument.required else f"[{shown}]"


def corpora() -> str:
    """Official counts of every corpus by split."""
    from prefixfast.data.corpora import CORPORA

    rows = [
        [f"`{name}`", split, one.release, f"{one.rows:,}", "" if one.texts is None else f"{one.texts:,}"]
        for name, corpus in CORPORA.items()
        for split, counts in corpus.counts.items()
        for one in counts
    ]
    return grid(["task", "split", "release or subset", "rows", "texts"], rows, numbers=False)


def methods() -> str:
    """What each method trains and gives, its own options and its default learning rate."""
    from prefixfast.config import MethodConfig
    from prefixfast.training.method import METHODS

    own = [n for n in MethodConfig.names() if n != "method"]
    rows = [
        [
            f"`{name}`",
            TRAINED[name],
            "`TunedWeights`" if method.makes_weights else "`Prefix`",
            ", ".join(f"`{n}`" for n in own if n in method.reads),
            (f"{method.learning_rate:g}".replace("e-0", "e-") if method.learning_rate else OF_KEYS)
            if method.is_trained
            else "",
        ]
        for name, method in METHODS.items()
    ]
    return grid(["method", "what is trained", "result", "own options", "default learning rate"], rows, numbers=False)


def paper() -> str:
    """Learning rate, epochs and batch size of the recipe ``paper`` by method and task."""
    from prefixfast.training.settings import GivenOptions, resolve_settings

    def cell(task: str, own: dict[str, Any]) -> str:
        config = resolve_settings(GivenOptions(fields={"recipe": "paper", **own}), task).config
        rate = f"{config.learning_rate:g}".replace("e-0", "e-")
        return f"{rate}, {config.num_train_epochs}, {config.batch_size}"

    rows = [[name, *(cell(task, own) for task in PAPER_TASKS.values())] for name, own in PAPER_ROWS.items()]
    return grid(["method", *PAPER_TASKS], rows, numbers=False)


PAPER_TASKS = {"E2E": "e2e", "WebNLG": "webnlg", "DART": "dart", "XSum": "xsum"}
PAPER_ROWS: dict[str, dict[str, Any]] = {
    "`prefix`": {},
    "`full`": {"method": "full"},
    "`top2`": {"method": "top2"},
    "`adapter`, 3 %": {"method": "adapter", "adapter_size": 0.03},
    "`adapter`, 0.1 %": {"method": "adapter", "adapter_size": 0.001},
    "`lora`": {"method": "lora"},
}
OF_KEYS = "[that of keys and values](#default-settings)"
TRAINED = {
    "prefix": "keys and values of every layer (the default method)",
    "infix": "the same, before the last prompt token",
    "embedding": "embeddings of virtual tokens, from which the base computes keys and values",
    "prompt": "nothing: the keys and values of the init text",
    "icl": "nothing: the keys and values of training examples, which the seed draws",
    "full": "all weights of the base",
    "top2": "the last two blocks, the last norm and the output layer, also where it is tied to the embedding",
    "adapter": "bottleneck adapters after the blocks",
    "lora": "low-rank updates, which PEFT computes",
    "prefix+lora": "keys and values of every layer, and low-rank updates",
}


def metrics() -> str:
    """Scores of every metric with their units, better sides and tasks."""
    from prefixfast.metrics.registry import METRICS
    from prefixfast.metrics.result import ARROWS
    from prefixfast.metrics.tasks import TASK_METRICS

    rows = []
    for metric in METRICS.values():
        units = [f"{score.unit} {ARROWS[score.better]}".strip() for score in metric.scores]
        if len(set(units)) > 1:
            units = [f"`{score.name}` {unit}" for score, unit in zip(metric.scores, units, strict=True)]
        tasks = [f"`{task}`" for task, names in TASK_METRICS.items() if metric.name in names]
        shown = "all" if len(tasks) == len(TASK_METRICS) else ", ".join(tasks)
        scores = ", ".join(f"`{name}`" for name in metric.names)
        rows.append([f"`{metric.name}`", scores, metric.title, ", ".join(dict.fromkeys(units)), shown])
    return grid(["metric", "scores", "script", "unit, better side", "tasks"], rows, numbers=False)


OPTIONS = ("MethodConfig", "PrefixConfig", "TrainConfig", "GenerationParams", "EngineConfig")
OTHERS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "corpora": corpora,
    "metrics": metrics,
    "methods": methods,
    "paper": paper,
}


# ---- Markdown ----


def grid(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool) -> str:
    """A Markdown table; the columns after the first are aligned to the right if they hold numbers."""
    marks = ["---", *[("---:" if numbers else "---") for _ in headings[1:]]]
    return "".join("| " + " | ".join(line) + " |\n" for line in (headings, marks, *rows))


def measured(name: str, root: Path, page: Path) -> str:
    """A table of measurements with its source."""
    table = TABLES[name]
    found = records(root, table.files)
    if not found:
        sys.exit(f"table {name}: no results file matches {', '.join(table.files)} in {root / 'benches/results'}")
    cells = list(table.cells(found))
    columns = list(dict.fromkeys(column for _, column, _ in cells))
    values = {(row, column): text for row, column, text in cells}
    rows = [
        [row, *(values.get((row, column), "") for column in columns)]
        for row in dict.fromkeys(row for row, _, _ in cells if row)
    ]
    words = any(re.search(r"[a-z]{4}", text) for text in values.values())
    return grid([table.corner, *columns], rows, numbers=not words) + (
        source(table, found, "" if page.parent == root else "../") if table.source else ""
    )


def source(table: Table, found: list[Record], to_root: str) -> str:
    """Results files, machine, date and command of a table."""
    files = ", ".join(
        f"[`{pattern}`]({to_root}benches/results/{'' if '*' in pattern else pattern})" for pattern in table.files
    )
    of = found[0].get("environment", found[0])
    flags = of.get("cpu_flags") or of.get("flags", "").split()
    counts = {r.get("environment", r).get("threads") for r in found}
    threads = (
        f", {of['threads']} thread{'s' if of['threads'] > 1 else ''}" if len(counts) == 1 and "threads" in of else ""
    )
    date = (of.get("date") or of.get("datetime", ""))[:10]
    machine = of["cpu"] + (f" with {', '.join(flags)}" if flags else "") + threads + (f", {date}" if date else "")
    spelt = dict.fromkeys(r["command"] for r in found if "command" in r)
    run = table.command or "; ".join(re.sub(r"/tmp/\S+", "OUT.jsonl", c) for c in spelt)
    code, _, note = run.partition(" (`")
    command = f"Command: `{code}`" + (f" (`{note}" if note else "")
    text = f"Results: {files}. Machine: {machine}. {command}."
    return "\n" + textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def block(name: str, root: Path, page: Path) -> str:
    """The text between the markers of one block."""
    if name in TABLES:
        return measured(name, root, page)
    if name in OTHERS:
        return OTHERS[name]()
    if name in OPTIONS:
        return options(name)
    sys.exit(f"{page}: unknown table {name!r}; known are {', '.join((*TABLES, *OPTIONS, *OTHERS))}")


def pages(root: Path) -> list[Path]:
    """Pages that may hold blocks."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check all blocks; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a block is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository (default: the one of this script)")
    given = parser.parse_args(arguments)
    stale, seen = [], set()
    for page in pages(given.root):
        text = page.read_text(encoding="utf8")

        def fresh(match: re.Match[str], page: Path = page) -> str:
            seen.add(match["name"])
            body = block(match["name"], given.root, page)
            if body != match["body"]:
                stale.append(f"{page.relative_to(given.root)}: {match['name']}")
            return match[1] + body + match[4]

        new = BLOCK.sub(fresh, text)
        if text.count("<!-- table: ") != len(BLOCK.findall(text)):
            sys.exit(f"{page}: a block has no <!-- end -->")
        if new != text and not given.check:
            page.write_text(new, encoding="utf8")
    if missing := [name for name in (*TABLES, *OPTIONS, *OTHERS) if name not in seen]:
        sys.exit(f"no page shows the tables {', '.join(missing)}")
    if stale:
        print("\n".join(stale))
        print("these tables are stale: run python docs/tables.py" if given.check else "rewritten")
    return int(bool(stale) and given.check)


if __name__ == "__main__":
    sys.exit(main())
