"""One run of a comparison in a process of its own: train, generate, evaluate.

A process of its own has a peak of memory of its own. ``python -m prefixfast.studies.compare.run`` reads the run from
standard input and writes ``result.json`` into the run's folder. The end of standard input, which also comes when the
parent process ends, interrupts it like Ctrl-C, so that training writes a checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from prefixfast.errors import DataError, PrefixFastError
from prefixfast.io.atomic import replace_file
from prefixfast.io.environment import environment
from prefixfast.io.json_lines import json_bytes, json_line
from prefixfast.store.runs import CHECKPOINT, FAILED, LOG
from prefixfast.studies.compare.rows import StudyRows, read_study_rows
from prefixfast.studies.compare.scores import score_texts
from prefixfast.studies.compare.study import StudyRun

RESULT, OUTPUTS, MODEL = "result.json", "outputs.jsonl", "model"  # in the folder of a run


def train_and_evaluate(run: StudyRun, folder: Path, progress: bool | None = None) -> dict[str, Any]:
    """Train, generate and evaluate as a run says.

    Args:
        run: Run.
        folder: Folder of the run, with the checkpoint of an interrupted run.
        progress: Whether to report progress, as for `train`.

    Returns:
        Line of the results file.

    Raises:
        DataError: If the rows are not those of the run.
    """
    import prefixfast

    rows = read_study_rows(run.study)
    if rows.digest() != run.rows:
        msg = "compare: the rows have changed since the comparison started; start it again"
        raise DataError(msg)
    arguments, fields = run.train_arguments()
    start = time.perf_counter()
    with prefixfast.load(run.study.model, dtype=fields.pop("dtype", "auto")) as base:
        loaded = time.perf_counter() - start
        tuned: Any = prefixfast.train(
            base,
            rows.train,
            task=rows.task,
            eval_data=rows.held_out,
            output_dir=folder / MODEL,
            resume=True,
            progress=progress,
            **arguments,
            **fields,
        )
        costs = training_costs(tuned, folder / MODEL) | {
            "base_bytes": sum(p.numel() * p.element_size() for p in base.hf.parameters()),
            "load_seconds": loaded,
        }
        texts, generation = _generate(run, rows, tuned, base, progress)
        device = {"dtype": str(base.dtype).removeprefix("torch."), "device": str(base.device)}
    lines = zip(rows.requests, texts, rows.references, strict=True)
    keys = ("request", "text", "references")
    replace_file(folder / OUTPUTS, b"".join(json_line(dict(zip(keys, line, strict=True))) for line in lines))
    return {
        **_description(run, rows),
        "metrics": tuned.training["metrics"],
        "quality": score_texts(run.study, rows, texts).to_json(),
        "costs": costs | generation,
        **device,
        "options": {n: tuned.training.get(n) for n in ("config", "prefix_config", "method_config", "method")},
        "environment": environment(),
    }


def _description(run: StudyRun, rows: StudyRows) -> dict[str, Any]:
    """Entries of a run in the results file that are known before it."""
    counts = {"train_rows": len(rows.train), "held_out_rows": len(rows.held_out), "inputs": len(rows.requests)}
    return {
        **run.to_json()["variant"],
        "label": run.variant.label,
        "seed": run.seed,
        "identity": run.identity,
        "shared": run.shared,
        "counts": counts,
        "task": rows.task.name,
        "study": run.study.settings(),
    }


def training_costs(tuned: Any, folder: Path) -> dict[str, Any]:
    """Numbers of parameters, bytes and seconds of a trained prefix or of trained weights.

    The seconds of the training are those of all steps at the median of a step, which also holds for a resumed run and
    on a machine that others disturb.

    Args:
        tuned: Result of `train`.
        folder: Its output folder.
    """
    steps, cost = int(tuned.training["metrics"]["steps"]), tuned.training["cost"]
    median = cost["seconds_per_step"]
    others = {LOG, FAILED, RESULT}
    files = [f for f in folder.rglob("*") if f.is_file() and f.name not in others and CHECKPOINT not in f.parts]
    return {
        "num_trained": tuned.num_trained,
        "num_stored": tuned.num_stored,
        "memory_bytes": tuned.nbytes,
        "disk_bytes": sum(f.stat().st_size for f in files),
        "seconds_per_step": median,
        "train_seconds": None if median is None else steps * median,
        "train_peak_bytes": cost["peak_bytes"],
    }


def _generate(
    run: StudyRun, rows: StudyRows, tuned: Any, base: Any, progress: bool | None
) -> tuple[list[str], dict[str, Any]]:
    """Text of each request, and the seconds and tokens of their generation."""
    import prefixfast
    from prefixfast.model.memory import peak_memory

    start = time.perf_counter()
    found = prefixfast.generate(rows.requests, tuned, model=base, progress=progress, **run.study.decoding)
    seconds = time.perf_counter() - start
    tokens = sum(g.usage["completion_tokens"] for g in found)
    costs = {"generate_seconds": seconds, "generated_tokens": tokens, "generate_peak_bytes": peak_memory(base.device)}
    return [g.text for g in found], costs | {"generate_seconds_per_text": seconds / len(found)}


def main() -> None:
    """Carry out the run on standard input, and write its result or its error."""
    values = json.loads(sys.stdin.readline())
    run, folder = StudyRun.from_json(values["run"]), Path(values["folder"])
    logging.getLogger("prefixfast.data").setLevel(logging.ERROR)  # the comparison itself has warned of its rows
    threading.Thread(target=_interrupt_at_end, daemon=True).start()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    try:
        result = train_and_evaluate(run, folder, values["progress"])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        kind = "" if isinstance(e, PrefixFastError | OSError) else f"{type(e).__name__}: "
        if kind:
            traceback.print_exc()
        result = {"error": f"{kind}{e}"}
    replace_file(folder / RESULT, json_bytes(result))


def _interrupt_at_end() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
