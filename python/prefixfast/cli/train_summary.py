"""Summary of ``prefixfast train``: what was trained, how its loss went, where it is and the command that uses it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from prefixfast.cli.output import SOME_FAILED, printable
from prefixfast.cli.run_table import print_table
from prefixfast.io.text import counted, duration, rate, whole

if TYPE_CHECKING:
    from prefixfast import Prefix, TrainRun

WIDTH = 80  # columns
INDENT = " " * 12  # of everything behind the names
PLOT = "loss.png"
SHOWN_ADVICE = 3  # prefixes
NO_PLOT = "not drawn: pip install 'prefixfast[train]' installs matplotlib"


class KeepRun:
    """Callback that keeps the result of a run, of which `train` returns a part if the run has one prefix."""

    run: TrainRun

    def on_train_end(self, run: TrainRun) -> None:
        """Keep the result."""
        self.run = run


@contextlib.contextmanager
def without_result_log() -> Iterator[None]:
    """Context in which a run does not log its result, which the summary says."""
    logger = logging.getLogger("prefixfast.training.result_log")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@dataclass(frozen=True)
class Summary:
    """Summary of a finished run.

    Attributes:
        run: Result of the run.
        output: Folder of the prefix, or of the folders of several prefixes; None if there is only a store.
        store: Folder of the store, None without one.
        is_single: Whether the output folder is that of the one prefix.
        data: File of rows by the name of their prefix; a single file without a name has the empty name.
        dtype: Compute dtype that the user asked for, None for the default.
        encoding: Encoding of the files that the user gave, None for the default.
        rows_name_prefixes: Whether the ``prefix`` key of the rows names their prefixes, so that the next command reads
            it.
        split: Split of the files of an official corpus, None for files of rows.
        held_out: Files of held-out rows, as ``data``. With a split they are read as the split ``"dev"``.
    """

    run: TrainRun
    output: Path | None
    store: Path | None
    is_single: bool
    data: Mapping[str, str | Path]
    dtype: str | None
    encoding: str | None
    rows_name_prefixes: bool = False
    split: str | None = None
    held_out: Mapping[str, str | Path] = field(default_factory=dict)

    def show(self, *, as_json: bool, quiet: bool) -> None:
        """Draw the plot, print the summary unless ``quiet``, and exit with 3 if some prefixes failed.

        Several prefixes get a table on standard output. Their summary then goes to standard error.
        """
        plot = self._plot()
        if as_json:
            typer.echo(json.dumps(self.values(plot), indent=2))
        elif not quiet:
            if not self.is_single:
                print_table(self.run)
            typer.echo("\n".join(self.lines(plot)), err=not self.is_single)
        for name, error in sorted(self.run.failed.items()):
            typer.echo(f"{printable(name)} failed: {printable(error)}", err=True)
        if self.run.failed:
            raise typer.Exit(SOME_FAILED)

    def values(self, plot: Path | None) -> dict[str, Any]:
        """Values of the JSON form.

        Args:
            plot: Path of the plot, None without one.
        """
        advice = self.run.advice()
        prefixes = {
            n: {"folder": _text(self._folder(n)), "metrics": m, "advice": advice.get(n), **_costs(self.run[n])}
            for n, m in self.run.metrics.items()
        }
        places = {"output": _text(self.output), "store": _text(self.store), "plot": _text(plot)}
        own: dict[str, Any] = {"prefixes": prefixes, "unchanged": list(self.run.unchanged), "failed": self.run.failed}
        own["next"] = shlex.join(self.next_command()) or None
        return asdict(self.run.totals) | places | own

    def lines(self, plot: Path | None) -> list[str]:
        """Lines of the text form, of at most 80 columns except for long names.

        Args:
            plot: Path of the plot, None if matplotlib is missing or there is no output folder.
        """
        run, totals = self.run, self.run.totals
        trained = len(run) - len(run.unchanged)
        others = [(len(run.unchanged), "unchanged"), (len(run.failed), "failed")]
        rest = "".join(f", {count} {what}" for count, what in others if count)
        lines = [f"{self._what(trained)} in {duration(totals.seconds)}{rest}"]
        speed = f"{rate(totals.tokens / totals.seconds)} tokens/s" if totals.seconds else "finished in an earlier run"
        lines += _entry("base", f"{printable(totals.base)}, {totals.dtype} on {totals.device}")
        lines += _entry("rows", _rows(list(run.metrics.values())))
        lines += _entry("speed", f"{_steps(list(run.metrics.values()))}, {speed}") if self._has_steps else []
        for name, metrics in run.metrics.items() if self.is_single else ():
            lines += _entry("loss", _losses(metrics))
            lines += _sizes(run[name])
        if len({str(v["of"]) for v in run.variants.values()}) == 1 and len(run):
            best = run.best_name()
            lines += _entry("best", f"{printable(best)}, {_losses(run.metrics[best])}")
        lines += self._advice()
        for name, place in (("saved to", self.output), ("store", self.store)):
            lines += [] if place is None else _entry(name, printable(place))
        if self.output is not None and self._has_steps and (plot is not None or not _has_matplotlib()):
            lines += _entry("plot", NO_PLOT if plot is None else printable(plot))
        words = self.next_command()
        return [*lines, *(_command("next", words) if words else ())]

    @property
    def _has_steps(self) -> bool:
        """Whether training took steps, which methods without training do not."""
        return any(metrics.get("steps") for metrics in self.run.metrics.values())

    def _what(self, count: int) -> str:
        """Kind and number of what was made."""
        artifact = next(iter(self.run.prefixes.values()), None)
        if artifact is not None and "method" in vars(artifact):
            return f"trained weights of method {artifact.training['method']}, {counted(count, 'name')},"
        is_made = artifact is not None and not artifact.num_trained
        return f"{'made' if is_made else 'trained'} {counted(count, 'prefix', 'prefixes')}"

    def _advice(self) -> list[str]:
        """Advice for the first prefixes whose loss did not fall, and the number of the others."""
        found = self.run.advice()
        lines: list[str] = []
        for name, text in list(found.items())[:SHOWN_ADVICE]:
            lines += _entry("advice", ("" if self.is_single else f"{printable(name)}: ") + text)
        if (more := len(found) - SHOWN_ADVICE) > 0:
            lines += _entry("", f"and {counted(more, 'prefix', 'prefixes')} more whose loss did not fall")
        return lines

    def next_command(self) -> list[str]:
        """Words of the command that generates with the first prefix or the best one of its sweep.

        It reads the prefix's own rows, or of an official corpus the held-out split if there is one. There are no words
        without a prefix, or for weights whose names stand in the rows: weights act for all rows of a command.
        """
        name = next(iter(self.run), None)
        if name is None or (self.rows_name_prefixes and "method" in vars(self.run[name])):
            return []
        source = str(self.run.variants.get(name, {}).get("of", name))
        if name in self.run.variants:
            name = self.run.best_name(source)
        files, split = (self.held_out, "dev") if self.split and self.held_out else (self.data, self.split)
        file = files.get(source) or next(iter(files.values()))
        folder = self._folder(name)
        prefix = ["--store", str(self.store), "--prefix", name] if folder is None else ["--prefix", str(folder)]
        if self.rows_name_prefixes and not self.run.variants and not self.run.failed:
            prefix = ["--store", str(self.store)] if self.output is None else ["--prefixes", str(self.output)]
        options = {"--split": split, "--encoding": self.encoding, "--dtype": self.dtype}
        given = [word for flag, value in options.items() if value is not None for word in (flag, value)]
        texts = "texts.jsonl" if split is None else "texts.txt"  # official scorers read one text a line
        return ["prefixfast", "generate", str(file), "-o", texts, *prefix, *given]

    def _folder(self, name: str) -> Path | None:
        return self.output if self.output is None or self.is_single else self.output / name

    def _plot(self) -> Path | None:
        """Path of the drawn plot, None without matplotlib, an output folder or losses, or if drawing fails."""
        if self.output is None or not self._has_steps or not _has_matplotlib():
            return None
        try:
            self.run.plot(self.output / PLOT)
        except Exception as e:  # of matplotlib, its settings or the disk; the prefix is saved
            logging.getLogger(__name__).warning("the plot was not drawn: %s", printable(e))
            return None
        return self.output / PLOT


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _entry(name: str, text: str) -> list[str]:
    """Lines of one entry. A word that is too long for a line, such as a path, is not broken."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=f"  {name}".ljust(len(INDENT)),
        subsequent_indent=INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _command(name: str, words: Sequence[str]) -> Iterator[str]:
    """Lines of a command for the shell; a long one goes on after a backslash, and a flag stays beside its value."""
    parts: list[str] = []
    for i, word in enumerate(map(shlex.quote, words)):
        if i and words[i - 1].startswith("-"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    line = f"  {name}".ljust(len(INDENT) - 1)
    for i, part in enumerate(parts):
        if i and len(line) + len(part) + 3 > WIDTH:
            yield f"{line} \\"
            line = f"{INDENT} "
        line += f" {part}"
    yield line


def _rows(metrics: Sequence[Mapping[str, float]]) -> str:
    """Numbers of rows of all prefixes together."""
    total = {k: sum(m.get(k, 0) for m in metrics) for k in ("rows", "examples", "skipped_rows", "truncated_rows")}
    parts = [whole(total["rows"])]
    if total["examples"] != total["rows"]:
        parts.append(counted(total["examples"], "example"))
    parts += [f"{whole(total[k])} {k.removesuffix('_rows')}" for k in ("skipped_rows", "truncated_rows")]
    held_out = [m["eval_rows"] for m in metrics if "eval_rows" in m]
    return ", ".join(parts) + (f"; held out: {whole(sum(held_out))}" if held_out else "")


def _costs(artifact: Prefix) -> dict[str, Any]:
    """Numbers of stored and trained parameters, bytes, and the cost of the training."""
    sizes = {n: getattr(artifact, n) for n in ("num_stored", "num_trained", "nbytes")}
    return {"sizes": sizes, "cost": artifact.training.get("cost")}


def _sizes(artifact: Prefix) -> list[str]:
    """Entries of the sizes and the cost of a prefix or of weights."""
    stored, trained, nbytes = map(whole, (artifact.num_stored, artifact.num_trained, artifact.nbytes))
    lines = _entry("size", f"{stored} numbers in {nbytes} bytes, {trained} trained")
    cost: Any = artifact.training.get("cost") or {}
    parts = [f"{rate(s)} s a step"] if (s := cost.get("seconds_per_step")) is not None else []
    parts += [f"{whole(b / 2**20)} MiB at the peak"] if (b := cost.get("peak_bytes")) else []
    return [*lines, *(_entry("cost", ", ".join(parts)) if parts else [])]


def _steps(metrics: Sequence[Mapping[str, float]]) -> str:
    """Number of steps, or its range."""
    steps = sorted({m["steps"] for m in metrics}) or [0]
    return counted(steps[0], "step") if len(steps) == 1 else f"{whole(steps[0])} to {whole(steps[-1])} steps"


def _losses(metrics: Mapping[str, Any]) -> str:
    """Losses at the start and the end, or the one without steps: on held-out rows if there are any."""
    if metrics.get("steps") == 0:
        key, rows = ("eval_loss", "held-out") if "eval_loss" in metrics else ("loss", "training")
        return f"{_loss(metrics[key])} on {rows} rows"
    if "eval_loss" in metrics:
        first, last = (_loss(metrics[k]) for k in ("eval_loss_before", "eval_loss"))
        return f"{first} before and {last} after training, on held-out rows"
    first, last = (_loss(metrics[k]) for k in ("first_loss", "loss"))
    return f"{first} at the start, {last} at the end"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
