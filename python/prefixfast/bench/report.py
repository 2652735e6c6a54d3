"""A benchmark's results: tables, a picture, and one HTML file with both that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixfast.io.atomic import replace_file

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
td:first-child, th:first-child { text-align: left; } img { max-width: 100%; } pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; }"""


def markdown(lines: Mapping[str, Mapping[int, str]], lengths: Sequence[int], corner: str) -> str:
    """A Markdown table: one row a contender, one column a prefix length; what was not measured stays empty."""
    head = [f"| {corner} | " + " | ".join(f"P={n}" for n in lengths) + " |", "| --- |" + " ---: |" * len(lengths)]
    return "\n".join(
        [
            *head,
            *(f"| {label} | " + " | ".join(cells.get(n, "") for n in lengths) + " |" for label, cells in lines.items()),
        ]
    )


def picture(lines: Mapping[str, Mapping[int, float]], path: Path, title: str, rate: str) -> None:
    """Rates versus prefix length as a PNG, a line for each contender, prefixfast's first and solid."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def write_report(
    path: Path, title: str, tables: Sequence[tuple[str, str]], picture: Path, environment: dict[str, Any], command: str
) -> None:
    """Write the report.

    Args:
        path: The file.
        title: Its heading.
        tables: Caption and Markdown table.
        picture: A PNG, embedded.
        environment: What `harness.environment` says of the machine.
        command: How to measure it again.
    """
    encoded = base64.b64encode(picture.read_bytes()).decode()
    parts = [f"<h2>{html.escape(caption)}</h2>\n{_table(text)}" for caption, text in tables]
    body = "\n".join(
        [
            f"<h1>{html.escape(title)}</h1>",
            f'<img alt="{html.escape(title)}" src="data:image/png;base64,{encoded}">',
            *parts,
            f"<h2>Again</h2><pre>{html.escape(command)}</pre>",
            f"<h2>Machine</h2><pre>{html.escape(json.dumps(environment, indent=2))}</pre>",
        ]
    )
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style></head>'
    replace_file(path, f"{head}<body>\n{body}\n</body></html>\n".encode())


def _table(markdown: str) -> str:
    header, _, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in markdown.splitlines())
    lines = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"
