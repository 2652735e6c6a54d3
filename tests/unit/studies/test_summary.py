"""Summary, tables and plot of a comparison."""

from __future__ import annotations

import json
import statistics

import pytest

from oracles import ROOT
from prefixfast.metrics.registry import better_side
from prefixfast.studies.compare.plot import plot
from prefixfast.studies.compare.summary import LOSS, Spread, summarize
from prefixfast.studies.compare.table import cost_rows, in_units, markdown, number, quality_rows


def line(label: str, seed: int, loss: float, bleu: float, *, size: int = 1000, shared: str = "s") -> dict:
    scores = {"BLEU": {"value": bleu, "text": f"{bleu:.2f}", "tool": "t"}}
    costs = dict.fromkeys(("num_trained", "num_stored", "train_peak_bytes", "disk_bytes", "memory_bytes"), size)
    return {
        "label": label,
        "seed": seed,
        "shared": shared,
        "identity": f"{label}{seed}{shared}",
        "metrics": {"eval_loss": loss},
        "quality": {"scores": scores, "missing": {"METEOR": "no Java"}},
        "costs": costs | {"base_bytes": 500, "seconds_per_step": None, "generate_seconds_per_text": 0.5},
        "counts": {"train_rows": 8, "held_out_rows": 2, "inputs": 1},
        "environment": {"cpu": "C", "gpu": None, "threads": 1},
        "dtype": "float32",
        "device": "cpu",
        "task": "e2e",
        "study": {"model": "m"},
    }


@pytest.fixture
def summary():
    prefix = [line("prefix", i, loss, bleu) for i, (loss, bleu) in enumerate([(2.0, 10.0), (2.1, 11.0), (2.3, 13.0)])]
    full = [line("full", i, loss, 12.0 + i, size=50_000) for i, loss in enumerate([1.9, 1.8, 1.7])]
    return summarize([*prefix, *full, line("lora", 0, 1.0, 90.0), line("other", 0, 0.1, 99.0, shared="t")], "s")


def test_mean_and_spread_over_seeds(summary):
    assert [m.label for m in summary.methods] == ["prefix", "full", "lora"]
    found = summary.methods[0].quality[LOSS]
    assert found.to_json() == {
        "mean": pytest.approx(6.4 / 3),
        "sd": pytest.approx(statistics.stdev([2.0, 2.1, 2.3])),
        "min": 2.0,
        "max": 2.3,
        "values": [2.0, 2.1, 2.3],
    }
    assert summary.methods[2].quality[LOSS].to_json() == {"mean": 1.0, "values": [1.0]}  # one seed has no spread
    assert "s/step" not in summary.methods[0].costs  # which no run has measured


def test_differences_are_clear_if_every_seed_shows_them_and_there_are_three(summary):
    assert summary.clear_differences(LOSS) == [("full", "prefix")]  # lower is better; lora has one seed
    assert summary.clear_differences("BLEU") == []  # 13 of prefix is more than 12 of full
    text = markdown(summary, 16e9)
    assert f"* {LOSS}: full better than prefix." in text
    assert "* BLEU: none." in text


@pytest.mark.parametrize("is_stored", [True, False], ids=["with sides", "of an earlier version"])
def test_clear_differences_go_to_the_better_side(is_stored):
    """Each score of the one method is lower than the other's."""
    names = ["BLEU", "TER", "wrong slots", "wrong slots seen", "omissions unseen", "chrF++ seen", "empty", "length"]
    lines = []
    for label, value in (("low", 1.0), ("high", 2.0)):
        for seed in range(3):
            own = line(label, seed, value, value)
            score = {"value": value + seed / 10, "text": "", "tool": "t"}
            own["quality"]["scores"] = {n: score | ({"better": better_side(n)} if is_stored else {}) for n in names}
            lines.append(own)
    summary = summarize(lines, "s")
    found = {name: summary.clear_differences(name) for name in (LOSS, *names)}
    better = {name: pairs[0][0] for name, pairs in found.items() if pairs}
    lower = dict.fromkeys((LOSS, "TER", "wrong slots", "wrong slots seen", "omissions unseen", "empty"), "low")
    assert better == lower | {"BLEU": "high", "chrF++ seen": "high"}  # a length has no better side


def test_users_that_fit_beside_the_base(summary):
    assert [m.users(100_500) for m in summary.methods] == [100, 2, 100]
    assert summary.methods[1].users(400) == 0  # less than the base


def test_tables(summary):
    quality = quality_rows(summary, [LOSS, "BLEU"])
    assert quality[1] == {"method": "full", "seeds": "3", LOSS: "1.800 ± 0.1", "BLEU": "13.00 ± 1"}
    assert quality[2] == {"method": "lora", "seeds": "1", LOSS: "1.000", "BLEU": "90.00"}
    costs = cost_rows(summary, 100_500)[0]
    assert (costs["trained"], costs["disk size"], costs["s/step"]) == ("1 k", "1 kB", "-")
    assert costs["users in 100 kB"] == "100"
    text = markdown(summary, 16e9)
    assert "| prefix | 3 | 2.133 ± 0.15 (2.000 to 2.300) | 11.33 ± 1.5 (10.00 to 13.00) |" in text
    assert "METEOR: no Java" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00012345, "0.0001234"), (0.5, "0.5000"), (12.0, "12.00"), (999.96, "1000"), (12345.6, "12,346")],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (2.5e9, "2.5 GB")])
def test_sizes(value, text):
    assert in_units(value) == text


def test_one_value_has_no_deviation():
    assert Spread((1.0,)).deviation is None


def test_the_plot_is_an_image(summary, tmp_path):
    plot(summary, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_what_the_page_of_choosing_a_method_concludes():
    """Its sentences about LoRA and about the order of the methods, from the committed results."""
    path = ROOT / "benches" / "results" / "compare-smollm2.jsonl"
    lines = [json.loads(found) for found in path.read_text().splitlines()]
    found = summarize(lines, lines[0]["shared"])
    clear = {name: set(found.clear_differences(name)) for name in found.qualities}
    prefixes = ("prefix", "prefix-mlp")
    assert {("full", "lora"), ("lora", "prefix-mlp"), ("prefix-mlp", "prefix")} <= clear[LOSS]
    for name in (LOSS, "METEOR", "omissions"):
        assert {("lora", prefix) for prefix in prefixes} <= clear[name]
    for name in ("BLEU", "NIST", "ROUGE_L", "CIDEr"):
        assert not any({better, other} <= {"full", "lora", "prefix-mlp"} for better, other in clear[name])
    size = {m.label: m.costs["memory bytes"].mean for m in found.methods}
    assert size["lora"] == 4 * size["prefix"]
