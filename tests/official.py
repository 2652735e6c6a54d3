"""Own texts with what the official scripts printed for them (``tests/unit/metrics``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "unit" / "metrics"
TEXTS: dict[str, Any] = json.loads((_FOLDER / "texts.json").read_text(encoding="utf8"))
SCORES: dict[str, Any] = json.loads((_FOLDER / "official.json").read_text(encoding="utf8"))["scores"]


def texts(name: str) -> tuple[list[str], list[list[str]]]:
    """Outputs and references of a set of texts."""
    return TEXTS[name]["outputs"], TEXTS[name]["references"]


def part(name: str, subset: str) -> tuple[list[str], list[list[str]]]:
    """Outputs and references of ``seen``, ``unseen`` or ``all`` texts of a set."""
    outputs, references = texts(name)
    keep = [i for i in range(len(outputs)) if subset == "all" or TEXTS[name]["subset"][i] == subset]
    return [outputs[i] for i in keep], [references[i] for i in keep]
