"""Demo: training text of the base, rows of the jobs, printed report, and (long) the figures' limits."""

import dataclasses
import os
import re
import subprocess
import sys
from itertools import islice

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import prefixfast
from oracles import ROOT
from prefixfast.demo import BASE, SEQ2SEQ_BASE, train_seq2seq_base
from prefixfast.demo.corpus import pages
from prefixfast.demo.jobs import JOBS, coverage
from prefixfast.demo.run import SETTINGS, generate_all, train_jobs
from prefixfast.demo.train_base import TEXT_SEED, TOKENIZER_SEED
from prefixfast.demo.values import has_table, heldout_values
from prefixfast.model.load import load


@pytest.mark.parametrize("seed", [TOKENIZER_SEED, TEXT_SEED])
def test_the_base_has_seen_no_table_and_no_held_out_value(seed):
    for page in islice(pages(seed), 3000):
        for text in page:
            assert not has_table(text), text
            assert not heldout_values(text), text


def test_a_table_and_a_held_out_value_are_recognized():
    row = JOBS[0].rows("heldout", 1, seed=0)[0]
    assert has_table(" | ".join(f"{k} : {v}" for k, v in row["table"].items()))
    assert heldout_values(row["ref"])


@pytest.mark.parametrize("job", JOBS, ids=[j.name for j in JOBS])
def test_rows_are_in_form_and_their_values_apart(job):
    train, held = job.rows("train", 400, seed=0), job.rows("heldout", 100, seed=1)
    assert all(job.has_form(r["ref"]) and coverage(r["ref"], r["table"]) == 1 for r in train + held)
    seen = " ".join(r["ref"] for r in train).lower()
    assert not any(re.search(rf"\b{re.escape(v.lower())}\b", seen) for r in held for v in r["table"].values())
    for other in JOBS:
        assert other is job or not any(other.has_form(r["ref"]) for r in held), "the three forms are different"


def test_the_encoder_decoder_base_has_seen_no_table_and_no_held_out_value():
    with load(SEQ2SEQ_BASE) as base:
        tok = base.require_tokenizer().hf
        pairs = train_seq2seq_base.text_pairs(tok, 6000, seed=2)(7)
    texts = [tok.decode(ids, skip_special_tokens=True) for pair in pairs for ids in pair]
    assert len(texts) > 100
    assert not [t for t in texts if has_table(t) or heldout_values(t)]
    assert 0 < sum(source == target for source, target in pairs) < len(pairs) / 3


def test_the_encoder_decoder_base_follows_the_heading_and_copies_names():
    tok = AutoTokenizer.from_pretrained(SEQ2SEQ_BASE)
    hf = AutoModelForSeq2SeqLM.from_pretrained(SEQ2SEQ_BASE, dtype=torch.float32).eval()
    assert sum(f.stat().st_size for f in SEQ2SEQ_BASE.iterdir()) <= 8 * 2**20
    source = (
        "These two notes belong together. First come the facts, then a loud announcement to everyone. "
        "The fair is Malopool. The hall is Uxumouth. The host is Halneris. The guest is Jomilo."
    )
    ids = hf.generate(**tok(source, return_tensors="pt"), max_new_tokens=60, num_beams=4)
    text = tok.decode(ids[0], skip_special_tokens=True)
    assert JOBS[2].has_form(text), text
    assert coverage(text, dict(enumerate(["Malopool", "Uxumouth", "Halneris", "Jomilo"]))) == 1


def test_the_embedded_base_is_small_and_writes_text():
    assert sum(f.stat().st_size for f in BASE.iterdir()) <= 8 * 2**20
    with load(BASE, dtype="float32") as base:
        (g,) = prefixfast.generate([" One morning,"], model=base, max_new_tokens=30)
    assert len(re.findall(r"\b[a-z]{2,}\b", g.text)) > 8


@pytest.mark.parametrize("is_seq2seq", [False, True], ids=["decoder-only", "encoder-decoder"])
def test_the_demo_prints_its_report_alone(tmp_path, is_seq2seq):
    """A small demo in a pipe: every line is of the report, without warnings and progress bars."""
    program = tmp_path / "small_demo.py"
    program.write_text(
        "import dataclasses, typer\n"
        "from prefixfast.bench.generate import Workload\n"
        "from prefixfast.demo import run\n"
        "from prefixfast.demo.__main__ import main\n"
        "fields = {'prefix_length': 4, 'max_steps': 2, 'batch_size': 2, 'learning_rate': 5e-2}\n"
        "small = {'train_rows': 20, 'fields': fields, 'heldout_rows': 1}\n"
        "work = Workload(requests=2, prompt=4, new=3, one_by_one=1)\n"
        "measured = {'work': work, 'lengths': (0, 4), 'rounds': 1}\n"
        "for (kind, is_seq2seq), setting in list(run.SETTINGS.items()):\n"
        "    how = small if is_seq2seq else small | measured\n"
        "    run.SETTINGS[kind, is_seq2seq] = dataclasses.replace(setting, **how)\n"
        "typer.run(main)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, program, "--output", tmp_path / "out", "--samples", "1"]
    command += ["--seq2seq"] if is_seq2seq else []
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if "loss did not fall" not in line]  # two steps are few
    assert lines in ([], ["A figure is outside its limit."]), done.stderr
    assert "\r" not in done.stdout
    lines = done.stdout.splitlines()
    name = "BART, 1.7" if is_seq2seq else "Llama, 2.2"
    assert lines[0].startswith(f"Base: the embedded {name} million parameters")
    assert "computing in float32 on cpu" in lines[0]
    settings = [line for line in lines if line.startswith("Settings of the contenders")]
    jobs = ["describe", "invite"]
    if is_seq2seq:
        assert [line.split()[1] for line in lines if " rows (enc, self, cross), read by " in line] == jobs
    else:
        jobs = ["announce", *jobs]
        assert len(settings) == 1, "all contenders have the same"
        assert "use_cache=True" in settings[0]
        assert lines[-1] == f"Plot: {tmp_path / 'out' / 'throughput.png'}"
    folder = tmp_path / "out" / "prefixes"
    assert sorted(p.name for p in folder.iterdir() if p.name in "describe invite announce") == jobs
    assert max(map(len, lines)) <= 110


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("is_seq2seq", [False, True], ids=["decoder-only", "encoder-decoder"])
def test_the_figures_of_the_demo_are_within_their_limits(seed, is_seq2seq):
    torch.set_num_threads(2)
    setting = SETTINGS["embedded", is_seq2seq]
    with load(SEQ2SEQ_BASE if is_seq2seq else BASE, dtype="float32") as base:
        run, seconds = train_jobs(base, dataclasses.replace(setting, fields={**setting.fields, "seed": seed}), None)
        report = generate_all(base, run, setting, seconds)
    torch.set_num_threads(1)
    assert report.passed, {job.name: report.of(job) for job in setting.jobs} | dict(setting.limits)
    assert all(len(s.base.split()) > 4 for s in report.samples), "the base goes on with text of its own"
