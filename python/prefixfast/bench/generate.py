"""Throughput of generation versus prefix length, distinct prefixes and batch, against PEFT and a batch mixed by hand on transformers' cache.

Every run generates exactly ``new`` tokens for each request, prompt processing included. Before anything is timed the tokens are compared.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from prefixfast.bench import contenders
from prefixfast.bench.harness import Timing, alternate, cpu_name, environment, version, write_rows
from prefixfast.bench.report import markdown, write_report
from prefixfast.engine.engine import Engine
from prefixfast.errors import ConfigError
from prefixfast.model.base import DTYPES, Model
from prefixfast.model.load import load
from prefixfast.prefix.prefix import Prefix

OURS, ONE_BY_ONE, ONE_FOR_ALL, BY_HAND = (
    "prefixfast",
    "PEFT, one request at a time",
    "PEFT, one prefix for all",
    "transformers, mixed batch by hand",
)
SHAPES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {}, "GPT-2 124M"),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
        }
        | {"max_position_embeddings": 8192},
        "a Llama of 12 layers, width 768, 4 kv heads",
    ),
}


@dataclass(frozen=True)
class Workload:
    """The batch: equal prompts of random tokens."""

    requests: int = 32
    prompt: int = 40
    new: int = 32
    one_by_one: int = (
        4  # requests that the one-at-a-time contender is timed on; its rate does not depend on their number
    )


class Key(NamedTuple):
    """Who generates, with how many distinct prefixes, for how many requests."""

    contender: str
    distinct: int
    requests: int


@dataclass(frozen=True)
class Point:
    """One measured contender at one prefix length; ``batch`` is the workload's requests."""

    key: Key
    prefix_length: int
    batch: int
    tokens: int
    timing: Timing

    @property
    def rate(self) -> float:
        """Tokens a second, best round."""
        return self.tokens / self.timing.best

    @property
    def token_milliseconds(self) -> float:
        """What one request waits for a token: all of a batch get one at a time."""
        together = 1 if self.key.contender == ONE_BY_ONE else self.key.requests
        return 1e3 * together / self.rate

    @property
    def label(self) -> str:
        """Its line in tables and pictures."""
        return self.key.contender if self.key.contender != OURS else f"{OURS}, {self.key.distinct} distinct"

    def row(self) -> dict[str, Any]:
        """For the results file."""
        fields = {
            "contender": self.key.contender,
            "prefix_length": self.prefix_length,
            "distinct": self.key.distinct,
            "requests": self.batch,
            "tokens": self.tokens,
        }
        return {
            **fields,
            "seconds": [round(s, 4) for s in self.timing.seconds],
            "tokens_per_second": round(self.rate, 2),
        }


def random_prefixes(model: Model, length: int, count: int) -> list[Prefix]:
    """Random prefixes of one length; the first is always the same."""
    out = []
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        kv = {
            f"self.{n}.{x}": torch.randn(length, s.num_kv_heads, s.head_dim, generator=g) * 0.5
            for n, s in enumerate(model.layers)
            for x in "kv"
        }
        out.append(Prefix(kv, pos_start=length))
    return out


def measure(
    model: Model,
    lengths: Sequence[int],
    distinct: Sequence[int],
    work: Workload,
    *,
    rounds: int,
    plain: PreTrainedModel | None,
    progress: bool = True,
) -> list[Point]:
    """All points; contenders of one prefix length alternate. ``plain``: the same base, not attached, for the others; None leaves them out."""
    points: list[Point] = []
    for length in tqdm(lengths, desc=f"bench, {work.requests} requests", unit="length", disable=not progress):
        if model.dtype != torch.float32:
            _check_in_fp32(model, length, distinct, work, plain)
        with _contenders(model, length, distinct, work, plain) as calls:
            if model.dtype == torch.float32:
                check(calls, length)
            else:
                for call in calls.values():
                    call()
            timings = alternate(calls, rounds)
        points += [
            Point(key, length, work.requests, key.requests * work.new, timing) for key, timing in timings.items()
        ]
    return points


@contextlib.contextmanager
def _contenders(
    model: Model, length: int, distinct: Sequence[int], work: Workload, plain: PreTrainedModel | None
) -> Iterator[dict[Key, Callable[[], Any]]]:
    """Who is timed at one prefix length."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.vocab_size, (work.requests, work.prompt), generator=g).tolist()
    counts = [d for d in distinct if d <= work.requests] if length else [0]
    prefixes = random_prefixes(model, length, work.requests) if length else []
    calls: dict[Key, Callable[[], Any]] = {}
    with Engine(
        model,
        max_num_seqs=work.requests,
        max_model_len=work.prompt + work.new,
        kv_cache_memory=_memory(model, length, work),
    ) as engine:
        for d in counts:
            chosen = [prefixes[i % d] for i in range(work.requests)] if length else None
            calls[Key(OURS, d, work.requests)] = lambda chosen=chosen: engine.generate(  # type: ignore[misc]
                prompts, chosen, max_new_tokens=work.new, min_new_tokens=work.new, num_beams=1, progress=False
            )
        if plain is not None:
            if length:
                calls[Key(BY_HAND, work.requests, work.requests)] = contenders.mixed_by_hand(
                    plain, prefixes, prompts, work.new
                )
            if version("peft"):
                theirs = contenders.peft(plain, prefixes[0] if length else None, work.new)
                few = min(work.one_by_one, work.requests)
                calls[Key(ONE_BY_ONE, 1, few)] = lambda: torch.cat([theirs([p]) for p in prompts[:few]])
                calls[Key(ONE_FOR_ALL, 1, work.requests)] = lambda: theirs(prompts)
        yield calls


def _memory(model: Model, length: int, work: Workload) -> int:
    """Bytes for every request's own prefix and tokens."""
    rows = 256 + work.requests * (length + work.prompt + work.new + 64)
    return rows * sum(2 * s.num_kv_heads * s.head_dim for s in model.layers) * model.dtype.itemsize


def _check_in_fp32(
    model: Model, length: int, distinct: Sequence[int], work: Workload, plain: PreTrainedModel | None
) -> None:
    """Rounding changes tokens: other dtypes are checked by the same contenders in fp32, on a short run."""
    if plain is None:
        return
    exact, other = (copy.deepcopy(plain).float() for _ in "ab")
    with (
        load(exact) as base,
        _contenders(base, length, distinct, Workload(min(4, work.requests), work.prompt, 6, 2), other) as calls,
    ):
        check(calls, length)


def check(calls: dict[Key, Callable[[], Any]], length: int) -> None:
    """No speed on wrong tokens: the first request of every contender, which uses the first prefix, gives the same tokens; so do all of a mixed batch.

    Raises:
        RuntimeError: If they differ.
    """
    found: dict[Key, list[list[int]]] = {}
    for key, call in calls.items():
        out = call()
        found[key] = [g.token_ids for g in out] if isinstance(out, list) else out.tolist()
    reference = found[next(iter(found))][0]
    mixed = [
        tokens for key, tokens in found.items() if key.distinct == key.requests > 1 and key.contender in (OURS, BY_HAND)
    ]
    for key, tokens in found.items():
        if tokens[0] != reference:
            agree = next(
                (i for i, (a, b) in enumerate(zip(tokens[0], reference, strict=True)) if a != b), len(reference)
            )
            msg = f"P={length}: {key.contender} gives other tokens than prefixfast from token {agree} on; no speed is reported on wrong results"
            raise RuntimeError(msg)
    if len(mixed) == 2 and mixed[0] != mixed[1]:
        msg = f"P={length}: the batch mixed by hand gives other tokens than prefixfast; no speed is reported on wrong results"
        raise RuntimeError(msg)


def table(
    points: Sequence[Point], show: Callable[[Point], str] = lambda p: f"{p.rate:.1f}", corner: str = "tokens/s"
) -> str:
    """A Markdown table: one row a contender, one column a prefix length; by default tokens a second of the best round."""
    lengths = sorted({p.prefix_length for p in points})
    lines: dict[str, dict[int, str]] = {}
    plain = next((show(p) for p in points if p.key == (OURS, 0, p.batch)), None)
    for p in sorted(
        (p for p in points if p.key.contender != OURS or p.key.distinct),
        key=lambda p: (p.key.contender == OURS, p.key.distinct),
    ):
        lines.setdefault(p.label, {0: plain} if p.key.contender == OURS and plain is not None else {})[
            p.prefix_length
        ] = show(p)
    if plain is not None and not any(label.startswith(OURS) for label in lines):
        lines[OURS] = {0: plain}
    return markdown(lines, lengths, corner)


def plot(points: Sequence[Point], path: Path, title: str) -> None:
    """Throughput versus prefix length as a picture; a panel for each number of requests."""
    from matplotlib.figure import Figure

    batches = sorted({p.batch for p in points})
    figure = Figure(figsize=(8 if len(batches) == 1 else 6 * len(batches), 4.8), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        here = [p for p in points if p.batch == batch]
        named = [p for p in here if p.prefix_length] or here  # a line begins at its contender's point without a prefix
        for label, contender in {p.label: p.key.contender for p in named}.items():
            own = [p for p in here if p.label == label or (not p.prefix_length and p.key.contender == contender)]
            own.sort(key=lambda p: p.prefix_length)
            axes.plot(
                [p.prefix_length for p in own],
                [p.rate for p in own],
                "o-" if label.startswith(OURS) else "s--",
                label=label,
            )
        axes.set(
            xlabel="prefix length (rows of keys and values)",
            ylabel="generated tokens per second",
            title=f"{batch} requests",
            yscale="log",
        )
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend(fontsize="x-small")
    figure.suptitle(title, fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def run(
    out: Path,
    *,
    model: str | None,
    shape: str,
    dtype: str,
    lengths: Sequence[int],
    distinct: Sequence[int],
    requests: Sequence[int],
    rounds: int,
    command: str,
) -> list[Point]:
    """Measure, print the tables, write ``results.jsonl``, ``throughput.png`` and ``report.html``."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[dtype]) if model else make(shape, dtype)
    work, most = Workload(), hf.config.get_text_config().max_position_embeddings
    if (longest := max(lengths) + work.prompt + work.new) > most:
        msg = f"lengths: a prefix of {max(lengths)}, {work.prompt} prompt tokens and {work.new} new ones are {longest} positions, this base has {most}"
        raise ConfigError(msg)
    plain = copy.deepcopy(hf).eval()
    points: list[Point] = []
    with load(hf) as base:
        for count in requests:
            points += measure(base, lengths, distinct, Workload(count), rounds=rounds, plain=plain)
    name = model or f"{SHAPES[shape][3]}, random weights"
    head = {
        "suite": "generate",
        "model": name,
        "dtype": dtype,
        "prompt": work.prompt,
        "new": work.new,
        "command": command,
    }
    write_rows(out / "results.jsonl", [head, *(p.row() for p in points)])
    title = f"{work.prompt} prompt tokens, {work.new} new, {name}, {dtype}, {cpu_name()}"
    plot(points, out / "throughput.png", title)
    tables = []
    for count in requests:
        here = [p for p in points if p.batch == count]
        tables.append((f"{count} requests: tokens a second, best of {rounds} rounds", table(here)))
        tables.append(
            (
                f"{count} requests: milliseconds a token of one request",
                table(here, lambda p: f"{p.token_milliseconds:.1f}", "ms"),
            )
        )
        tables.append(
            (
                f"{count} requests: median over best round",
                table(here, lambda p: f"{p.timing.median / p.timing.best:.2f}", "spread"),
            )
        )
    for caption, text in tables:
        print(f"\n{caption}\n\n{text}")
    write_report(
        out / "report.html",
        f"Throughput versus prefix length: {title}",
        tables,
        out / "throughput.png",
        environment(),
        command,
    )
    print(
        f"\n{out / 'results.jsonl'}, {out / 'throughput.png'}, {out / 'report.html'}"
        + ("" if version("peft") else " (pip install peft to compare with it)")
    )
    return points


def make(shape: str, dtype: str) -> PreTrainedModel:
    """A base with random weights."""
    torch.manual_seed(0)
    kind, config, fields, _ = SHAPES[shape]
    hf: PreTrainedModel = kind(config(**fields)).to(DTYPES[dtype]).eval()
    hf.generation_config.pad_token_id = 0
    hf.generation_config.eos_token_id = None
    return hf
