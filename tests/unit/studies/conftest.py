"""A small comparison: rows, study, runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefixfast.studies.compare import run as run_module
from prefixfast.studies.compare.rows import read_study_rows
from prefixfast.studies.compare.runner import Runner, make_runs
from prefixfast.studies.compare.study import Study, StudyRun
from prefixfast.studies.compare.variants import Variant

TRAIN = {"max_steps": 3, "batch_size": 4, "dtype": "float32", "token_budget": 512}
METHODS = (
    Variant("prefix", {"prefix_length": 3}),
    Variant("prefix-mlp", {"prefix_length": 3, "encoder_hidden_size": 8}),
)
TABLES = [f"name[{name}], area[{area}]" for name in ("Mill", "Inn", "Bar", "Pub", "Den") for area in ("city", "river")]


@pytest.fixture(scope="package")
def rows_file(tmp_path_factory) -> Path:
    """File of E2E rows, two for each of ten tables."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"mr": mr, "ref": f"{word} {mr[5:8]}."} for mr in TABLES for word in ("The", "At")]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def study(folder, rows_file) -> Study:
    decoding = {"max_new_tokens": 5, "num_beams": 1}
    return Study(str(folder), str(rows_file), train=TRAIN, decoding=decoding, metrics=["BLEU", "NIST"])


@pytest.fixture
def runs(study) -> list[StudyRun]:
    return make_runs(study, read_study_rows(study), METHODS, range(2))


@pytest.fixture
def in_process(monkeypatch):
    """Carry out runs in this process, and return the labels of those that ran. A run of seed 13 fails."""
    ran: list[str] = []

    def wait_for(self, run: StudyRun, folder: Path, held: tuple[int, ...]) -> int:
        ran.append(run.label)
        folder.mkdir(parents=True)
        failed = {"error": "the gradient was not finite"}
        result = failed if run.seed == 13 else run_module.train_and_evaluate(run, folder, progress=False)
        (folder / run_module.RESULT).write_text(json.dumps(result))
        return 0

    monkeypatch.setattr(Runner, "_wait_for", wait_for)
    return ran
