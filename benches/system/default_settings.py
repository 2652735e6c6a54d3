r"""Held-out loss of training runs with many settings, on E2E, DART and SciTLDR with few and many rows.

    python benches/system/default_settings.py MODEL --data FOLDER -o runs.jsonl --tasks e2e dart --rows 50 400 \
        --rates 1e-2 1e-1 --steps 60 120 --seeds 0 1

Every finished run is one JSON line of the output file, and a run whose line is there is skipped. All missing runs of a
task and number of rows are prefixes of one call of `prefixfast.train`, which share batches. ``default`` as a rate or as
a number of steps leaves the option out. ``--table`` prints each setting beside the best one instead.

The folder of data holds files such as ``e2e/e2e_train.jsonl.gz``, ``dart/dart_dev.jsonl.gz`` and
``scitldr/scitldr_train.jsonl.gz``. Rows are in a fixed random order, 100 rows are held out, and a row is an input with
one reference. E2E has its train rows and its dev rows. DART has no train file there: 100 entries of its dev file are
held out with their first reference, and every reference of the others is a row. SciTLDR holds out 100 dev entries
likewise, and every summary of its other entries is a row; documents are cut to their first words, 40 or ``--words``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import prefixfast
from prefixfast.data import read_rows

Row = dict[str, Any]
NUM_HELD_OUT, NUM_WORDS = 100, 40
TASKS = ("e2e", "dart", "scitldr")
KEY = ("base", "dtype", "task", "rows", "init", "rate", "steps", "seed", "options", "words")


@dataclass(frozen=True)
class Cell:
    """Rows of one measurement.

    Attributes:
        task: Name of the data set.
        rows: Training rows.
        held_out: Rows of the held-out loss.
    """

    task: str
    rows: list[Row]
    held_out: list[Row]


def read_cell(data: Path, task: str, count: int, words: int) -> Cell:
    """First ``count`` training rows of a task in a fixed random order, and its held-out rows."""
    rng = random.Random(0)
    train, held_out = (
        _scitldr(data / task, rng, words) if task == "scitldr" else {"e2e": _e2e, "dart": _dart}[task](data / task, rng)
    )
    if len(train) < count or len(held_out) < NUM_HELD_OUT:
        msg = f"{task}: expected {count} rows and {NUM_HELD_OUT} held out, got {len(train)} and {len(held_out)}"
        raise ValueError(msg)
    return Cell(task, train[:count], held_out[:NUM_HELD_OUT])


def _shuffled(rows: Iterable[Any], rng: random.Random) -> list[Row]:
    found = [dict(row) for row in rows]
    rng.shuffle(found)
    return found


def _e2e(folder: Path, rng: random.Random) -> tuple[list[Row], list[Row]]:
    train, dev = (_shuffled(read_rows(folder / f"e2e_{split}.jsonl.gz"), rng) for split in ("train", "dev"))
    return train, dev


def _dart(folder: Path, rng: random.Random) -> tuple[list[Row], list[Row]]:
    entries = _shuffled(read_rows(folder / "dart_dev.jsonl.gz"), rng)
    held_out, rest = entries[:NUM_HELD_OUT], entries[NUM_HELD_OUT:]
    pairs = ({"triples": e["triples"], "refs": [ref]} for e in rest for ref in e["refs"])
    return _shuffled(pairs, rng), [{"triples": e["triples"], "refs": e["refs"][:1]} for e in held_out]


def _scitldr(folder: Path, rng: random.Random, words: int) -> tuple[list[Row], list[Row]]:
    entries = {s: _shuffled(read_rows(folder / f"scitldr_{s}.jsonl.gz"), rng) for s in ("train", "dev", "test")}
    held_out, rest = entries["dev"][:NUM_HELD_OUT], entries["dev"][NUM_HELD_OUT:]

    def pairs(rows: list[Row]) -> Iterator[Row]:
        for row in rows:
            document = " ".join(row["document"].split()[:words])
            yield from ({"document": document, "summary": s} for s in row.get("summaries") or [row["summary"]])

    held = [next(pairs([row])) for row in held_out]
    return _shuffled(pairs(entries["train"] + entries["test"] + rest), rng), held


@dataclass
class Recorder:
    """Callback that appends a line to the output file for each finished prefix.

    Attributes:
        path: Output file.
        lines: Description of each run by the name of its prefix.
        began: Time of the start, in seconds.
    """

    path: Path
    lines: dict[str, Row]
    began: float = field(default_factory=time.perf_counter)

    def on_prefix_end(self, name: str, prefix: prefixfast.Prefix, metrics: dict[str, float]) -> None:
        """Append the line of a prefix."""
        losses = {"eval_loss": round(metrics["eval_loss"], 4), "loss": round(metrics["loss"], 4)}
        seconds = {"steps_done": int(metrics["steps"]), "at_seconds": round(time.perf_counter() - self.began)}
        self._write(self.lines[name] | losses | seconds)

    def on_prefix_failed(self, name: str, error: str) -> None:
        """Append the line of a prefix whose numbers are not finite."""
        self._write(self.lines[name] | {"eval_loss": None, "error": error})

    def _write(self, line: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def run_cell(model: prefixfast.Model, data: Path, lines: list[Row], output: Path) -> None:
    """Train a prefix for each line; all lines have one task, number of rows and initial values."""
    first = lines[0]
    cell = read_cell(data, first["task"], first["rows"], first["words"])
    names = [f"{i}" for i in range(len(lines))]
    init: Any = first["init"]
    prefixfast.train(
        model,
        dict.fromkeys(names, cell.rows),
        task={"scitldr": "summary"}.get(cell.task, cell.task),
        eval_data=dict.fromkeys(names, cell.held_out),
        overrides={n: overrides(line) for n, line in zip(names, lines, strict=True)},
        init=init if init in ("text", "random") else prefixfast.Prefix.from_pretrained(init),
        metric_for_best_model="last",
        callbacks=[Recorder(output, dict(zip(names, lines, strict=True)))],
        progress=False,
    )


def overrides(line: Row) -> Row:
    """Options of a line's run."""
    own = {"learning_rate": line["rate"], "max_steps": line["steps"], "seed": line["seed"], **line["options"]}
    return {name: value for name, value in own.items() if value != "default"}


def key(line: Row) -> str:
    """Identity of a run."""
    return json.dumps([({"words": NUM_WORDS} | line)[name] for name in KEY])


def table(lines: list[Row]) -> Iterator[str]:
    """Mean held-out loss over seeds by cell, rate and steps, with the ratio to the cell's best."""
    cells: dict[tuple[Any, ...], dict[tuple[Any, ...], list[float]]] = {}
    for line in lines:
        of_cell = cells.setdefault((line["base"], line["task"], line["rows"], line["init"]), {})
        setting = (line["steps"], line["rate"], *line["options"].items())
        of_cell.setdefault(setting, []).append(line["eval_loss"] or float("inf"))
    for cell, settings in cells.items():
        mean = {setting: sum(losses) / len(losses) for setting, losses in settings.items()}
        best = min(mean.values())
        for setting in sorted(mean, key=str):
            yield " ".join(map(str, (*cell, *setting, f"{mean[setting]:.4f} {mean[setting] / best:.3f}")))


def number(text: str) -> float | str:
    """A number, or ``default``."""
    return text if text == "default" else float(text)


def main() -> None:
    """Run what the output file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--rows", nargs="+", type=int, default=[50, 400, 4000])
    parser.add_argument("--words", type=int, default=NUM_WORDS, help="words of a document of SciTLDR")
    parser.add_argument("--init", default="text", help="text, random or the folder of a prefix")
    parser.add_argument("--rates", nargs="+", type=number, default=["default"])
    parser.add_argument("--steps", nargs="+", type=number, default=["default"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--options", type=json.loads, default={}, help="other options that a batch need not share")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    if args.table:
        print("\n".join(table(lines)))
        return
    done = {key(line) for line in lines}
    torch.set_num_threads(1)
    model = prefixfast.load(args.model, dtype=args.dtype)
    common = {
        "base": Path(args.model).name,
        "dtype": args.dtype,
        "init": args.init,
        "options": args.options,
        "words": args.words,
    }
    for count, task in itertools.product(args.rows, args.tasks):
        grid = itertools.product(args.seeds, args.steps, args.rates)
        wanted = [
            common | {"task": task, "rows": count, "seed": s, "rate": r, "steps": n if n == "default" else int(n)}
            for s, n, r in grid
        ]
        if missing := [line for line in wanted if key(line) not in done]:
            run_cell(model, args.data, missing, args.output)


if __name__ == "__main__":
    main()
