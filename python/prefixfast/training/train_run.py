"""`TrainRun`: what a run gave, by name, with its curves and a short report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixfast.errors import ConfigError
from prefixfast.io.atomic import replace_file
from prefixfast.prefix.prefix import Prefix


@dataclass(frozen=True)
class TrainRun(Mapping[str, Prefix]):
    """The prefixes of a run by name.

    Attributes:
        prefixes: By name, in the order of the data.
        metrics: By name: final training loss, evaluation loss and its step if there was one, steps, skipped steps, examples, skipped and truncated rows.
        log: The lines of log.jsonl.
        failed: Names that gave no prefix, with the error's text.
        variants: Of a sweep: by name the fields that tell it from the others, and under ``"of"`` the name of its rows.

    Example:
        >>> run = train(base, rows, eval_data=rows, max_steps=2, sweep={"learning_rate": [1e-9, 1e-2]})
        >>> list(run), run.failed
        (['learning_rate=1e-09', 'learning_rate=0.01'], {})
        >>> run["learning_rate=0.01"].save_pretrained("mine")
    """

    prefixes: dict[str, Prefix]
    metrics: dict[str, dict[str, float]]
    log: list[dict[str, Any]] = field(repr=False)
    failed: dict[str, str] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Prefix:
        return self.prefixes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.prefixes)

    def __len__(self) -> int:
        return len(self.prefixes)

    def best(self, name: str | None = None) -> Prefix:
        """The `Prefix` with the lowest evaluation loss, or, without evaluation, the lowest last training loss.

        Args:
            name: Of a sweep over several names: whose variants.

        Raises:
            ConfigError: If there is no such prefix, or a sweep over several names is asked without one.

        Example:
            >>> run.best() is run["learning_rate=0.01"]
            True
        """
        return self.prefixes[self.best_name(name)]

    def best_name(self, name: str | None = None) -> str:
        """The name of what `best` gives.

        Args:
            name: As in `best`.

        Returns:
            A key of this mapping.

        Raises:
            ConfigError: As in `best`.
        """
        sources = {v["of"] for v in self.variants.values()}
        if name is None and len(sources) > 1:
            msg = f"best: expected one of the names {sorted(sources)[:10]}, since each was swept on data of its own"
            raise ConfigError(msg)
        found = [n for n in self.prefixes if name in (None, n, self.variants.get(n, {}).get("of"))]
        if not found:
            msg = (
                f"best: no trained prefix is named {name!r}"
                if name is not None
                else "best: no prefix was trained, see failed"
            )
            raise ConfigError(msg)
        by_eval = all("eval_loss" in self.metrics[n] for n in found)
        return min(found, key=lambda n: self.metrics[n]["eval_loss" if by_eval else "loss"])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the losses of the log over the steps (up to 20 prefixes each, else their mean).

        Args:
            path: A file that matplotlib knows how to write: .png, .svg, .pdf.

        Raises:
            ConfigError: Without matplotlib (``pip install 'prefixfast[train]'``), or for another kind of file.

        Example:
            >>> run.plot("losses.png")
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as e:
            msg = "plot: matplotlib is not installed: pip install 'prefixfast[train]'"
            raise ConfigError(msg) from e
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for key, style in (("loss", "-"), ("eval_loss", "--")):
            for label, points in self._curves(key).items():
                axes.plot(
                    *zip(*points, strict=True),
                    style,
                    marker="." if len(points) == 1 or key == "eval_loss" else "",
                    label=f"{label} {key}".strip(),
                )
        axes.set(xlabel="step", ylabel="loss of a target token")
        if axes.lines:
            axes.legend(fontsize="small")
        kind = Path(path).suffix[1:].lower()
        if kind not in figure.canvas.get_supported_filetypes():
            msg = f"plot: expected a file ending in .png, .svg or .pdf, got {str(path)!r}"
            raise ConfigError(msg)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format=kind)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write a short Markdown report: a line for each prefix, best first, and what failed.

        Args:
            path: The file.

        Example:
            >>> run.report("report.md")
        """
        columns = list(dict.fromkeys(k for m in self.metrics.values() for k in m))
        key = "eval_loss" if self.metrics and all("eval_loss" in m for m in self.metrics.values()) else "loss"
        lines = ["# Training", "", f"{len(self.prefixes)} prefixes trained, {len(self.failed)} failed.", ""]
        if self.metrics:
            lines += ["| prefix | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
            for name in sorted(self.metrics, key=lambda n: self.metrics[n][key]):
                values = (f"{self.metrics[name][c]:.5g}" if c in self.metrics[name] else "" for c in columns)
                lines.append(f"| {_cell(name)} | " + " | ".join(values) + " |")
        if self.failed:
            lines += [
                "",
                "| failed | why |",
                "| --- | --- |",
                *(f"| {_cell(n)} | {_cell(text)} |" for n, text in self.failed.items()),
            ]
        replace_file(Path(path), ("\n".join(lines) + "\n").encode())

    def _curves(self, key: str) -> dict[str, list[tuple[int, float]]]:
        """Points of each curve: by prefix where the log tells them apart, else of the mean."""
        found: dict[str, list[tuple[int, float]]] = {}
        for line in self.log:
            values = line.get(f"{key}_by_prefix") or ({"": line[key]} if key in line else {})
            for name, value in values.items():
                found.setdefault(name, []).append((line["step"], value))
        return found


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
