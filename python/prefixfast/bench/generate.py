"""Suite ``generate``: throughput of generation by prefix length, number of distinct prefixes and batch size.

The contenders are prefixfast, PEFT and a mixed batch written by hand on transformers' cache. Every run generates the
same number of tokens for each request, prompt processing included. The contenders' tokens are compared before
anything is timed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prefixfast.bench.contenders import Bases, mixed_by_hand, peft_generate
from prefixfast.bench.generate_points import BY_HAND, ONE_BY_ONE, ONE_FOR_ALL, OURS, Key, Point
from prefixfast.bench.generate_report import show
from prefixfast.bench.harness import WrongResultError, alternate, progress, version, write_rows
from prefixfast.bench.random_base import make_or_load, random_prefixes
from prefixfast.engine.engine import Engine
from prefixfast.errors import ConfigError
from prefixfast.model.base import Model
from prefixfast.model.load import load


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the suite.

    Attributes:
        model: Hub id or folder of the base; None for random weights of ``shape``.
        shape: Name of a random base, a key of `random_base.SHAPES`.
        dtype: Compute dtype.
        lengths: Prefix lengths; 0 measures without a prefix.
        distinct: Numbers of distinct prefixes in the batch.
        requests: Numbers of requests in the batch.
        rounds: Number of repetitions.
        command: Command that repeats the measurement.
    """

    model: str | None
    shape: str
    dtype: str
    lengths: Sequence[int]
    distinct: Sequence[int]
    requests: Sequence[int]
    rounds: int
    command: str


@dataclass(frozen=True)
class Workload:
    """Batch of equally long prompts of random tokens.

    Attributes:
        requests: Number of requests.
        prompt: Tokens of each prompt.
        new: Generated tokens of each request.
        one_by_one: Requests that the one-at-a-time contender is timed on. Its rate does not depend on their number.
    """

    requests: int = 32
    prompt: int = 40
    new: int = 32
    one_by_one: int = 4


def measure(
    bases: Bases,
    lengths: Sequence[int],
    distinct: Sequence[int],
    work: Workload,
    *,
    rounds: int,
    shown: bool = True,
) -> list[Point]:
    """Times of all contenders, which alternate at each prefix length.

    Raises:
        WrongResultError: If the tokens of two contenders differ.
    """
    points: list[Point] = []
    exact = bases.model.dtype == torch.float32
    for length in progress(lengths, f"bench, {work.requests} requests", "length", shown=shown):
        if not exact:
            _check_same_tokens_in_fp32(bases, length, distinct, work)
        with _contenders(bases, length, distinct, work) as calls:
            if exact:
                check_same_tokens(calls, length)
            else:
                for call in calls.values():
                    call()
            timings = alternate(calls, rounds)
        points += [Point(key, length, work.requests, key.requests * work.new, t) for key, t in timings.items()]
    return points


@contextlib.contextmanager
def _contenders(
    bases: Bases, length: int, distinct: Sequence[int], work: Workload
) -> Iterator[dict[Key, Callable[[], Any]]]:
    """Calls to time at one prefix length."""
    model, plain = bases.model, bases.plain
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.vocab_size, (work.requests, work.prompt), generator=g).tolist()
    counts = [d for d in distinct if d <= work.requests] if length else [0]
    prefixes = random_prefixes(model, length, work.requests) if length else []
    memory = _kv_cache_bytes(model, length, work)
    how: dict[str, Any] = {"max_new_tokens": work.new, "min_new_tokens": work.new, "num_beams": 1, "progress": False}
    calls: dict[Key, Callable[[], Any]] = {}
    with Engine(
        model, max_num_seqs=work.requests, max_model_len=work.prompt + work.new, kv_cache_memory=memory
    ) as engine:
        for d in counts:
            chosen = [prefixes[i % d] for i in range(work.requests)] if length else None
            calls[Key(OURS, d, work.requests)] = partial(engine.generate, prompts, chosen, **how)
        if plain is not None:
            if length:
                by_hand = mixed_by_hand(plain, prefixes, prompts, work.new)
                calls[Key(BY_HAND, work.requests, work.requests)] = by_hand
            if version("peft"):
                theirs = peft_generate(plain, prefixes[0] if length else None, work.new)
                few = min(work.one_by_one, work.requests)
                calls[Key(ONE_BY_ONE, 1, few)] = lambda: torch.cat([theirs([p]) for p in prompts[:few]])
                calls[Key(ONE_FOR_ALL, 1, work.requests)] = lambda: theirs(prompts)
        yield calls


def _kv_cache_bytes(model: Model, length: int, work: Workload) -> int:
    """Bytes of the prefix and the tokens of every request."""
    rows = 256 + work.requests * (length + work.prompt + work.new + 64)
    return rows * sum(2 * s.num_kv_heads * s.head_dim for s in model.layers) * model.dtype.itemsize


def _check_same_tokens_in_fp32(bases: Bases, length: int, distinct: Sequence[int], work: Workload) -> None:
    """Compare tokens on a short fp32 run of the same contenders, since rounding changes tokens in other dtypes."""
    if bases.plain is None:
        return
    exact, other = (copy.deepcopy(bases.plain).float() for _ in "ab")
    few = Workload(min(4, work.requests), work.prompt, 6, 2)
    with load(exact) as base, _contenders(Bases(base, other), length, distinct, few) as calls:
        check_same_tokens(calls, length)


def check_same_tokens(calls: dict[Key, Callable[[], Any]], length: int) -> None:
    """Check that all contenders generate the same tokens for the first request, and mixed batches for all requests.

    Raises:
        WrongResultError: If they differ.
    """
    found: dict[Key, list[list[int]]] = {}
    for key, call in calls.items():
        out = call()
        found[key] = [g.token_ids for g in out] if isinstance(out, list) else out.tolist()
    reference = found[next(iter(found))][0]
    for key, tokens in found.items():
        if tokens[0] != reference:
            differ = (i for i, (a, b) in enumerate(zip(tokens[0], reference, strict=True)) if a != b)
            msg = (
                f"P={length}: {key.contender} gives other tokens than prefixfast from token "
                f"{next(differ, len(reference))} on; no speed is reported on wrong results"
            )
            raise WrongResultError(msg)
    mixed = [t for k, t in found.items() if k.distinct == k.requests > 1 and k.contender in (OURS, BY_HAND)]
    if len(mixed) == 2 and mixed[0] != mixed[1]:
        msg = (
            f"P={length}: the batch mixed by hand gives other tokens than prefixfast; "
            "no speed is reported on wrong results"
        )
        raise WrongResultError(msg)


def run(output: Path, settings: Settings) -> list[Point]:
    """Measure, print the tables, write ``results.jsonl``, ``throughput.png`` and ``report.html``.

    Raises:
        ConfigError: For a prefix length beyond the positions of the base.
        WrongResultError: If the tokens of two contenders differ.
    """
    hf, name = make_or_load(settings.model, settings.shape, settings.dtype)
    work, most = Workload(), hf.config.get_text_config().max_position_embeddings
    if (longest := max(settings.lengths) + work.prompt + work.new) > most:
        msg = (
            f"lengths: a prefix of {max(settings.lengths)}, {work.prompt} prompt tokens and {work.new} new ones are "
            f"{longest} positions, this base has {most}"
        )
        raise ConfigError(msg)
    plain = copy.deepcopy(hf).eval()
    points: list[Point] = []
    with load(hf) as base:
        for count in settings.requests:
            own = Workload(count)
            points += measure(Bases(base, plain), settings.lengths, settings.distinct, own, rounds=settings.rounds)
    head = {
        "suite": "generate",
        "model": name,
        "dtype": settings.dtype,
        "prompt": work.prompt,
        "new": work.new,
        "command": settings.command,
    }
    write_rows(output / "results.jsonl", [head, *(p.row() for p in points)])
    show(output, points, head, settings.rounds)
    return points
