"""Suites ``decode-step``, ``fairness``, ``tiering`` and ``store``, small: results files have all records and keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefixfast.bench import decode_step, fairness, random_base, tiering
from prefixfast.bench.decode_step import Setting

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}


def records(folder: Path) -> list[dict]:
    first, *rows = (json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines())
    assert first["environment"]["cpu"]
    return rows


def test_decode_step(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(random_base.SHAPES, "gpt2", random_base.SHAPES["gpt2"]._replace(fields=TINY))
    monkeypatch.setattr(decode_step, "SETTINGS", (Setting(0, 0, True), Setting(0, 0, False), Setting(20, 2, True)))
    monkeypatch.setattr(decode_step, "NEW", 40)
    monkeypatch.setattr(decode_step, "roofline", lambda *_: (1e9, 1e9))
    done = cli("bench", "decode-step", "-o", tmp_path, "--steps", 2, "--rounds", 2)
    assert done.code == 0, done.err
    head, *rows = records(tmp_path)
    assert head["command"] == "prefixfast bench decode-step --dtype float32 --steps 2 --rounds 2"
    assert (head["suite"], len(head["copy_gb_s"]), len(head["read_gb_s"])) == ("decode_step", 2, 2)
    assert [(r["prefix_length"], r["distinct"], r["packed"]) for r in rows] == [
        (0, 0, True),
        (0, 0, False),
        (20, 2, True),
    ]
    assert all(r["best_ms"] <= r["median_ms"] and list(r["parts_ms"]) == list(decode_step.PARTS) for r in rows)
    assert rows[2]["limit_ms"] > rows[2]["floor_ms"] >= rows[0]["median_ms"]
    assert "P=20, 2 distinct, weights packed" in done.out


def test_a_decode_step_with_other_tokens_has_no_times(cli, tmp_path, monkeypatch):
    """The engine without packed weights has another output layer."""
    monkeypatch.setitem(random_base.SHAPES, "gpt2", random_base.SHAPES["gpt2"]._replace(fields=TINY))
    monkeypatch.setattr(decode_step, "SETTINGS", (Setting(0, 0, True), Setting(0, 0, False)))
    monkeypatch.setattr(decode_step, "NEW", 40)
    monkeypatch.setattr(decode_step, "roofline", lambda *_: (1e9, 1e9))
    right = decode_step._engine

    def wrong(model, setting):
        if not setting.packed:
            model.hf.transformer.ln_f.weight.data.neg_()
        return right(model, setting)

    monkeypatch.setattr(decode_step, "_engine", wrong)
    done = cli("bench", "decode-step", "-o", tmp_path / "out", "--steps", 2, "--rounds", 1)
    assert done.code == 1
    assert "P=0: Setting(length=0, distinct=0, packed=False): token " in done.err
    assert "best" not in done.out


@pytest.fixture
def small_base(monkeypatch):
    monkeypatch.setattr(random_base, "SMALL", TINY | {"vocab_size": 8000})


def test_fairness(cli, tmp_path, monkeypatch, small_base):
    monkeypatch.setattr(fairness, "capacity", lambda engine: 400.0)
    done = cli("bench", "fairness", "-o", tmp_path, "--seconds", 0.3, "--rounds", 1)
    assert done.code == 0, done.err
    head, *rows = records(tmp_path)
    assert (head["suite"], head["loud"], head["shape"]["n_embd"]) == ("fairness", 10, 32)
    assert head["command"] == "prefixfast bench fairness --seconds 0.3 --rounds 1"
    assert sorted(r["tenants"] for r in rows) == [False, True]
    assert all(set(r["calm"]) == {"p95_ms", "worst_tenant_p95_ms"} and r["growth"] > 0 for r in rows)
    assert "each sender is a tenant" in done.out


def test_fairness_needs_a_request_of_every_tenant(cli, tmp_path, monkeypatch, small_base):
    monkeypatch.setattr(fairness, "capacity", lambda engine: 0.1)
    done = cli("bench", "fairness", "-o", tmp_path, "--seconds", 0.1, "--rounds", 1)
    assert done.code == 1
    assert "give more seconds" in done.err


def test_tiering(cli, tmp_path, monkeypatch, small_base):
    monkeypatch.setattr(tiering, "ROUNDS", 2)
    done = cli("bench", "tiering", "-o", tmp_path, "--stored", 40, "--resident", 3, "--requests", 50)
    assert done.code == 0, done.err
    head, every, few, ratio = records(tmp_path)
    assert (head["suite"], head["stored"], head["resident"], head["requests"]) == ("tiering", 40, 3, 50)
    assert [r["contender"] for r in (every, few)] == ["all resident", "tiered"]
    assert every["stats"]["evictions"] == 0 < few["stats"]["reads"]
    assert ratio["p99_ratio"] == round(few["p99_ms"] / every["p99_ms"], 3)


def test_a_tiered_engine_with_other_tokens_has_no_figures(cli, tmp_path, monkeypatch, small_base):
    """The prefixes of the small arena are mixed up: each file of the store gives the values of another one."""
    monkeypatch.setattr(tiering, "ROUNDS", 1)
    right, calls = tiering._gaps, []

    def mixed_up(engine, names, g):
        calls.append(engine)
        return right(engine, names if engine is calls[0] else [str(39 - int(n)) for n in names], g)

    monkeypatch.setattr(tiering, "_gaps", mixed_up)
    done = cli("bench", "tiering", "-o", tmp_path / "out", "--stored", 40, "--resident", 3, "--requests", 50)
    assert done.code == 1
    assert "tiering: tiered: token " in done.err
    assert "p99" not in done.out
    assert not (tmp_path / "out").exists()


def test_one_round_has_no_spread(cli, tmp_path, monkeypatch, small_base):
    monkeypatch.setattr(fairness, "capacity", lambda engine: 400.0)
    for rounds in (1, 2):
        done = cli("bench", "fairness", "-o", tmp_path, "--seconds", 0.3, "--rounds", rounds)
        assert ("greatest" in done.out) is (rounds > 1)
        done = cli("bench", "store", "-o", tmp_path, "--stored", 12, "--rounds", rounds)
        (line,) = (line for line in done.out.splitlines() if line.startswith("| scan |"))
        assert (line.split(" | ")[2].strip() != "") is (rounds > 1)


def test_store(cli, tmp_path):
    done = cli("bench", "store", "-o", tmp_path, "--stored", 12, "--rounds", 2)
    assert done.code == 0, done.err
    rows = records(tmp_path)
    assert [r["what"] for r in rows] == ["put", "open", "len", "list", "list again", "scan", "info", "get"]
    assert [r["calls"] for r in rows] == [12, 2, 2, 2, 2, 2, 24, 24]
    assert "| ms, 12 prefixes | median | best | calls |" in done.out
