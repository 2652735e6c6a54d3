"""Suite ``generate``: throughput of generation by prefix length, number of distinct prefixes and batch size.

The contenders are prefixfast, PEFT and a mixed batch written by hand on transformers' cache. Every run generates the
same number of tokens for each request, prompt processing included. The contenders' tokens are compared before
anything is timed.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prefixfast.bench.contenders import (
    Bases,
    Contender,
    RunSettings,
    Tokens,
    mixed_by_hand,
    peft_contender,
    peft_or_plain,
)
from prefixfast.bench.decoding import Decoding, set_aside
from prefixfast.bench.exact_scores import ExactScores, Text, check_same_tokens
from prefixfast.bench.generate_points import BY_HAND, ONE_BY_ONE, ONE_FOR_ALL, OURS, Key, Point
from prefixfast.bench.generate_report import show
from prefixfast.bench.harness import alternate, announce, progress, write_rows
from prefixfast.bench.random_base import make_or_load, random_prefixes
from prefixfast.engine.engine import Engine
from prefixfast.errors import ConfigError
from prefixfast.io.environment import version
from prefixfast.model.base import Model
from prefixfast.model.load import load
from prefixfast.prefix.prefix import Prefix

COMPARED_WHEN_ROUNDED = 4  # prompts whose texts are compared with fp64 in bf16 and fp16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the suite.

    Attributes:
        model: Hub id or folder of the base, or None for random weights of ``shape``.
        shape: Name of a random base, a key of `random_base.SHAPES`.
        dtype: Compute dtype.
        lengths: Prefix lengths, of which 0 measures without a prefix.
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
        WrongResultError: If the tokens of two contenders differ, as `exact_scores` compares them.
    """
    points: list[Point] = []
    for length in progress(lengths, f"bench, {work.requests} requests", "lengths", shown=shown):
        with _contenders(bases, length, distinct, work) as (found, scores):
            check_contenders(found, scores, f"P={length}")
            timings = alternate({key: c.call for key, c in found.items()}, rounds)
        points += [
            Point(key, length, work.requests, key.requests * work.new, timing, found[key].settings)
            for key, timing in timings.items()
        ]
    return points


def check_contenders(found: Mapping[Key, Contender], scores: ExactScores | None, what: str) -> None:
    """Run every contender once, which warms it up, and compare the tokens of requests that several of them have.

    Args:
        found: The contenders.
        scores: Scores in fp64, None if there is no other contender. In bf16 and fp16 the first prompts are compared.
        what: Beginning of the error's message.

    Raises:
        WrongResultError: If a token is worse than the best one by more than its limit.
    """
    tokens = {key: contender.call() for key, contender in found.items()}
    if scores is None:
        return
    first = COMPARED_WHEN_ROUNDED if scores.is_rounded else len(scores.prompts)
    texts = [
        Text(key.contender, prompt, prefix, tuple(own))
        for key, contender in found.items()
        for (prompt, prefix), own in zip(contender.sources, tokens[key], strict=True)
        if prompt < first
    ]
    check_same_tokens(texts, scores, what)


@contextlib.contextmanager
def _contenders(
    bases: Bases, length: int, distinct: Sequence[int], work: Workload
) -> Iterator[tuple[dict[Key, Contender], ExactScores | None]]:
    """Contenders at one prefix length, and the scores by which their tokens are compared."""
    model, plain = bases.model, bases.plain
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, model.vocab_size, (work.requests, work.prompt), generator=g).tolist()
    counts = [d for d in distinct if d <= work.requests] if length else [0]
    prefixes = random_prefixes(model, length, work.requests) if length else []
    decoding = Decoding.exactly(work.new, model)
    memory = _kv_cache_bytes(model, length, work)
    found: dict[Key, Contender] = {}
    with Engine(
        model, max_num_seqs=work.requests, max_model_len=work.prompt + work.new, kv_cache_memory=memory
    ) as engine:
        for d in counts:
            sources = [(i, i % d if length else None) for i in range(work.requests)]
            settings = RunSettings.of(model, work.requests, decoding)
            call = partial(_ours, engine, prompts, [None if p is None else prefixes[p] for _, p in sources], decoding)
            found[Key(OURS, d, work.requests)] = Contender(call, sources, settings)
        if plain is not None:
            found |= _others(plain, prefixes, prompts, decoding, min(work.one_by_one, work.requests))
        yield found, None if plain is None else ExactScores(plain, prompts, prefixes.__getitem__, decoding)


def _ours(engine: Engine, prompts: Tokens, chosen: list[Prefix | None], decoding: Decoding) -> Tokens:
    """Tokens of one mixed batch of an engine."""
    return [g.token_ids for g in engine.generate(prompts, chosen, progress=False, **decoding.params())]


def _others(
    plain: PreTrainedModel, prefixes: Sequence[Prefix], prompts: Tokens, decoding: Decoding, few: int
) -> dict[Key, Contender]:
    """Contenders beside prefixfast. Without prefixes, ``generate`` of transformers takes the place of PEFT's."""
    found, count = {}, len(prompts)
    if prefixes:
        call = mixed_by_hand(plain, prefixes, prompts, decoding)
        settings = replace(RunSettings.of(plain, count, decoding), use_cache=True)
        found[Key(BY_HAND, count, count)] = Contender(call, [(i, i) for i in range(count)], settings)
    if version("peft"):
        number = 0 if prefixes else None
        own = peft_or_plain(plain, prefixes[0] if prefixes else None, decoding)
        found[Key(ONE_BY_ONE, 1, few)] = peft_contender(own, prompts[:few], number, decoding, one_by_one=True)
        found[Key(ONE_FOR_ALL, 1, count)] = peft_contender(own, prompts, number, decoding)
    return found


def _kv_cache_bytes(model: Model, length: int, work: Workload) -> int:
    """Bytes of the prefix and the tokens of every request."""
    rows = 256 + work.requests * (length + work.prompt + work.new + 64)
    return rows * sum(s.row_numbers for s in model.layers) * model.dtype.itemsize


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
    announce(hf.dtype, hf.device)
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
        "set_aside": set_aside(hf),
        "command": settings.command,
    }
    write_rows(output / "results.jsonl", [head, *(p.row() for p in points)])
    show(output, points, head, settings.rounds)
    return points
