"""Figures as image files that are replaced atomically."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from prefixfast.io.atomic import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figure(figure: Figure, path: Path, *, dpi: int) -> None:
    """Draw a figure and write it to a file; an earlier image stays if that fails.

    Args:
        figure: Figure of matplotlib.
        path: Path of the image; its ending chooses the format. Missing parents are created.
        dpi: Resolution in dots per inch.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), dpi=dpi)
    replace_file(path, drawn.getvalue())
