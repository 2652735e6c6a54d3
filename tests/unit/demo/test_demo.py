"""The demo: what its base was trained on, what its rows hold, and (long) that it keeps its promises."""

import dataclasses
import re
from itertools import islice

import pytest
import torch

from prefixfast.demo.corpus import pages
from prefixfast.demo.jobs import JOBS, coverage
from prefixfast.demo.run import EMBEDDED, LIMITS, SETTINGS, generate_all, train_jobs
from prefixfast.demo.train_base import TEXT_SEED, TOKENIZER_SEED
from prefixfast.demo.values import has_table, heldout_values
from prefixfast.model.load import load


@pytest.mark.parametrize("seed", [TOKENIZER_SEED, TEXT_SEED])
def test_the_base_has_seen_no_table_and_no_held_out_value(seed):
    for page in islice(pages(seed), 3000):
        for text in page:
            assert not has_table(text), text
            assert not heldout_values(text), text


def test_the_checks_see_a_table_and_a_held_out_value():
    row = JOBS[0].rows("heldout", 1, seed=0)[0]
    assert has_table(" | ".join(f"{k} : {v}" for k, v in row["table"].items()))
    assert heldout_values(row["ref"])


@pytest.mark.parametrize("job", JOBS, ids=[j.name for j in JOBS])
def test_rows_are_in_form_and_their_values_apart(job):
    train, held = job.rows("train", 400, seed=0), job.rows("heldout", 100, seed=1)
    assert all(job.check(r["ref"]) and coverage(r["ref"], r["table"]) == 1 for r in train + held)
    seen = " ".join(r["ref"] for r in train).lower()
    assert not any(re.search(rf"\b{re.escape(v.lower())}\b", seen) for r in held for v in r["table"].values())
    for other in JOBS:
        assert other is job or not any(other.check(r["ref"]) for r in held), "the three forms are different"


def test_the_embedded_base_is_small_and_writes_text():
    assert sum(f.stat().st_size for f in EMBEDDED.iterdir()) <= 8 * 2**20
    import prefixfast

    with load(EMBEDDED, dtype="float32") as base:
        (g,) = prefixfast.generate([" One morning,"], model=base, max_new_tokens=30)
    assert len(re.findall(r"\b[a-z]{2,}\b", g.text)) > 8


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_keeps_its_promises(seed):
    torch.set_num_threads(2)
    setting = SETTINGS["embedded"]
    with load(EMBEDDED, dtype="float32") as base:
        run, seconds = train_jobs(base, dataclasses.replace(setting, fields={**setting.fields, "seed": seed}), None)
        report = generate_all(base, run, setting, seconds)
    torch.set_num_threads(1)
    assert report.passed, {job.name: report.of(job) for job in JOBS} | LIMITS
    assert all(len(s.base.split()) > 4 for s in report.samples), "the base goes on with text of its own"
