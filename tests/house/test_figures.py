"""Every figure of the README's tables is the one in its results file."""

import json
from statistics import mean

import pytest

from oracles import ROOT

README = (ROOT / "README.md").read_text(encoding="utf8")
RESULTS = ROOT / "benches" / "results"


def result(name: str) -> dict:
    return json.loads((RESULTS / f"quality-{name}.json").read_text(encoding="utf8"))


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf8").splitlines()[2:]]


def quality_rows() -> list[str]:
    out = []
    for setting, label in (("text", "flat from text, rate 5e-2"), ("mlp", "MLP from random, rate 5e-4")):
        for impl, shown in (("peft", "PEFT"), ("prefixfast", "prefixfast")):
            r = result(f"smollm2-{setting}-{impl}")
            seconds = f"{r['train_seconds']:.0f}" if r["threads"] == 1 else "not measured"
            out.append(f"| {label}: {shown} | {r['dev_loss']:.4f} | {r['bleu']:.2f} | {seconds} |")
    r = result("nlg-10m-none")
    out.append(f"| no prefix | | {r['dev_loss']:.3f} | {r['bleu']:.1f} | |")
    for impl, shown in (("peft", "PEFT"), ("prefixfast", "prefixfast")):
        r = result(f"nlg-10m-{impl}")
        curve = ", ".join(f"{mean(r['losses'][i : i + 50]):.3f}" for i in (0, 100, 200, 350))
        out.append(f"| {shown} | {curve} | {r['dev_loss']:.3f} | {r['bleu']:.1f} | {r['train_seconds']:.0f} |")
    return out


def generation_rows() -> list[str]:
    found: dict[str, dict[int, str]] = {}
    for r in lines("generate-gpt2-fp32.jsonl"):
        names = [r["contender"]]
        if r["contender"] == "prefixfast":
            names = [f"prefixfast, {d} distinct" for d in ([r["distinct"]] if r["prefix_length"] else [1, 4, 32])]
        for n in names:
            found.setdefault(n, {})[r["prefix_length"]] = f"{r['tokens_per_second']:.1f}"
    lengths = sorted({length for cells in found.values() for length in cells})
    return [f"| {n} | {' | '.join(cells.get(length, '') for length in lengths)} |" for n, cells in found.items()]


def kernel_rows() -> list[str]:
    best = {(r["shape"]["name"], r["contender"][:6], r["work"]): f"{min(r['seconds']) * 1e3:.1f}" for r in lines("kernels-cpu-fp32.jsonl")}
    shapes = dict.fromkeys(shape for shape, *_ in best)
    keys = [(c, w) for w in ("forward", "forward and backward") for c in ("prefix", "copied")]
    return [f"| {s.replace(' x 64', ' x 64 tokens', 1)} | {' | '.join(best[s, c, w] for c, w in keys)} |" for s in shapes]


@pytest.mark.parametrize("row", [*quality_rows(), *generation_rows(), *kernel_rows()])
def test_the_readme_shows_what_was_measured(row):
    assert f"\n{row}\n" in README


def test_times_beside_peft_are_those_of_the_files():
    for impl, shown in (("prefixfast", "prefixfast"), ("peft", "PEFT")):
        a, b, c = (result(f"smollm2-time-{impl}-{i}")["train_seconds"] for i in (1, 2, 3))
        assert f"{shown} {a:.1f}, {b:.1f} and {c:.1f} s" in README


def test_what_is_said_of_rounding_is_in_the_files():
    exact, ours = result("smollm2-mlp-fp64-peft")["losses"], result("smollm2-mlp-fp64-prefixfast")["losses"]
    assert max(abs(a - b) for a, b in zip(exact, ours, strict=True)) == pytest.approx(1.4e-8, rel=0.05)
    peft, own = result("smollm2-mlp-peft")["losses"], result("smollm2-mlp-prefixfast")["losses"]
    found = [f"{abs(losses[i] - exact[i]):.{digits}}" for losses, digits in ((peft, 2), (own, 1)) for i in (7, 12)]
    assert all(f in README for f in ("1.4e-8", "1.3e-3", "0.18", "3e-5", "0.04"))
    assert found == ["0.0013", "0.18", "3e-05", "0.04"]
