"""Doctests of the public names of training."""

from __future__ import annotations

import doctest

import pytest

from prefixfast import PrefixConfig, TrainConfig, TrainRun, train
from prefixfast.training.callbacks import Callback

ROWS = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "3+4=", "completion": "7"}]
FOUND = [
    t
    for o in (train, TrainRun, Callback, PrefixConfig, TrainConfig)
    for t in doctest.DocTestFinder(recurse=True).find(o, o.__name__)
    if t.examples
]


def test_public_names_have_an_example():
    assert {t.name for t in FOUND} >= {
        "train",
        "TrainRun",
        "TrainRun.best",
        "TrainRun.plot",
        "TrainRun.report",
        "Callback",
        "PrefixConfig",
        "TrainConfig",
    }


@pytest.mark.parametrize("case", FOUND, ids=lambda t: t.name)
def test_example(case, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case.globs = {
        "base": base,
        "rows": ROWS,
        "train": train,
        "Callback": Callback,
        "TrainConfig": TrainConfig,
        "PrefixConfig": PrefixConfig,
    }
    if case.name.startswith("TrainRun."):
        case.globs["run"] = train(base, ROWS, eval_data=ROWS, max_steps=2, sweep={"learning_rate": [1e-9, 1e-2]})
    assert doctest.DocTestRunner(verbose=False).run(case).failed == 0
