"""Throughput of generation versus prefix length: prefixfast with d distinct prefixes in one batch, PEFT one request at a time, PEFT with one prefix for all.

Every run generates exactly ``new`` tokens for each request, prompt processing included. Before anything is timed the first request's tokens are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from prefixfast.bench.harness import Timing, alternate, cpu_name, version, write_rows
from prefixfast.engine.engine import Engine
from prefixfast.interchange import peft as layout
from prefixfast.model import DTYPES, Model, load
from prefixfast.prefix import Prefix


@dataclass(frozen=True)
class Workload:
    """The batch: equal prompts of random tokens."""

    requests: int = 32
    prompt: int = 40
    new: int = 32
    one_by_one: int = 4  # requests that the one-at-a-time contender is timed on; its rate does not depend on their number


@dataclass(frozen=True)
class Point:
    """One measured contender at one prefix length."""

    contender: str
    prefix_length: int
    distinct: int
    tokens: int
    timing: Timing

    @property
    def rate(self) -> float:
        """Tokens a second, best round."""
        return self.tokens / self.timing.best

    def row(self) -> dict[str, Any]:
        """For the results file."""
        fields = {k: getattr(self, k) for k in ("contender", "prefix_length", "distinct", "tokens")}
        return {**fields, "seconds": [round(s, 4) for s in self.timing.seconds], "tokens_per_second": round(self.rate, 2)}


def random_prefixes(model: Model, length: int, count: int) -> list[Prefix]:
    """Random prefixes of one length; the first is always the same."""
    out = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        kv = {f"self.{n}.{x}": torch.randn(length, s.num_kv_heads, s.head_dim, generator=g) * 0.5 for n, s in enumerate(model.layers) for x in "kv"}
        out.append(Prefix(kv, pos_start=length))
    return out


def measure(
    model: Model, lengths: Sequence[int], distinct: Sequence[int], work: Workload, *, rounds: int, plain: PreTrainedModel | None, progress: bool = True
) -> list[Point]:
    """All points; contenders of one prefix length alternate. ``plain``: the same base, not attached, for PEFT; None leaves PEFT out."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.vocab_size, (work.requests, work.prompt), generator=g).tolist()
    points: list[Point] = []
    for length in tqdm(lengths, desc="bench", unit="length", disable=not progress):
        counts = [1] if length == 0 else [d for d in distinct if d <= work.requests]
        prefixes = random_prefixes(model, length, max(counts)) if length else []
        calls: dict[tuple[str, int, int], Callable[[], Any]] = {}
        with Engine(model, max_num_seqs=work.requests, max_model_len=work.prompt + work.new) as engine:
            for d in counts:
                chosen = [prefixes[i % d] for i in range(work.requests)] if length else None
                calls["prefixfast", d if length else 0, work.requests] = lambda chosen=chosen: engine.generate(  # type: ignore[misc]
                    prompts, chosen, max_new_tokens=work.new, min_new_tokens=work.new, num_beams=1, progress=False
                )
            if plain is not None:
                calls |= _peft(plain, prefixes[0] if length else None, prompts, work)
            _check(calls, length)
            names = {f"{n} {d} {r}": (n, d, r) for n, d, r in calls}
            timings = alternate({name: calls[key] for name, key in names.items()}, rounds)
        points += [Point(n, length, d, r * work.new, timings[name]) for name, (n, d, r) in names.items()]
    return points


def _peft(plain: PreTrainedModel, prefix: Prefix | None, prompts: list[list[int]], work: Workload) -> dict[tuple[str, int, int], Callable[[], Any]]:
    from peft import PrefixTuningConfig, get_peft_model

    own: Any = copy.deepcopy(plain)
    own.generation_config.pad_token_id = 0
    if prefix is not None:
        own = get_peft_model(own, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix.length))
        own.prompt_encoder["default"].embedding.weight.data = layout.to_table(prefix.kv)
    own.eval()

    def call(batch: list[list[int]]) -> torch.Tensor:
        ids = torch.tensor(batch)
        with torch.inference_mode():
            out = own.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=work.new, min_new_tokens=work.new, do_sample=False)
        return out[:, ids.shape[1] :]

    return {
        ("PEFT, one request at a time", 1, work.one_by_one): lambda: torch.cat([call([p]) for p in prompts[: work.one_by_one]]),
        ("PEFT, one prefix for all", 1, work.requests): lambda: call(prompts),
    }


def _check(calls: dict[tuple[str, int, int], Callable[[], Any]], length: int) -> None:
    """No speed on wrong tokens: the first request of every contender that uses the first prefix gives the same tokens."""
    found = {}
    for key, call in calls.items():
        out = call()
        found[key] = out[0].token_ids if isinstance(out, list) else out[0].tolist()
    first = next(iter(found.values()))
    for key, tokens in found.items():
        if tokens != first:
            agree = next((i for i, (a, b) in enumerate(zip(tokens, first, strict=True)) if a != b), len(first))
            msg = f"P={length}: {key[0]} gives other tokens than prefixfast from token {agree} on; no speed is reported on wrong results"
            raise RuntimeError(msg)


def table(points: Sequence[Point]) -> str:
    """A Markdown table: one row a contender, one column a prefix length, tokens a second (best round)."""
    lengths = sorted({p.prefix_length for p in points})
    names: dict[str, dict[int, Point]] = {}
    for p in points:
        label = p.contender if p.contender != "prefixfast" else f"prefixfast, {p.distinct or 'any number of'} distinct"
        names.setdefault(label, {})[p.prefix_length] = p
    if (plain := names.pop("prefixfast, any number of distinct", None)) is not None:
        for label, row in names.items():
            if label.startswith("prefixfast"):
                row |= plain
        if not any(label.startswith("prefixfast") for label in names):
            names["prefixfast"] = plain
    lines = ["| tokens/s | " + " | ".join(f"P={n}" for n in lengths) + " |", "| --- |" + " ---: |" * len(lengths)]
    for label, row in names.items():
        lines.append(f"| {label} | " + " | ".join(f"{row[n].rate:.1f}" if n in row else "" for n in lengths) + " |")
    return "\n".join(lines)


def plot(points: Sequence[Point], path: Path, title: str) -> None:
    """Throughput versus prefix length as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    base = [p for p in points if p.prefix_length == 0]
    for name, d in dict.fromkeys((p.contender, p.distinct) for p in points if p.prefix_length):
        own = sorted([p for p in points if (p.contender, p.distinct) == (name, d)] + [p for p in base if p.contender == name and not p.distinct], key=_length)
        label = f"prefixfast, {d} distinct prefix{'es' if d > 1 else ''}" if name == "prefixfast" else name
        style = "o-" if name == "prefixfast" else "s--"
        axes.plot([p.prefix_length for p in own], [p.rate for p in own], style, label=label)
    axes.set(xlabel="prefix length (rows of keys and values)", ylabel="generated tokens per second", title=title, yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _length(p: Point) -> int:
    return p.prefix_length


def run(out: Path, *, model: str | None, dtype: str, lengths: Sequence[int], distinct: Sequence[int], work: Workload, rounds: int) -> list[Point]:
    """Measure, print the table, write ``results.jsonl`` and ``throughput.png``."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype]) if model else _gpt2(dtype)
    plain = copy.deepcopy(hf).eval() if version("peft") else None
    with load(hf) as base:
        points = measure(base, lengths, distinct, work, rounds=rounds, plain=plain)
    command = {
        "suite": "generate",
        "model": model or "gpt2 124M, random weights",
        "dtype": dtype,
        "requests": work.requests,
        "prompt": work.prompt,
        "new": work.new,
    }
    write_rows(out / "results.jsonl", [command, *(p.row() for p in points)])
    plot(points, out / "throughput.png", f"{work.requests} requests of {work.prompt} tokens, {work.new} new, {command['model']}, {dtype}\n{cpu_name()}")
    print(table(points))
    print(f"{out / 'results.jsonl'}, {out / 'throughput.png'}" + ("" if plain is not None else " (PEFT is not installed: pip install peft to compare)"))
    return points


def _gpt2(dtype: str) -> PreTrainedModel:
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config()).to(DTYPES[dtype]).eval()
    hf.generation_config.pad_token_id = 0
    return hf
