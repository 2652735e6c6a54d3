"""Report of a suite: Markdown tables, a plot, and one HTML file that holds both."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prefixfast.io.atomic import replace_file
from prefixfast.io.environment import environment, version
from prefixfast.io.figures import write_figure

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; } img { max-width: 100%; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; }"""


@dataclass(frozen=True)
class Report:
    """Contents of a report.

    Attributes:
        title: Heading.
        tables: Caption and Markdown text of each table.
        plot: PNG file of the plot.
        command: Command that repeats the measurement.
    """

    title: str
    tables: Sequence[tuple[str, str]]
    plot: Path
    command: str


def markdown(lines: Mapping[str, Mapping[int, str]], lengths: Sequence[int], corner: str) -> str:
    """Markdown table with a row for each contender and a column for each prefix length. Missing cells are empty."""
    out = [f"| {corner} | " + " | ".join(f"P={n}" for n in lengths) + " |", "| --- |" + " ---: |" * len(lengths)]
    for label, cells in lines.items():
        out.append(f"| {label} | " + " | ".join(cells.get(n, "") for n in lengths) + " |")
    return "\n".join(out)


def settings_table(settings: Iterable[tuple[str, Mapping[str, object]]]) -> str:
    """Markdown table of the settings under which each contender ran.

    Args:
        settings: Contender and values by name of the setting, of one or several runs of each.
    """
    found = list(settings)
    names = list(found[0][1])
    lines = [f"| contender | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    rows = dict.fromkeys((contender, *map(str, values.values())) for contender, values in found)
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def plot_rates(lines: Mapping[str, Mapping[int, float]], path: Path, title: str, rate: str) -> None:
    """Write a PNG of rates against prefix length, with a line for each contender. Those of prefixfast are solid.

    Args:
        lines: Rate by prefix length, by contender.
        path: PNG file to write.
        title: Title of the plot.
        rate: Label of the vertical axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for label, cells in lines.items():
        lengths = sorted(cells)
        axes.plot(lengths, [cells[n] for n in lengths], "o-" if label.startswith("prefixfast") else "s--", label=label)
    axes.set(xlabel="prefix length (rows of keys and values)", ylabel=rate, ylim=(0, None))
    axes.set_title(title, fontsize="small")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="small")
    write_figure(figure, path, dpi=130)


def write_report(path: Path, report: Report) -> None:
    """Write the report as one HTML file with the plot embedded, and with the command and the machine below."""
    title, encoded = html.escape(report.title), base64.b64encode(report.plot.read_bytes()).decode()
    body = [f"<h1>{title}</h1>", f'<img alt="{title}" src="data:image/png;base64,{encoded}">']
    body += [f"<h2>{html.escape(caption)}</h2>\n{_html_table(text)}" for caption, text in report.tables]
    body.append(f"<h2>Command</h2><pre>{html.escape(report.command)}</pre>")
    body.append(f"<h2>Machine</h2><pre>{html.escape(json.dumps(environment(), indent=2))}</pre>")
    head = f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
    text = f"<!doctype html>{head}<body>\n" + "\n".join(body) + "\n</body></html>\n"
    replace_file(path, text.encode())


def print_report(output: Path, report: Report) -> None:
    """Print the title, the tables and the files that were written into ``output``."""
    print(report.title)
    for caption, text in report.tables:
        print(f"\n{caption}\n\n{text}")
    files = ", ".join(str(output / name) for name in ("results.jsonl", report.plot.name, "report.html"))
    print(f"\n{files}" + ("" if version("peft") else " (pip install peft to compare with it)"))


def _html_table(markdown: str) -> str:
    header, _, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in markdown.splitlines())
    lines = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"
