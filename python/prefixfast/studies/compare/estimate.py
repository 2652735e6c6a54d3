"""Estimate of the time of a comparison, from two measured steps of each method."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from prefixfast.io.json_lines import json_line
from prefixfast.studies.compare.rows import read_study_rows
from prefixfast.studies.compare.study import Part


def estimate_part(part: Part) -> dict[str, Any]:
    """Steps, seconds and bytes of one part, of which two steps are run.

    Args:
        part: The part.

    Returns:
        ``steps``, ``seconds_per_step``, ``train_seconds``, ``peak_bytes`` and ``learning_rate``.
    """
    from prefixfast.training.estimate import estimate

    rows = read_study_rows(part.study)
    arguments, fields = part.train_arguments()
    found = estimate(part.study.model, rows.train, task=rows.task, progress=False, **arguments, **fields)
    return {
        "steps": found.steps,
        "seconds_per_step": found.seconds_per_step,
        "train_seconds": found.seconds,
        "peak_bytes": found.peak_bytes,
        "learning_rate": found.learning_rates[0] if found.learning_rates else None,
    }


def estimate_parts(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Estimates of parts, those of one method in one process, or the error of each.

    Args:
        parts: Parts.
    """
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        if part.variant.label not in found:
            found[part.variant.label] = _in_own_process(part)
    return [{"part": part.label, **found[part.variant.label]} for part in parts]


def _in_own_process(part: Part) -> dict[str, Any]:
    command = [sys.executable, "-m", "prefixfast.studies.compare.estimate"]
    done = subprocess.run(command, input=json_line(part.to_json()), capture_output=True, check=False)
    lines = done.stdout.decode("utf8", "replace").splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.decode("utf8", "replace").strip().splitlines() or ["no message"])[-1]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


if __name__ == "__main__":
    print(json.dumps(estimate_part(Part.from_json(json.loads(sys.stdin.readline())))))
