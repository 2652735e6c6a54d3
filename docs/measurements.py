"""The tables of measurements that `tables.py` writes into the documentation: results file, rows and columns of each.

A function of this module turns the records of results files into cells (row, column, text). Rows and columns appear in
the order of their first cell.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

LOSSES_APART = 1e-4  # largest relative difference of a loss between runs whose times are compared
Record = dict[str, Any]
Cell = tuple[str, str, str]  # row, column, text


@dataclass(frozen=True)
class Table:
    """One table of measurements.

    Attributes:
        files: Patterns of results files, in the order of the rows.
        cells: Function from the records of these files to the cells of the table.
        corner: Heading of the first column.
        command: Command that writes the results, for files that do not record it.
        source: Whether the results file, the machine and the command stand below the table.
    """

    files: tuple[str, ...]
    cells: Callable[[list[Record]], Iterable[Cell]]
    corner: str = ""
    command: str = ""
    source: bool = True


# ---- results files ----


def records(root: Path, patterns: Sequence[str]) -> list[Record]:
    """Records of results files; each also has the file's settings, its environment and its name."""
    return [
        record
        for pattern in patterns
        for path in sorted((root / "benches/results").glob(pattern))
        for record in read(path)
    ]


def read(path: Path) -> Iterator[Record]:
    """Records of one file: a JSON file is one record, every line of a JSON-lines file after its settings is one."""
    lines = (
        [json.loads(path.read_text(encoding="utf8"))]
        if path.suffix == ".json"
        else map(json.loads, path.read_text(encoding="utf8").splitlines())
    )
    shared: Record = {"file": path.name}
    for line in lines:
        is_settings = "suite" in line or (
            "environment" in line and "identity" not in line
        )  # a comparison's lines have both
        if path.suffix == ".jsonl" and is_settings:
            shared |= line
        else:
            yield shared | line


def first(found: list[Record], **fields: Any) -> Record:
    """The first record with these values."""
    return next(r for r in found if all(r.get(k) == v for k, v in fields.items()))


def short(dtype: str) -> str:
    """A dtype as the tables name it."""
    return {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}[dtype]


def milliseconds(seconds: Sequence[float]) -> str:
    """The best of several rounds."""
    return f"{min(seconds) * 1e3:.1f}"


def prefix_of(r: Record) -> str:
    """Prefix length and number of distinct prefixes of a record."""
    many = "prefix" if r["distinct"] == 1 else "prefixes"
    return f"P = {r['prefix_length']}" + (f", {r['distinct']} distinct {many}" if r["prefix_length"] else "")


# ---- tables of measurements: records -> cells ----


def pivot(
    row: Callable[[Record], str], *columns: tuple[str, Callable[[Record], str]]
) -> Callable[[list[Record]], Iterator[Cell]]:
    """One row for each record, one column for each pair of heading and function."""
    return lambda found: ((row(r), heading, text(r)) for r in found for heading, text in columns)


def generation(found: list[Record]) -> Iterator[Cell]:
    """Throughput by contender and prefix length."""
    if slow := [r["contender"] for r in found if not r.get("settings", {"use_cache": True})["use_cache"]]:
        sys.exit(f"{found[0]['file']}: {', '.join(slow)} ran without a KV cache; no rate is shown")
    distinct = sorted({r["distinct"] for r in found if r["contender"] == "prefixfast" and r["prefix_length"]})
    for length in sorted({r["prefix_length"] for r in found}):  # all columns first, so that they are in order
        yield ("", f"P = {length}", "")
    for r in found:
        names = [r["contender"]]
        if names == ["prefixfast"]:  # without a prefix one measurement stands for every number of distinct ones
            counts = [r["distinct"]] if r["prefix_length"] else distinct
            names = [f"prefixfast, {d} distinct {'prefix' if d == 1 else 'prefixes'}" for d in counts]
        yield from ((name, f"P = {r['prefix_length']}", f"{r['tokens_per_second']:.1f}") for name in names)


def quality(found: list[Record]) -> Iterator[Cell]:
    """Held-out loss, BLEU and training time on E2E."""
    settings = {
        "smollm2-text": "no MLP, init text, learning rate 5e-2",
        "smollm2-mlp": "MLP, init random, learning rate 5e-4",
    }
    for r in found:
        row = f"{settings[r['setting']]}: {implementation(r)}"
        yield row, "loss of 200 dev rows", f"{r['dev_loss']:.4f}"
        yield row, "BLEU of 100 dev tables", f"{r['bleu']:.2f}"
        yield row, "training, seconds (threads)", f"{r['train_seconds']:.0f} ({r['threads']})"


def implementation(r: Record) -> str:
    """Name of an implementation as the tables show it."""
    return {"peft": "PEFT", "none": "no prefix"}.get(r["impl"], r["impl"])


def quality_10m(found: list[Record]) -> Iterator[Cell]:
    """Losses, BLEU and training time of the base of 10 million parameters."""
    for r in found:
        losses = r.get("losses", [])
        for start in (0, 100, 200, 350) if losses else ():
            yield (
                implementation(r),
                f"mean loss of steps {start + 1} to {start + 50}",
                f"{mean(losses[start : start + 50]):.3f}",
            )
        yield implementation(r), "dev loss", f"{r['dev_loss']:.3f}"
        yield implementation(r), "BLEU of 547 dev tables", f"{r['bleu']:.1f}"
        yield implementation(r), "training seconds, 1 thread", f"{r['train_seconds']:.0f}" if losses else ""


def agreement(found: list[Record]) -> Iterator[Cell]:
    """Differences between PEFT and prefixfast, and of both from fp64."""
    by_file = {r["file"].removeprefix("quality-smollm2-").removesuffix(".json"): r for r in found}
    loss = {name: r["losses"] for name, r in by_file.items()}
    texts = [by_file[f"text-{i}"]["texts"] for i in ("peft", "prefixfast")]
    exact = loss["mlp-fp64-peft"]

    def apart(a: list[float], b: list[float]) -> str:
        return f"{max(abs(x - y) for x, y in zip(a, b, strict=True)):.1e}"

    flat = apart(loss["text-peft"], loss["text-prefixfast"])
    yield f"no MLP, fp32: loss of PEFT and prefixfast, largest of {len(loss['text-peft'])} steps", "difference", flat
    yield (
        f"no MLP, fp32: number of texts that differ, of {len(texts[0])}",
        "difference",
        str(sum(texts[1][k] != v for k, v in texts[0].items())),
    )
    yield (
        f"MLP, fp64: loss of PEFT and prefixfast, largest of {len(exact)} steps",
        "difference",
        apart(exact, loss["mlp-fp64-prefixfast"]),
    )
    for step in (8, 13):
        for impl in ("peft", "prefixfast"):
            row = f"MLP, step {step}: loss of {implementation({'impl': impl})} in fp32 and PEFT in fp64"
            yield row, "difference", f"{abs(loss[f'mlp-{impl}'][step - 1] - exact[step - 1]):.1e}"


def sample_texts(found: list[Record]) -> Iterator[Cell]:
    """The first texts of a results file."""
    return ((mr, "text", text) for mr, text in list(found[0]["texts"].items())[:3])


def check_same_losses(found: list[Record]) -> None:
    """Exit if the runs whose times are compared have other losses; then the times say nothing."""
    for r in found:
        apart = max(abs(a - b) / abs(b) for a, b in zip(r["losses"], found[0]["losses"], strict=True))
        if not apart <= LOSSES_APART:
            sys.exit(
                f"{r['file']}: its losses differ by {apart:.1e} from those of {found[0]['file']}; no time is shown"
            )


def training_time(found: list[Record]) -> Iterator[Cell]:
    """Seconds of a few training steps, run by run."""
    check_same_losses(found)
    for r in found:
        run = re.search(r"(\d)\.json$", r["file"])
        assert run is not None
        yield implementation(r), f"run {run[1]}", f"{r['train_seconds']:.1f}"


def kernels(found: list[Record]) -> Iterator[Cell]:
    """Times of packed attention alone."""
    for work in ("forward", "forward and backward"):
        for r in found:
            who = "prefixfast" if r["contender"] == "prefixfast" else "copied prefix"
            if r["work"] == work and (who == "prefixfast" or r["contender"].startswith("copied")):
                name = r["shape"]["name"].replace(" x 64", " sequences of 64 tokens").replace("P=", "P = ")
                name = name.replace("distinct", "distinct prefixes")
                yield name, f"{work}: {who}", milliseconds(r["seconds"])


def decode_steps(found: list[Record]) -> Iterator[Cell]:
    """Times of a decode step and of its parts."""
    times = {"best": "best_ms", "median": "median_ms", "least": "floor_ms", "limit": "limit_ms"}
    for r in found:
        dtype = short(r["command"].split("--dtype ")[1].split()[0])
        row = f"{dtype}, {prefix_of(r)}{'' if r['packed'] else ', weights not prepacked'}"
        yield from ((row, heading, f"{r[key]:.1f}") for heading, key in times.items())
        yield from ((row, STEP_PARTS.get(part, part), f"{ms:.1f}") for part, ms in r["parts_ms"].items())


def decode_ratios(found: list[Record]) -> Iterator[Cell]:
    """Decode steps relative to the least, to the limit and to a step without prefixes; prepacked weights."""
    packed = [r for r in found if r["packed"]]
    for dtype in ("float32", "bfloat16"):
        own = [r for r in packed if f"--dtype {dtype}" in r["command"]]
        none, shared = first(own, prefix_length=0), first(own, prefix_length=512, distinct=1)
        plain = next(r for r in found if f"--dtype {dtype}" in r["command"] and not r["packed"])
        ratio = none["parts_ms"]["products"] / plain["parts_ms"]["products"]
        yield "P = 0: time of the matrix products, prepacked over not prepacked", short(dtype), f"{ratio:.2f}"
        for length in (200, 512):
            r = first(own, prefix_length=length, distinct=32)
            yield (
                f"P = {length}, 32 distinct prefixes: median step over the limit",
                short(dtype),
                f"{r['median_ms'] / r['limit_ms']:.2f}",
            )
            yield (
                f"P = {length}, 32 distinct prefixes: median step over the least",
                short(dtype),
                f"{r['median_ms'] / r['floor_ms']:.2f}",
            )
        for name in ("best", "median"):
            ratio = none[f"{name}_ms"] / shared[f"{name}_ms"]
            yield f"P = 512, 1 distinct prefix: rate relative to P = 0, {name} step", short(dtype), f"{ratio:.2f}"
    share = GPT2_WEIGHTS / (GPT2_WEIGHTS + 512 * GPT2_PREFIX_NUMBERS)
    yield "P = 512, 1 distinct prefix: arithmetic at P = 0 relative to P = 512 (computed)", "fp32", f"{share:.2f}"


def bandwidth(found: list[Record]) -> Iterator[Cell]:
    """Memory bandwidth in the runs of the decode steps."""
    for dtype in ("float32", "bfloat16"):
        r = next(r for r in found if f"--dtype {dtype}" in r["command"])
        for heading, key in (("copied", "copy_gb_s"), ("read", "read_gb_s")):
            yield f"{short(dtype)} run", f"{heading}, median", f"{median(r[key]):.0f}"
            yield f"{short(dtype)} run", f"{heading}, range", f"{min(r[key]):.0f} to {max(r[key]):.0f}"


def attention_backward(found: list[Record]) -> Iterator[Cell]:
    """Time and error of one piece of attention, backward."""
    return ((r["piece"], r["contender"], f"{milliseconds(r['seconds'])} ({r['error']:.1e})") for r in found)


def attention_backward_ratios(found: list[Record]) -> Iterator[Cell]:
    """Time and error of the alternatives relative to what prefixfast runs, backward."""
    for r in found:
        base = first(found, piece=r["piece"], contender="flash in fp32")
        if r is not base:
            time, error = min(r["seconds"]) / min(base["seconds"]), r["error"] / base["error"]
            yield r["piece"], r["contender"], f"{time:.2f} ({error:.1f})"


def attention_training(found: list[Record]) -> Iterator[Cell]:
    """Time of forward and backward, and error, of the attention of a training step."""
    for r in found:
        times = " + ".join(f"{min(r['cpu_seconds'][part]) * 1e3:.1f}" for part in ("forward", "backward"))
        yield r["step"], f"{r['contender']}, {short(r['dtype'])}", f"{times} ({r['error']:.1e})"


def attention_decode(found: list[Record]) -> Iterator[Cell]:
    """Time of decode attention alone and between matrix products."""
    for products in (False, True):
        for r in found:
            if r["with_products"] is products:
                row = f"{short(r['dtype'])}, {prefix_of(r)}"
                yield (
                    row,
                    "matrix products alone"
                    if r["contender"] == "products alone"
                    else r["contender"] + (", between matrix products" if products else ""),
                    milliseconds(r["seconds"]),
                )


def parts(found: list[Record]) -> Iterator[Cell]:
    """Times of parts of a step."""
    for name, r in found[0]["microseconds"].items():
        yield from (
            (PARTS[name], heading, f"{r[heading]:.0f}" if r[heading] >= 10 else f"{r[heading]:.1f}")
            for heading in ("min", "median")
        )


def planning(found: list[Record]) -> Iterator[Cell]:
    """Times of the planner."""
    for name, values in found[0]["microseconds"].items():
        headings = ("median", "95 % interval from", "95 % interval to")
        yield from ((PLANNING[name], heading, f"{v:.0f}") for heading, v in zip(headings, values, strict=True))


VERSION_CASES = {
    "decode": "decode step of 32 rows, {0}, {1}, P = {2}, {3} a request",
    "generate": "`generate`, 32 tokens for 32 rows, {0}, {1}, P = {2}, {3} a request",
    "train": "training step of {3} prefixes, {0}, {1}, P = {2}",
    "load_prefix": "load of a prefix into the KV cache, {0}, {1}, P = {2}",
    "load_base": "`load`, {0}, {1}",
    "imports": "`import {0}`",
}


def two_versions(found: list[Record]) -> Iterator[Cell]:
    """Ratio of CPU time after a change to that before, by case."""
    sequences = {"1": "1 sequence", "4": "4 beams"}
    for r in found:
        words = [{"float32": "fp32", "bfloat16": "bf16", "gpt2": "GPT-2 124M"}.get(x, x) for x in r["arguments"]]
        if r["kind"] in ("decode", "generate"):
            words[3] = sequences[words[3]]
        row, ratio = VERSION_CASES[r["kind"]].format(*words), r["cpu_ratio"]
        yield row, "median", f"{ratio['median']:.2f}"
        yield row, "quartiles", f"{ratio['q1']:.2f} to {ratio['q3']:.2f}"
        yield row, "range", f"{ratio['min']:.2f} to {ratio['max']:.2f}"


def tiering(found: list[Record]) -> Iterator[Cell]:
    """Time between two tokens with all prefixes resident and with few."""
    *both, ratio = found
    for r in both:
        count = r["resident"] if r["contender"] == "tiered" else "all"
        name = f"{count} prefixes fit in the KV cache"
        yield name, "median, ms", f"{r['p50_ms']:.1f}"
        yield name, "99th percentile, ms", f"{r['p99_ms']:.1f}"
        for key, heading in (("loads", "loads"), ("reads", "loads from files"), ("evictions", "evictions")):
            yield name, heading, f"{r['stats'][key]:,}"
        yield name, "decode steps", f"{r['steps']:,}"
    yield "ratio", "99th percentile, ms", f"{ratio['p99_ratio']:.2f}"


def fairness(found: list[Record]) -> Iterator[Cell]:
    """Growth of the other senders' time per token."""
    for tenants, name in ((True, "each sender is a tenant"), (False, "all are one tenant")):
        growth = [r["growth"] for r in found if r["tenants"] is tenants]
        for heading, value in (("median", median(growth)), ("least", min(growth)), ("greatest", max(growth))):
            yield name, heading, f"{value:.1f}"


def seq2seq(kind: str) -> Callable[[list[Record]], Iterator[Cell]]:
    """Throughput of an encoder-decoder base by contender and dtype, and its ratio to PEFT's."""

    def cells(found: list[Record]) -> Iterator[Cell]:
        own = [r for r in found if r["kind"] == kind]
        peft = {r["dtype"]: r["tokens_per_cpu_second"] for r in own if r["contender"].startswith("PEFT")}
        for r in own:
            rate, dtype = r["tokens_per_cpu_second"], short(r["dtype"])
            yield r["contender"], dtype, f"{rate:.1f}"
            yield r["contender"], f"{dtype}, against PEFT", f"{rate / peft[r['dtype']]:.2f}"

    return cells


def scitldr(found: list[Record]) -> Iterator[Cell]:
    """Scores of summaries, as means over the seeds with their range."""
    by_name: dict[str, list[Record]] = {}
    for r in found:
        by_name.setdefault(r["name"], []).append(r)
    for name, own in by_name.items():
        for score in own[0]["rouge"]:
            values = [r["rouge"][score] for r in own]
            spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
            yield name, score, f"{mean(values):.1f}{spread}"
        yield name, "words", f"{mean(r['mean_words'] for r in own):.0f}"
        trained = own[0].get("num_trained")
        yield name, "trained parameters", f"{trained:,}" if trained else ""


def users(found: list[Record]) -> Iterator[Cell]:
    """Throughput of many users' prefixes, and requests whose tokens depend on the batch."""
    (r,) = found
    together, alone, compared = r["tokens_per_second_together"], r["tokens_per_second_one_by_one"], r["compared"]
    yield f"{r['requests']} requests with {r['users']} prefixes in one batch", "result", f"{together:.1f} tokens/s"
    yield "one request at a time", "result", f"{alone:.1f} tokens/s"
    of = f"{compared['requests']} compared requests ({compared['tokens']} tokens)"
    row = f"number of the {of} whose tokens differ from those generated alone or by transformers"
    yield row, "result", str(len(r["different"]))


def forty_users(found: list[Record]) -> Iterator[Cell]:
    """Cost of one run of forty users' files, the turn with less CPU time, and of all single commands, scaled to 40."""
    labels = {
        "one command": "`prefixfast train MODEL users/ --store S`",
        "single commands": "`prefixfast train MODEL users/NAME.csv --store S` for each of the 40 files ({runs} ran)",
        "one call": "Python, `train(base, Folder('users'), store=S)`",
        "40 calls": "Python, `train(base, {{name: file}}, store=S)` for each of the 40 files",
    }
    for what, label in labels.items():
        turns = [r for r in found if r.get("what") == what]
        if not turns:
            continue
        r, times = min(turns, key=lambda r: r["cpu_seconds"]), 1.0
        if what == "single commands":  # the turns have different files
            r = {key: sum(t[key] for t in turns) for key in ("runs", "cpu_seconds", "seconds", "files", "bytes")}
            r["peak_mib"], times = max(t["peak_mib"] for t in turns), 40 / r["runs"]
        row = label.format(runs=r["runs"])
        yield row, "CPU seconds", f"{r['cpu_seconds'] * times:.0f}"
        yield row, "wall seconds", f"{r['seconds'] * times:.0f}"
        yield row, "peak memory", f"{r['peak_mib']:.0f} MiB"
        yield row, "files", f"{r['files'] * times:.0f}"
        yield row, "KiB on disk", f"{r['bytes'] * times / 1024:.0f}"


def many_users(found: list[Record]) -> Iterator[Cell]:
    """Cost of thousands of users in one command, and of single users one after another, scaled to the largest count."""
    labels = {
        "one command": "`prefixfast train MODEL users/ --store S`, {users:,} users",
        "single commands": "`prefixfast train MODEL users/NAME.jsonl --store S` for each user ({users} ran)",
        "single calls": "Python, `train(base, {{name: file}}, store=S)` for each user ({users} ran)",
    }
    most = max(r["users"] for r in found if r.get("what") == "one command")
    for r in (r for r in found if "what" in r):
        row, times = labels[r["what"]].format(users=r["users"]), most / r["users"]
        yield row, "CPU ms of a user", f"{r['cpu_seconds'] / r['users'] * 1000:,.0f}"
        yield row, f"CPU minutes of {most:,} users", f"{r['cpu_seconds'] * times / 60:.0f}"
        if r["what"] == "one command":
            yield row, "peak memory", f"{r['peak_mib']:,.0f} MiB"
            yield row, "on disk", f"{r['bytes'] / 2**20:.0f} MiB"


def training(found: list[Record]) -> Iterator[Cell]:
    """Rate, memory and state of training with prefixfast, PEFT's prefix-tuning and LoRA, by prefixes at once."""
    records = [r for r in found if "contender" in r]
    peft = next(r["tokens_per_second"] for r in records if r["contender"] == "PEFT, one prefix after another")
    for r in records:
        own = f"{r['contender']}, {r['prefixes']} at once" if r["contender"] == "prefixfast" else r["contender"]
        yield own, "tokens/s", f"{r['tokens_per_second']:,.0f}"
        yield own, "against PEFT", f"{r['tokens_per_second'] / peft:.2f}"
        yield own, "users of 80 steps an hour", f"{r['users_per_hour']:.0f}"
        yield own, "peak memory over the base", f"{r['peak_bytes'] / 1e6:.0f} MB"
        yield own, "state of a user", f"{r['state_bytes'] / 1e6:.2f} MB"


def training_steps(found: list[Record]) -> Iterator[Cell]:
    """Shares of a training step's CPU time, and what its matrix products alone would take."""
    for r in (r for r in found if "part" in r):
        column = f"{r['base']}, {r['prefixes']} prefixes"
        yield "CPU seconds", column, f"{min(r['cpu_seconds']):.2f}"
        yield "matrix products alone, at their best rate", column, f"{r['products_alone']:.2f}"
        yield r["part"], column, f"{r['share']:.1%}"


KINDS = {"flat": "keys and values", "rms": "keys and values in units of their RMS", "mlp": "MLP"}


def learning_rates(found: list[Record]) -> Iterator[Cell]:
    """Held-out loss by learning rate of each way to train a prefix, the mean over seeds."""
    losses: dict[str, dict[float, list[float]]] = {}
    for r in (r for r in found if "kind" in r):
        row = f"{r['base']}, {NAMES[r['task']]}, init {r['init']}: {KINDS[r['kind']]}"
        losses.setdefault(row, {}).setdefault(r["rate"], []).append(r["eval_loss"] or float("inf"))
    for rate in sorted({rate for of_row in losses.values() for rate in of_row}):
        for row, of_row in losses.items():
            yield row, f"{rate:g}", f"{mean(of_row[rate]):.3f}" if rate in of_row else ""


# Numbers of GPT-2 124M: weights of all matrix products, and keys and values of one prefix row (12 layers of width 768).
GPT2_WEIGHTS, GPT2_PREFIX_NUMBERS = 12 * 12 * 768**2 + 50257 * 768, 12 * 2 * 768
STEP_PARTS = {"products": "matrix products", "arena writes": "KV cache writes", "choosing": "choice of tokens"}
REPLACED = "engine step without the model, in which 3 of the 32 requests end and 3 others start"
PARTS = {
    "test_attention_of_one_layer[0]": "attention of one layer, P = 0",
    "test_attention_of_one_layer[1]": "attention of one layer, P = 200, 1 distinct prefix",
    "test_attention_of_one_layer[32]": "attention of one layer, P = 200, 32 distinct prefixes",
    "test_new_keys_of_one_layer": "writing the new keys and values of one layer",
    "test_choosing[1]": "choice of tokens, greedy",
    "test_choosing[4]": "choice of tokens, 4 beams",
    "test_planning": "scheduling",
    "test_a_decode_step_of_32_rows[20]": "engine step without the model, 20 prefixes in the KV cache",
    "test_a_step_with_a_tenth_replaced[20]": f"{REPLACED}, 20 prefixes in the KV cache",
    "test_a_step_with_a_tenth_replaced[2000]": f"{REPLACED}, 2,000 prefixes in the KV cache",
}
PLANNING = {
    "plan a decode step with padded work, 1024 requests, 256 prefixes": "with work items, padded for CUDA graphs",
    "plan a decode step with work, 1024 requests, 256 prefixes": "with work items",
    "plan a decode step, 1024 requests, 256 prefixes": "without work items, as on a CPU",
    "the same, 102 requests replaced each step": "without work items, 102 requests end and 102 start in each step",
}
STORE = {
    "put": "put one",
    "open": "open the store",
    "len": "count the names",
    "list": "list all names, first time",
    "list again": "list all names, again",
    "scan": "read all but the tensors of all",
    "info": "read all but the tensors of one",
    "get": "read one",
}


def default_settings(found: list[Record]) -> Iterator[Cell]:
    """Held-out loss of the default settings and of the best of the sweep, by base, initial values, task and rows."""
    from prefixfast.config import TrainConfig
    from prefixfast.training.defaults import num_steps

    runs: dict[tuple[str, str, str, int], dict[tuple[float, int], list[float]]] = {}
    for r in found:
        cell = runs.setdefault((r["base"], r["init"], r["task"], r["rows"]), {})
        cell.setdefault((r["rate"], r["steps"]), []).append(r["eval_loss"])
    for (base, init, task, count), losses_of in runs.items():
        losses = {setting: mean(losses) for setting, losses in losses_of.items()}
        rate, of_default = DEFAULT_RATES[base, init], num_steps(TrainConfig(), -(-count // 10))
        steps = min(of_default, max(n for _, n in losses))
        as_long = {r: v for (r, n), v in losses.items() if n == steps}
        # A default rate that was not run counts as the worse of the rates on both sides of it.
        near = [rate] if rate in as_long else [max(r for r in as_long if r < rate), min(r for r in as_long if r > rate)]
        own, equal = max(as_long[r] for r in near), min((v, r) for r, v in as_long.items())
        best = min((v, r, n) for (r, n), v in losses.items())
        row = f"{base}, init {init}: {NAMES[task]}, {count:,} rows"
        yield row, "default", f"{' or '.join(f'{r:g}' for r in near)}, {steps} steps: {own:.3f}"
        yield row, "best rate", f"{equal[1]:g}: {equal[0]:.3f}"
        yield row, "ratio", f"{own / equal[0]:.3f}"
        yield row, "best of all", f"{best[1]:g}, {best[2]} steps: {best[0]:.3f}"
        yield row, "ratio to it", f"{own / best[0]:.3f}"
        yield row, "runs", str(sum(map(len, losses_of.values())))


DEFAULT_RATES = {
    ("nlg-10m", "text"): 0.15,
    ("nlg-10m", "random"): 2.5e-3,
    ("nlg-10m", "e2e-400"): 0.015,
    ("SmolLM2-135M", "text"): 0.018,
}


def method_rates(found: list[Record]) -> Iterator[Cell]:
    """Held-out loss of each method at the rates of a sweep, with its default and the best rate."""
    from prefixfast.training.method import METHODS

    for method in dict.fromkeys(r["method"] for r in found):
        losses = {r["rate"]: r["eval_loss"] for r in found if r["method"] == method}
        default = METHODS[method].learning_rate
        yield f"`{method}`", "default", f"{default:g}: {losses[default]:.3f}"
        yield f"`{method}`", "other rates", ", ".join(f"{r:g}: {v:.3f}" for r, v in losses.items() if r != default)


NAMES = {"e2e": "E2E", "dart": "DART", "scitldr": "SciTLDR"}


def figures(found: list[Record]) -> Iterator[Cell]:
    """The README's five figures."""

    def rate(contender: str, length: int, distinct: int | None = None) -> str:
        wanted = {"contender": contender, "prefix_length": length} | (
            {} if distinct is None else {"distinct": distinct}
        )
        return f"{first(found, file='generate-gpt2-fp32.jsonl', **wanted)['tokens_per_second']:.1f}"

    def quality_of(setting: str, impl: str) -> str:
        r = first(found, file=f"quality-smollm2-{setting}-{impl}.json")
        return f"loss {r['dev_loss']:.4f}, BLEU {r['bleu']:.2f}"

    check_same_losses([r for r in found if r["file"].startswith("quality-smollm2-time-")])

    def times(impl: str) -> str:
        own = [r["train_seconds"] for r in found if r["file"].startswith(f"quality-smollm2-time-{impl}-")]
        return f"{median(own):.1f} s ({min(own):.1f} to {max(own):.1f})"

    people = first(found, file="e2e-users-smollm2.jsonl")
    by_hand, one = rate("transformers, mixed batch by hand", 200), rate("PEFT, one request at a time", 200)
    generate, train = "prefixfast bench generate --rounds 2", f"{COMMANDS['quality']} smollm2-text MODEL DATA"
    threads = [first(found, file=f"quality-smollm2-text-{impl}.json")["threads"] for impl in ("prefixfast", "peft")]
    rows = {
        "Generation: GPT-2 124M, 32 requests, 32 distinct prefixes of 200 prefix rows": (
            f"{rate('prefixfast', 200, 32)} tokens/s",
            f"{by_hand} (transformers, prefixes copied by hand), {one} (PEFT, one request at a time, one prefix)",
            f"`{generate}`, `generate-gpt2-fp32.jsonl`",
        ),
        "Generation: GPT-2 124M, 32 requests, one prefix of 512 prefix rows": (
            f"{rate('prefixfast', 512, 1)} tokens/s",
            f"{rate('PEFT, one prefix for all', 512)} (PEFT)",
            f"`{generate}`, `generate-gpt2-fp32.jsonl`",
        ),
        f"Generation: SmolLM2-135M-Instruct, {people['requests']} requests, prefixes of {people['users']} users": (
            f"{people['tokens_per_second_together']:.1f} tokens/s",
            f"{people['tokens_per_second_one_by_one']:.1f} (prefixfast, one request at a time)",
            f"`{COMMANDS['users']}`, `e2e-users-smollm2.jsonl`",
        ),
        f"Quality: SmolLM2-135M-Instruct, E2E, 300 steps ({threads[0]} thread; PEFT {threads[1]} threads)": (
            quality_of("text", "prefixfast"),
            f"{quality_of('text', 'peft')} (PEFT)",
            f"`{train}`, `quality-smollm2-text-*.json`",
        ),
        "Training time: SmolLM2-135M-Instruct, E2E, 12 steps of batch 10, median (range) of 3 runs": (
            times("prefixfast"),
            f"{times('peft')} (PEFT)",
            f"`{train} --steps 12`, `quality-smollm2-time-*.json`",
        ),
    }
    for row, texts in rows.items():
        yield from (
            (row, *cell) for cell in zip(("prefixfast", "compared with", "command, results file"), texts, strict=True)
        )


def compared_quality(found: list[Record]) -> Iterator[Cell]:
    """Loss and scores of the methods of a comparison."""
    from prefixfast.studies.compare.summary import summarize
    from prefixfast.studies.compare.table import quality_rows

    summary = summarize(found, found[0]["shared"])
    names = [n for n in COMPARED if n in summary.qualities]
    for row in quality_rows(summary, names):
        yield from ((row["method"], column, row[column]) for column in ("seeds", *names))


def compared_costs(found: list[Record]) -> Iterator[Cell]:
    """Sizes, seconds and memory of the methods of a comparison."""
    from prefixfast.studies.compare.summary import summarize
    from prefixfast.studies.compare.table import cost_rows

    for row in cost_rows(summarize(found, found[0]["shared"]), 16e9):
        yield from ((row["method"], column, text) for column, text in row.items() if column != "method")


def clear(found: list[Record]) -> Iterator[Cell]:
    """Differences between methods that every seed shows."""
    from prefixfast.studies.compare.summary import summarize

    summary = summarize(found, found[0]["shared"])
    for name in (n for n in COMPARED if n in summary.qualities):
        pairs = "; ".join(f"{better} better than {other}" for better, other in summary.clear_differences(name))
        yield name, "differences that every seed shows", pairs or "none"


COMPARED = ("dev loss", "BLEU", "NIST", "METEOR", "ROUGE_L", "CIDEr", "omissions")
COMMANDS = {
    "quality": "prefixfast bench quality",
    "users": "prefixfast bench users MODEL DATA --steps 8",
    "compare": "benches/system/choosing.sh MODEL E2E_FOLDER OUT",
    "many": "python benches/system/many_users.py MODEL --e2e FOLDER -o OUT.jsonl",
    "forty": "python benches/system/forty_users.py -o OUT.jsonl",
}
BOTH = "(`--impl peft` for PEFT)"
DECODE_STEP = "; ".join(
    f"prefixfast bench decode-step --dtype {d} --steps 10 --rounds 6" for d in ("float32", "bfloat16")
)
ATTENTION = "python benches/kernels/attn_decode.py OUT.jsonl --dtype DTYPE --rounds 5"
TABLES: dict[str, Table] = {
    "figures": Table(
        ("generate-gpt2-fp32.jsonl", "e2e-users-*.jsonl", "quality-smollm2-text-*.json", "quality-smollm2-time-*.json"),
        figures,
        "fp32 on an AMD EPYC, 2 threads unless stated",
        source=False,
    ),
    "generate-gpt2-fp32": Table(("generate-gpt2-fp32.jsonl",), generation, "tokens/s, fp32"),
    "generate-gpt2-bf16": Table(("generate-gpt2-bf16.jsonl",), generation, "tokens/s, bf16"),
    "generate-llama-fp32": Table(("generate-llama-fp32.jsonl",), generation, "tokens/s, fp32"),
    "generate-nlg-10m-fp32": Table(("generate-nlg-10m-fp32.jsonl",), generation, "tokens/s, fp32"),
    "users": Table(("e2e-users-smollm2.jsonl",), users, command=COMMANDS["users"]),
    "choosing-smollm2": Table(("compare-smollm2.jsonl",), compared_quality, "SmolLM2", source=False),
    "choosing-smollm2-costs": Table(("compare-smollm2.jsonl",), compared_costs, "SmolLM2", command=COMMANDS["compare"]),
    "choosing-smollm2-clear": Table(("compare-smollm2.jsonl",), clear, "SmolLM2", source=False),
    "forty-users": Table(("forty-users.jsonl",), forty_users, command=COMMANDS["forty"]),
    "train-nlg-10m": Table(("train-nlg-10m-fp32.jsonl",), training, "P = 10, fp32"),
    "train-smollm2": Table(("train-smollm2-fp32.jsonl",), training, "P = 10, fp32"),
    "training-step": Table(
        ("training-step-*.jsonl",),
        training_steps,
        "a step of 5 rows for each prefix, fp32",
        "python benches/system/training_step.py MODEL --prefixes N -o OUT.jsonl",
    ),
    "many-users": Table(("many-users.jsonl",), many_users, command=COMMANDS["many"]),
    "learning-rates": Table(
        ("learning-rates.jsonl",),
        learning_rates,
        "held-out loss by learning rate",
        "python benches/system/learning_rates.py MODEL --data DATA -o OUT.jsonl",
    ),
    "quality-smollm2": Table(
        ("quality-smollm2-text-*.json", "quality-smollm2-mlp-p*.json"),
        quality,
        command=f"{COMMANDS['quality']} SETTING MODEL DATA --threads THREADS {BOTH}",
    ),
    "quality-agreement": Table(
        ("quality-smollm2-text-*.json", "quality-smollm2-mlp-*.json"),
        agreement,
        command=f"{COMMANDS['quality']} SETTING MODEL DATA --dtype float64 --steps 20 --threads 1",
    ),
    "quality-texts": Table(("quality-smollm2-mlp-prefixfast.json",), sample_texts, "table", source=False),
    "quality-time": Table(
        ("quality-smollm2-time-*.json",),
        training_time,
        "seconds of 12 steps",
        f"{COMMANDS['quality']} smollm2-text MODEL DATA --steps 12 {BOTH}",
    ),
    "quality-nlg-10m": Table(
        ("quality-nlg-10m-*.json",), quality_10m, command=f"{COMMANDS['quality']} nlg-10m MODEL DATA --threads 1 {BOTH}"
    ),
    "kernels": Table(("kernels-cpu-fp32.jsonl",), kernels, "ms, fp32", "prefixfast bench kernels --rounds 9"),
    "decode-step": Table(
        ("decode-step-gpt2-fp32.jsonl", "decode-step-gpt2-bf16.jsonl"), decode_steps, "ms", DECODE_STEP
    ),
    "decode-ratios": Table(("decode-step-gpt2-*.jsonl",), decode_ratios, source=False),
    "bandwidth": Table(("decode-step-gpt2-*.jsonl",), bandwidth, "GB/s", source=False),
    "attention-training": Table(
        ("attn-training-cpu.jsonl",),
        attention_training,
        "ms, forward + backward (largest error)",
        "python benches/kernels/attn_training.py OUT.jsonl",
    ),
    "attention-backward": Table(
        ("attn-backward-cpu-bf16.jsonl",),
        attention_backward,
        "ms (largest error)",
        "python benches/kernels/attn_backward.py OUT.jsonl",
    ),
    "attention-backward-ratios": Table(
        ("attn-backward-cpu-bf16.jsonl",),
        attention_backward_ratios,
        "time (error) relative to flash in fp32",
        source=False,
    ),
    "attention-decode": Table(
        ("attn-decode-cpu-float32.jsonl", "attn-decode-cpu-bfloat16.jsonl"),
        attention_decode,
        "ms, 12 layers",
        ATTENTION,
    ),
    "parts": Table(("parts.json",), parts, "microseconds"),
    "planning": Table(("plan.json",), planning, "microseconds", "cargo bench; python benches/rust/save.py OUT.json"),
    "tiering": Table(("tiering.jsonl",), tiering, "time between two tokens", "prefixfast bench tiering"),
    "store": Table(
        ("store.jsonl",),
        pivot(
            lambda r: STORE[r["what"]],
            ("median", lambda r: f"{r['ms']:.2f}"),
            ("best", lambda r: f"{r['best_ms']:.2f}"),
        ),
        "ms, 10,000 prefixes",
        "prefixfast bench store",
    ),
    "default-settings": Table(
        ("default-settings-nlg10m.jsonl",),
        default_settings,
        "held-out loss",
        "python benches/system/default_settings.py MODEL --data DATA -o OUT.jsonl",
    ),
    "method-rates": Table(
        ("method-rates-smollm2.jsonl",),
        method_rates,
        "held-out loss",
        "prefixfast train MODEL ROWS --task e2e --eval-data HELD_OUT --num-train-epochs 2 --method METHOD "
        "--learning-rate RATE -o OUT",
    ),
    "seq2seq-generate": Table(("seq2seq-*.jsonl",), seq2seq("generate"), "tokens/s"),
    "seq2seq-train": Table(("seq2seq-*.jsonl",), seq2seq("train"), "tokens/s"),
    "two-versions": Table(("two-versions.jsonl",), two_versions, "CPU time after / before"),
    "scitldr": Table(
        ("scitldr.jsonl",),
        scitldr,
        "SciTLDR test",
        "python -m prefixfast.studies.scitldr OUT --data DATA --base BASE --epochs 2 --max-source-length 384 "
        "--prefix-length 30 --prefix-rate 0.1",
    ),
    "fairness": Table(
        ("fairness.jsonl",), fairness, "factor of the others' time per token", "prefixfast bench fairness"
    ),
}
