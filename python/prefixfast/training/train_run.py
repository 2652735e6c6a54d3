"""`TrainRun`, the result of a training run: prefixes by name, metrics, log, a plot and a report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError, printable, shown
from prefixfast.io.atomic import replace_file
from prefixfast.io.figures import write_figure
from prefixfast.io.paths import as_path
from prefixfast.io.text import counted, duration, rate
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.advice import loss_advice


@dataclass(frozen=True)
class RunTotals:
    """Base model, speed and time of a run.

    A resumed run counts from the checkpoint on.

    Attributes:
        base: Name of the base model.
        dtype: Compute dtype.
        device: Device of the base model.
        examples: Number of examples of all steps.
        tokens: Number of tokens of these examples.
        seconds: Time of steps, evaluations and saving in seconds, without loading and tokenization.
    """

    base: str = ""
    dtype: str = ""
    device: str = ""
    examples: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        """One line of text."""
        where = f"{printable(self.base)} in {self.dtype} on {self.device}"
        speed = f", {rate(self.tokens / self.seconds)} tokens/s" if self.tokens else ""
        return f"{where}, {duration(self.seconds)}{speed}"


@dataclass(frozen=True, repr=False)
class TrainRun(Mapping[str, Prefix]):
    """Result of `train` with several prefixes: a mapping of names to trained prefixes.

    The names are those of the data, the values of ``prefix_column``, or the variants of a sweep such as
    ``"learning_rate=0.01"``. A prefix that could not be trained is not in the mapping; `failed` holds its error.

    Attributes:
        prefixes: Trained prefixes by name, in the order of the data. Those of a run with a store are read from it each
            time, so that the memory of a run does not grow with their number.
        metrics: Metrics by name: ``first_loss`` and ``loss`` (training loss of the first and the last step), ``steps``,
            ``skipped_steps``, ``rows``, ``examples``, ``skipped_rows``, ``truncated_rows``, and with held-out rows
            ``eval_loss_before`` (before the first step), ``eval_loss``, ``best_step`` and ``eval_rows``.
        log: Lines of ``log.jsonl``.
        failed: Error message by name, for prefixes without a result.
        variants: Options that a sweep varies, by name, with the name of the rows under ``"of"``; empty without a sweep.
        unchanged: Names of the prefixes that an earlier run had finished, so that a resumed run did not train them.
        totals: Base model, speed and time of the run.

    Example:
        >>> run = train(base, rows, eval_data=rows, max_steps=2, sweep={"learning_rate": [1e-9, 1e-2]})
        >>> run
        TrainRun(2 prefixes, 0 failed)
        >>> list(run)
        ['learning_rate=1e-09', 'learning_rate=0.01']
        >>> run["learning_rate=0.01"].save_pretrained("mine")
    """

    prefixes: Mapping[str, Prefix]
    metrics: dict[str, dict[str, float]]
    log: list[dict[str, JSON]]
    failed: dict[str, str] = field(default_factory=dict)
    variants: dict[str, dict[str, JSON | Prefix]] = field(default_factory=dict)
    unchanged: tuple[str, ...] = ()
    totals: RunTotals = field(default_factory=RunTotals)

    def __repr__(self) -> str:
        """One line with the numbers of trained and failed prefixes."""
        return f"TrainRun({counted(len(self.prefixes), 'prefix', 'prefixes')}, {len(self.failed)} failed)"

    def __getitem__(self, name: str) -> Prefix:
        return self.prefixes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.prefixes)

    def __len__(self) -> int:
        return len(self.prefixes)

    def best(self, name: str | None = None) -> Prefix:
        """The prefix with the lowest evaluation loss, or with the lowest last training loss without held-out rows.

        Args:
            name: Name of the data whose variants are compared. Needed for a sweep over several names, since losses on
                different data cannot be compared.

        Raises:
            ConfigError: If there is no such prefix, or ``name`` is needed.

        Example:
            >>> run.best() is run["learning_rate=0.01"]
            True
        """
        return self.prefixes[self.best_name(name)]

    def best_name(self, name: str | None = None) -> str:
        """Name of the prefix that `best` returns.

        Args:
            name: Name of the data whose variants are compared.

        Raises:
            ConfigError: If there is no such prefix, or ``name`` is needed.
        """
        sources = {str(v["of"]) for v in self.variants.values()}
        if name is None and len(sources) > 1:
            msg = f"best: expected one of the names {sorted(sources)[:10]}, since each was swept on data of its own"
            raise ConfigError(msg)
        found = [n for n in self.prefixes if name in (None, n, self.variants.get(n, {}).get("of"))]
        if not found:
            none_at_all = "best: no prefix was trained, see failed"
            msg = none_at_all if name is None else f"best: no trained prefix is named {shown(name)}"
            raise ConfigError(msg)
        return min(found, key=lambda n: self.metrics[n][self._loss_key(found)])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot training and evaluation losses over the steps to an image file.

        Up to 20 prefixes of a group have a curve of their own; a larger group has one curve of the mean.

        Args:
            path: Path of the image; its ending chooses the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ConfigError: If matplotlib is not installed (``pip install 'prefixfast[train]'``), does not know the ending,
                or the path cannot be one of a file.
            OSError: If the file cannot be written.

        Example:
            >>> run.plot("losses.png")
        """
        target = as_path("path", path)
        try:
            from matplotlib.figure import Figure
        except ImportError as e:
            msg = "plot: matplotlib is not installed: pip install 'prefixfast[train]'"
            raise ConfigError(msg) from e
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for key, style in (("loss", "-"), ("eval_loss", "--")):
            for label, points in self._curves(key).items():
                marker = "." if len(points) == 1 or key == "eval_loss" else ""
                axes.plot(*zip(*points, strict=True), style, marker=marker, label=printable(f"{label} {key}".strip()))
        axes.set(xlabel="step", ylabel="loss of a target token")
        if axes.lines:
            axes.legend(fontsize="small")
        kind = target.suffix[1:].lower()
        if kind not in figure.canvas.get_supported_filetypes():
            msg = f"plot: expected a file ending in .png, .svg or .pdf, got {shown(str(path))}"
            raise ConfigError(msg)
        write_figure(figure, target, dpi=100)

    def advice(self) -> dict[str, str]:
        """Advice by name for prefixes whose loss training did not lower.

        The loss on held-out rows counts if there are any, else the training loss of the last step against the first.

        Example:
            >>> "learning_rate=1e-09" in run.advice()
            True
        """
        found = {}
        for name in self.prefixes:
            if text := loss_advice(self.metrics[name], {}):  # most prefixes need not be read from the store
                config = self.prefixes[name].training.get("config")
                found[name] = loss_advice(self.metrics[name], config if isinstance(config, Mapping) else {}) or text
        return found

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write a Markdown report: a table of the metrics of each prefix, best first, the failures and the advice.

        ``print(run)`` prints the report, and a notebook shows it.

        Args:
            path: Path of the file.

        Raises:
            ConfigError: If the path cannot be one of a file.
            OSError: If the file cannot be written.

        Example:
            >>> run.report("report.md")
        """
        replace_file(as_path("path", path), f"{self}\n".encode("utf8", "backslashreplace"))

    def __str__(self) -> str:
        """Report as Markdown."""
        columns = list(dict.fromkeys(k for m in self.metrics.values() for k in m))
        trained = f"{counted(len(self.prefixes), 'prefix', 'prefixes')} trained, {len(self.failed)} failed"
        lines = ["# Training", "", f"{trained}.", ""]
        if self.totals.base:
            lines += [f"{self.totals}.", ""]
        if self.metrics:
            key = self._loss_key(list(self.metrics))
            lines += ["| prefix | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
            for name in sorted(self.metrics, key=lambda n: self.metrics[n][key]):
                values = (f"{self.metrics[name][c]:.5g}" if c in self.metrics[name] else "" for c in columns)
                lines.append(f"| {_cell(name)} | " + " | ".join(values) + " |")
        if self.failed:
            rows = (f"| {_cell(n)} | {_cell(text)} |" for n, text in self.failed.items())
            lines += ["", "| failed | why |", "| --- | --- |", *rows]
        if advice := self.advice():
            lines += ["", *(f"* {_cell(name)}: {text}." for name, text in advice.items())]
        return "\n".join(lines)

    _repr_markdown_ = __str__

    def _loss_key(self, names: list[str]) -> str:
        """Metric that compares prefixes: ``eval_loss`` if all of them have one, else ``loss``."""
        return "eval_loss" if all("eval_loss" in self.metrics[n] for n in names) else "loss"

    def _curves(self, key: str) -> dict[str, list[tuple[int, float]]]:
        """Points of each curve by prefix; under the empty name the means of groups that do not log each prefix."""
        found: dict[str, list[tuple[int, float]]] = {}
        lines: list[dict[str, Any]] = self.log
        for line in lines:
            values = line.get(f"{key}_by_prefix") or ({"": line[key]} if key in line else {})
            for name, value in values.items():
                if value is not None:  # a number that is not finite
                    found.setdefault(name, []).append((line["step"], value))
        return found


def _cell(text: str) -> str:
    """Text of a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
