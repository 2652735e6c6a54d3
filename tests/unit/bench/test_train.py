"""Suites ``train`` and ``tokenize`` on tiny bases: contenders agree, files are written, differences stop the suite."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from prefixfast import load
from prefixfast.bench import tokenize, train, train_contenders
from prefixfast.bench.contenders import Bases, peft_model
from prefixfast.bench.harness import WrongResultError
from prefixfast.bench.peak import PeakOver, total_memory
from prefixfast.bench.random_base import SHAPES, random_prefixes
from prefixfast.bench.train import LORA, OURS, PEFT, Settings, check_same_losses, measure, table
from prefixfast.bench.train_contenders import Run, Workload
from prefixfast.demo import BASE
from prefixfast.errors import ConfigError, DataError

WORK = Workload(examples=3, shortest=4, longest=9, steps=2)
TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}


def settings(**fields):
    defaults = {"model": None, "shape": "gpt2", "dtype": "float32", "lengths": [2, 5], "counts": [1, 3]}
    return Settings(**defaults | {"rounds": 2, "command": ""} | fields)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_is_measured_on_equal_losses(family):
    with load(tiny.make(family)) as model:
        points = measure(Bases(model, tiny.make(family)), settings(), WORK, shown=False)
        shapes, modules = model.layers, dict(model.hf.named_modules())
    adapted = [m for n, m in modules.items() if n.endswith(("c_attn", "q_proj", "v_proj"))]
    widths = sum(sum(m.weight.shape) for m in adapted)
    assert [(p.contender, p.prefixes, p.prefix_length) for p in points] == [
        (OURS, 1, 2),
        (OURS, 3, 2),
        (PEFT, 1, 2),
        (LORA, 1, 2),
        (OURS, 1, 5),
        (OURS, 3, 5),
        (PEFT, 1, 5),
        (LORA, 1, 5),
    ]
    tokens = [WORK.steps * sum(len(r["input_ids"]) for i in range(n) for r in WORK.rows(i, tiny.VOCAB)) for n in (1, 3)]
    assert [p.tokens for p in points[:4]] == [*tokens, tokens[0], tokens[0]]
    prefix, _, theirs, lora = points[:4]
    assert prefix.numbers == theirs.numbers == 2 * 2 * sum(s.num_kv_heads * s.head_dim for s in shapes)
    assert lora.numbers == 8 * widths
    assert all(p.state == 12 * p.numbers and p.users_that_fit == (p.room - p.peak) // p.state for p in points)
    expected = 3600 / (min(prefix.timing.seconds) / WORK.steps * 80)
    assert prefix.users_per_hour == pytest.approx(expected)
    assert points[1].users_per_hour == pytest.approx(3 * 3600 / (min(points[1].timing.seconds) / WORK.steps * 80))
    assert len(train.users_table(points).splitlines()) == 2 + len(points)
    assert all(len(p.timing.seconds) == 2 and p.rate > 0 for p in points)
    assert table(points).splitlines()[0] == "| tokens/s | P=2 | P=5 |"
    assert [line.split(" | ")[0] for line in table(points).splitlines()[2:]] == [
        f"| {OURS}, 1 at once",
        f"| {OURS}, 3 at once",
        f"| {PEFT}",
        f"| {LORA}",
    ]


def test_another_lora_stops_the_benchmark(monkeypatch):
    other = functools.partial(train_contenders.peft_lora, rank=2)
    monkeypatch.setattr(train, "peft_lora", lambda plain, rows, steps, rank: other(plain, rows, steps))
    with load(tiny.make("gpt2")) as model, pytest.raises(WrongResultError, match="prefixfast's LoRA"):
        measure(Bases(model, tiny.make("gpt2")), settings(lengths=[2], counts=[1], rounds=1), WORK, shown=False)


def test_the_peak_of_memory_is_that_over_what_was_in_use():
    before = torch.ones(4 << 20)
    with PeakOver(torch.device("cpu")) as memory:
        for count in (4 << 20, 16 << 20, 2 << 20):
            torch.ones(count)
    assert 60e6 < memory.nbytes < 100e6  # the allocator may keep the smaller tensors: 92e6 bytes in all
    assert total_memory(torch.device("cpu")) > before.nbytes


def test_other_losses_stop_the_benchmark():
    runs = {(OURS, 1): Run(1.0, [2.0, 1.5]), (PEFT, 1): Run(1.0, [2.0, 1.5001])}
    check_same_losses(runs, 5, 1e-4)
    for losses in ([2.0, 1.6], [2.0, float("nan")]):
        with pytest.raises(WrongResultError, match=f"P=5: {PEFT} has loss .* at step 2, {OURS} 1.5"):
            check_same_losses(runs | {(PEFT, 1): Run(1.0, losses)}, 5, 1e-4)


def test_a_prefix_that_differs_is_noticed():
    rows = WORK.rows(0, tiny.VOCAB)
    with load(tiny.make("gpt2")) as model:
        one, another = random_prefixes(model, 4, 2)
        first = train_contenders.ours(model, {"a": rows}, {"a": one}, 2)
        other = train_contenders.peft(tiny.make("gpt2"), rows, another, 2)
    with pytest.raises(WrongResultError, match="no speed is reported"):
        check_same_losses({(OURS, 1): first, (PEFT, 1): other}, 4, 1e-4)


def test_a_trainer_that_does_nothing_is_noticed(monkeypatch):
    rows, start = WORK.rows(0, tiny.VOCAB), None
    with load(tiny.make("gpt2")) as model:
        (start,) = random_prefixes(model, 4, 1)
        good = train_contenders.ours(model, {"a": rows}, {"a": start}, 2)
    check_same_losses({(OURS, 1): good, (PEFT, 1): train_contenders.peft(tiny.make("gpt2"), rows, start, 2)}, 4, 1e-4)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    with pytest.raises(WrongResultError, match="at step 2"):
        check_same_losses(
            {(OURS, 1): good, (PEFT, 1): train_contenders.peft(tiny.make("gpt2"), rows, start, 2)}, 4, 1e-4
        )


def test_peft_trains_in_fp32_over_a_bf16_base():
    base = tiny.make("gpt2").bfloat16()
    with load(tiny.make("gpt2")) as model:
        (start,) = random_prefixes(model, 4, 1)
    assert peft_model(base, start)[1].dtype == torch.float32


def test_the_train_command_writes_its_files(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Workload", lambda examples: replace(WORK, examples=examples))
    monkeypatch.setitem(SHAPES, "gpt2", SHAPES["gpt2"]._replace(fields=TINY))
    batch = ("--batch-size", str(WORK.examples))
    done = cli("bench", "train", "-o", tmp_path, "--lengths", "2,4", "--prefixes", "1,2", *batch, "--rounds", "1")
    assert done.code == 0, done.err
    head, *rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()][1:]
    options = f"--lengths 2,4 --prefixes 1,2 --batch-size {WORK.examples} --lora-rank 8 --rounds 1 --dtype float32"
    assert head["command"] == f"prefixfast bench train {options} --shape gpt2"
    assert head["examples"] == WORK.examples
    assert list(head["settings"]) == [OURS, PEFT, LORA]
    assert all("max_grad_norm=1.0" in s["options"] and s["dtype"] == "float32" for s in head["settings"].values())
    assert f"| {PEFT} | float32 | sdpa | 10 |".replace("10", str(WORK.examples)) in done.out
    assert "spread" not in done.out, "one round has none"
    assert "| users an hour |" in done.out
    assert all(r["state_bytes"] > 0 and r["users_per_hour"] > 0 for r in rows)
    assert done.err.count("computing in float32 on cpu") == 1
    assert [(r["contender"], r["prefixes"]) for r in rows[:3]] == [(OURS, 1), (OURS, 2), (PEFT, 1)]
    assert (tmp_path / "throughput.png").read_bytes()[:4] == b"\x89PNG"
    assert "<h2>Command</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("lengths", "counts", "message"),
    [
        ([0, 4], [1], "lengths: expected prefixes of 1 to 944 rows"),
        ([2000], [1], "lengths: expected"),
        ([4], [0, 1], "prefixes: expected numbers of at least 1"),
    ],
)
def test_lengths_and_counts_that_cannot_be_trained_are_refused(tmp_path, monkeypatch, lengths, counts, message):
    monkeypatch.setitem(SHAPES, "gpt2", SHAPES["gpt2"]._replace(fields=TINY))
    with pytest.raises(ConfigError, match=message):
        train.run(tmp_path, settings(lengths=lengths, counts=counts))
    assert not list(tmp_path.iterdir())


# ---- tokens ----


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BASE)


def test_tokenization_is_measured_on_equal_tokens(tokenizer):
    points = tokenize.measure(tokenizer, ["a short text", "", "name : The Mill | £"], rounds=3)
    assert [p.contender for p in points] == [tokenize.OURS, tokenize.ARRAYS, tokenize.LISTS, tokenize.FAST]
    assert all(p.texts == 3 and p.bytes == 12 + 20 and len(p.timing.seconds) == 3 for p in points)
    lines = tokenize.table(points).splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("| prefixfast | ")
    assert lines[2].endswith("| 1.0 |")
    with pytest.raises(DataError, match="at least one text"):
        tokenize.measure(tokenizer, [], rounds=1)


def test_other_tokens_stop_the_benchmark(tokenizer):
    calls = tokenize.contenders(tokenizer, ["one text", "another"])
    tokenize.check_same_tokens(calls)
    ids, indptr = calls[tokenize.OURS]()
    for wrong in ((np.where(np.arange(len(ids)) == len(ids) - 1, 7, ids), indptr), (ids, indptr[:-1])):
        with pytest.raises(WrongResultError, match="prefixfast: other tokens than transformers' for text 1"):
            tokenize.check_same_tokens(calls | {tokenize.OURS: lambda wrong=wrong: wrong})


def test_the_tokenize_command_writes_its_file(cli, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"mr": "name[Mill], food[Thai]", "refs": ["The Mill is Thai.", "Thai food at the Mill."]}\n')
    done = cli("bench", "tokenize", BASE, data, "-o", tmp_path, "--rounds", "2")
    assert done.code == 0, done.err
    assert "3 texts" in done.out
    head, *rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()][1:]
    assert (head["texts"], len(rows)) == (3, 4)
    assert {r["contender"] for r in rows} == {tokenize.OURS, tokenize.ARRAYS, tokenize.LISTS, tokenize.FAST}


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--lengths", "a"],
        ["train", "--dtype", "int8"],
        ["train", "--shape", "bert"],
        ["train", "--rounds", "0"],
        ["tokenize", "x", "/no/file"],
    ],
)
def test_wrong_options_are_refused(cli, words):
    assert cli("bench", *words).code == 2


def test_rows_differ_in_length_and_have_loss_on_their_second_half():
    rows = WORK.rows(0, 50)
    assert rows == WORK.rows(0, 50) != WORK.rows(1, 50)
    assert all(4 <= len(r["input_ids"]) <= 9 and r["labels"].count(-100) == len(r["input_ids"]) // 2 for r in rows)
    assert torch.tensor([x for r in rows for x in r["input_ids"]]).min() >= 3
