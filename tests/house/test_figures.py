"""Every figure of the README's tables is the one in its results file."""

import json
from statistics import mean, median

import pytest

from oracles import ROOT

README, PERFORMANCE, ARCHITECTURE = (
    (ROOT / name).read_text(encoding="utf8") for name in ("README.md", "docs/performance.md", "docs/architecture.md")
)
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


def generation_rows(name: str) -> list[str]:
    found: dict[str, dict[int, str]] = {}
    distinct = sorted({r["distinct"] for r in lines(name) if r["contender"] == "prefixfast" and r["prefix_length"]})
    for r in lines(name):
        names = [r["contender"]]
        if r["contender"] == "prefixfast":
            names = [f"prefixfast, {d} distinct" for d in ([r["distinct"]] if r["prefix_length"] else distinct)]
        for n in names:
            found.setdefault(n, {})[r["prefix_length"]] = f"{r['tokens_per_second']:.1f}"
    lengths = sorted({length for cells in found.values() for length in cells})
    return [f"| {n} | {' | '.join(cells.get(length, '') for length in lengths)} |" for n, cells in found.items()]


def kernel_rows() -> list[str]:
    best = {
        (r["shape"]["name"], r["contender"][:6], r["work"]): f"{min(r['seconds']) * 1e3:.1f}"
        for r in lines("kernels-cpu-fp32.jsonl")
    }
    shapes = dict.fromkeys(shape for shape, *_ in best)
    keys = [(c, w) for w in ("forward", "forward and backward") for c in ("prefix", "copied")]
    return [
        f"| {s.replace(' x 64', ' x 64 tokens', 1)} | {' | '.join(best[s, c, w] for c, w in keys)} |" for s in shapes
    ]


def step_rows() -> list[str]:
    out = []
    for dtype in ("fp32", "bf16"):
        for r in lines(f"decode-step-gpt2-{dtype}.jsonl"):
            prefix = f"P={r['prefix_length']}" + (f", {r['distinct']} distinct" if r["prefix_length"] else "")
            parts = " | ".join(f"{ms:.1f}" for ms in r["parts_ms"].values())
            times = " | ".join(f"{r[name]:.1f}" for name in ("best_ms", "median_ms", "floor_ms", "limit_ms"))
            out.append(f"| {dtype}, {prefix}{'' if r['packed'] else ', weights as they are'} | {times} | {parts} |")
    return out


def backward_rows() -> list[str]:
    found: dict[str, list[str]] = {}
    for r in lines("attn-backward-cpu-bf16.jsonl"):
        found.setdefault(r["piece"], []).append(f"{min(r['seconds']) * 1e3:.1f} ({r['error']:.1e})")
    return [f"  | {piece} | {' | '.join(cells)} |" for piece, cells in found.items()]


def attention_rows() -> list[str]:
    out = []
    for dtype, name in (("float32", "fp32"), ("bfloat16", "bf16")):
        found: dict[str, dict[bool, list[str]]] = {}
        for r in lines(f"attn-decode-cpu-{dtype}.jsonl"):
            case = f"P={r['prefix_length']}" + (f", {r['distinct']} distinct" if r["prefix_length"] else "")
            found.setdefault(case, {False: [], True: []})[r["with_products"]].append(f"{min(r['seconds']) * 1e3:.1f}")
        out += [f"  | {name}, {case} | {' | '.join(cells[False] + cells[True])} |" for case, cells in found.items()]
    return out


SHOWN = [
    *(
        (row, README)
        for row in (
            *quality_rows(),
            *generation_rows("generate-gpt2-fp32.jsonl"),
            *generation_rows("generate-gpt2-bf16.jsonl"),
            *kernel_rows(),
        )
    ),
    *((row, PERFORMANCE) for row in (*step_rows(), *generation_rows("generate-llama-fp32.jsonl"))),
    *((row, ARCHITECTURE) for row in (*backward_rows(), *attention_rows())),
]


@pytest.mark.parametrize(("row", "text"), SHOWN, ids=[row.strip("| ").split(" |")[0] for row, _ in SHOWN])
def test_tables_show_what_was_measured(row, text):
    assert f"\n{row}\n" in text


def test_what_is_said_of_tiering_is_in_the_file():
    *_, every, few, ratio = (
        json.loads(line) for line in (RESULTS / "tiering.jsonl").read_text(encoding="utf8").splitlines()
    )
    assert (every["contender"], few["contender"]) == ("all resident", "tiered")
    assert (
        f"{few['p99_ms']:.1f} ms against {every['p99_ms']:.1f} ms with all resident ({ratio['p99_ratio']:.2f} times)"
        in PERFORMANCE
    )


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


def test_what_is_said_of_steps_and_tenants_is_in_the_files():
    found = json.loads((RESULTS / "parts.json").read_text(encoding="utf8"))["microseconds"]
    names = (
        "test_a_decode_step_of_32_rows[20]",
        "test_a_step_with_a_tenth_replaced[20]",
        "test_a_step_with_a_tenth_replaced[2000]",
    )
    growths = {
        tenants: [r["growth"] for r in lines("fairness.jsonl") if r["tenants"] is tenants] for tenants in (True, False)
    }
    fair, unfair = (
        f"{median(g):.{digits}f} times ({min(g):.{digits}f} to {max(g):.{digits}f})"
        for g, digits in ((growths[True], 1), (growths[False], 0))
    )
    said = [f"{found[name]['median'] / 1e3:.2f} ms" for name in names] + [f"grows {fair}; {unfair} where"]
    assert all(text in " ".join(PERFORMANCE.split()) for text in said), said


def test_what_is_said_of_bandwidth_is_in_the_files():
    settings = [
        json.loads((RESULTS / f"decode-step-gpt2-{d}.jsonl").read_text(encoding="utf8").splitlines()[1])
        for d in ("fp32", "bf16")
    ]
    copies, reads = ([f"{median(setting[name]):.0f}" for setting in settings] for name in ("copy_gb_s", "read_gb_s"))
    text = " ".join(PERFORMANCE.split())
    assert (
        f"({copies[0]} GB/s copied in fp32's, {copies[1]} in bf16's; {reads[0]} and {reads[1]} GB/s read; medians"
        in text
    )


def test_what_is_said_of_limits_is_in_the_files():
    steps = {d: [r for r in lines(f"decode-step-gpt2-{d}.jsonl") if r["packed"]] for d in ("fp32", "bf16")}
    above = {
        name: [100 * (r["median_ms"] / r[name] - 1) for d in steps for r in steps[d] if r["distinct"] == 32]
        for name in ("limit_ms", "floor_ms")
    }
    over, least = (f"{min(x):.0f} to {max(x):.0f} %" for x in above.values())
    none, shared = (
        {d: next(r for r in steps[d] if (r["prefix_length"], r["distinct"]) == k) for d in steps}
        for k in ((0, 0), (512, 1))
    )
    best, middle = ([f"{none[d][name] / shared[d][name]:.2f}" for d in steps] for name in ("best_ms", "median_ms"))
    text = " ".join(PERFORMANCE.split())
    assert f"The median steps are {over} above the limit and {least} above the least" in text
    assert (
        f"The best steps run at {best[0]} of it in fp32 and {best[1]} in bf16, the medians at {middle[0]} and {middle[1]}"
        in text
    )
    assert f"is missed by {over} on the CPU" in ARCHITECTURE


def test_what_is_said_of_planning_is_in_the_file():
    found = json.loads((RESULTS / "plan.json").read_text(encoding="utf8"))["microseconds"]
    padded, work, plain, replaced = (f"{middle:.0f} us" for middle, _, _ in found.values())
    assert (
        f"{plain}, {work} with the GPU's work tables, {padded} padded for graphs; with 102 requests replaced in each\n  step {replaced}"
        in PERFORMANCE
    )


def test_what_is_said_of_twenty_users_is_in_the_file():
    (r,) = lines("e2e-users-smollm2.jsonl")
    assert (r["users"], r["requests"], r["different"], r["compared"]) == (20, 200, [], {"requests": 20, "tokens": 640})
    together, alone = r["tokens_per_second_together"], r["tokens_per_second_one_by_one"]
    assert f"{together} tokens a second against {alone} one request at a time, and the same tokens" in README


def test_what_is_said_of_stores_is_in_the_file():
    ms = {
        r["what"]: r["ms"]
        for r in map(json.loads, (RESULTS / "store.jsonl").read_text(encoding="utf8").splitlines()[1:])
    }
    said = (
        f"opening it takes {ms['open']:.1f} ms, looking one up {ms['info']:.2f} ms, counting them {ms['len']:.0f} ms, listing all names "
        f"{ms['list'] / 1e3:.2f} s the first time and {ms['list again'] / 1e3:.2f} s afterwards, everything but the tensors of all {ms['scan'] / 1e3:.2f} s, "
        f"putting one {ms['put']:.1f} ms"
    )
    assert said in " ".join(PERFORMANCE.split())


def test_what_is_said_of_reads_is_in_the_file():
    tiered = json.loads((RESULTS / "tiering.jsonl").read_text(encoding="utf8").splitlines()[-2])
    reads, evictions = tiered["stats"]["reads"], tiered["stats"]["evictions"]
    assert f"{reads:,} files read and {evictions:,} evictions in {tiered['steps']:,} steps" in PERFORMANCE
