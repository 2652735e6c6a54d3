"""Suite ``seq2seq``: users with prefixes of their own on a BART, beam search and training, against PEFT.

PEFT has prefixes in the decoder's self-attention alone. The ratio compares the same prefixes, and prefixfast is timed
with prefixes at all three sites beside it. A text that differs from PEFT's must have the same score in fp64 up to
rounding, and the losses of training must be equal, before a rate is reported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from prefixfast.bench.harness import WrongResultError, announce, write_rows
from prefixfast.bench.seq2seq_contenders import (
    Losses,
    Seconds,
    Texts,
    generate,
    peft_generate,
    peft_model,
    score,
    train_ours,
    train_peft,
)
from prefixfast.bench.seq2seq_inputs import DESCRIPTION, Workload, make_base, site_prefixes
from prefixfast.bench.train import LIMIT, check_same_losses
from prefixfast.bench.train_contenders import Run
from prefixfast.config.sites import SITES
from prefixfast.engine.engine import Engine
from prefixfast.io.environment import cpu_name, version
from prefixfast.model.base import Model
from prefixfast.model.load import load
from prefixfast.prefix.prefix import Prefix

DECODER, ALL, PEFT = "prefixfast, decoder prefixes", "prefixfast, three sites", "PEFT, one request at a time"
PEFT_LOOP = "PEFT, padded batches"
GAP = 1e-3  # largest difference in fp64 of the scores of two texts that rounding decides between, in nats
ROUNDINGS = 4.0  # in 16 bits, as a multiple of the rounding error of PEFT's own score


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the suite.

    Attributes:
        dtype: Compute dtype, a key of `LIMIT`.
        rounds: Number of repetitions.
        command: Command that repeats the measurement.
    """

    dtype: str
    rounds: int
    command: str


@dataclass(frozen=True)
class Point:
    """Times of one contender.

    Attributes:
        kind: ``"generate"`` or ``"train"``.
        contender: Name of the contender.
        tokens: Tokens of one round, generated ones, or those of training rows without padding.
        seconds: Seconds of each round.
    """

    kind: str
    contender: str
    tokens: int
    seconds: tuple[Seconds, ...]

    @property
    def rate(self) -> float:
        """Tokens a second of CPU time in the fastest round."""
        return self.tokens / min(s.cpu for s in self.seconds)

    def row(self) -> dict[str, Any]:
        """Record of the results file."""
        return {
            "kind": self.kind,
            "contender": self.contender,
            "tokens": self.tokens,
            "wall_seconds": [round(s.wall, 3) for s in self.seconds],
            "cpu_seconds": [round(s.cpu, 3) for s in self.seconds],
            "tokens_per_cpu_second": round(self.rate, 2),
        }


@dataclass(frozen=True)
class TextCheck:
    """Comparison of PEFT's texts with those of prefixfast.

    Where texts differ, both are scored in fp64. In 16 bits rounding decides which beams are kept, so that texts can
    differ by more than rounding. There the engine's own log-probability of PEFT's text is compared with that in fp64.

    Attributes:
        plain: Base of transformers.
        engine: Engine of prefixfast.
        sources: Token ids of the sources.
        prefixes: Prefix of each source.
    """

    plain: PreTrainedModel
    engine: Engine
    sources: list[list[int]]
    prefixes: Sequence[Prefix]

    def check(self, ours: Texts, theirs: Texts) -> float:
        """Check the texts of PEFT, those of the first sources.

        Returns:
            Largest difference of two log-probabilities in nats, 0 if none was compared.

        Raises:
            WrongResultError: If two log-probabilities differ by more than rounding.
        """
        is_rounded, largest = self.plain.dtype.itemsize == 2, 0.0
        exact = copy.deepcopy(self.plain).double()
        for i, tokens in enumerate(theirs.tokens):
            if ours.tokens[i] == tokens and not is_rounded:
                continue
            expected, limit = score(exact, self.sources[i], self.prefixes[i], tokens), GAP
            if is_rounded:
                limit = max(
                    GAP, ROUNDINGS * abs(score(self.plain, self.sources[i], self.prefixes[i], tokens) - expected)
                )
                found = self._engine_score(i, tokens)
            else:
                found = score(exact, self.sources[i], self.prefixes[i], ours.tokens[i])
            if not abs(found - expected) <= limit:
                msg = (
                    f"request {i}: expected the log-probability {expected:.4f} of PEFT's text up to {limit:.1e}, "
                    f"got {found:.4f}; no speed is reported on wrong results"
                )
                raise WrongResultError(msg)
            largest = max(largest, abs(found - expected))
        return largest

    def _engine_score(self, i: int, tokens: list[int]) -> float:
        row = {"input_ids": self.sources[i], "labels": tokens}
        (found,) = self.engine.score([row], self.prefixes[i], progress=False)
        return found.logprob


def check_no_fallback(about: Mapping[str, str]) -> None:
    """Check that attention runs on the fastest implementation of this machine, which `Engine.explain` describes.

    Raises:
        WrongResultError: If a reason is given why it does not.
    """
    for name in ("attn", "attn_decode"):
        if ";" in about[name]:
            msg = f"{name} falls back to {about[name]}; no speed is reported"
            raise WrongResultError(msg)


def measure_generation(
    model: Model, plain: PreTrainedModel, work: Workload, rounds: int
) -> tuple[list[Point], dict[str, Any]]:
    """Points of generation, and what the engine says about its implementations.

    Raises:
        WrongResultError: If texts differ, or an operator of the engine falls back to a slower implementation.
    """
    sources = work.sources(model.vocab_size)
    decoder, every = (site_prefixes(model, work.prefix, work.users, sites) for sites in (("self",), SITES))
    calls: dict[str, Callable[[], Texts]] = {}
    with Engine(model, max_num_seqs=work.users * work.beams, max_model_len=work.new + 1) as engine:
        about = {name: str(value) for name, value in engine.explain().items()}
        check_no_fallback(about)
        calls[DECODER] = partial(generate, engine, sources, decoder, work)
        calls[ALL] = partial(generate, engine, sources, every, work)
        few = min(work.one_by_one, work.users)
        if version("peft"):
            owns = [peft_model(plain, p)[0] for p in decoder[:few]]
            calls[PEFT] = partial(_peft_texts, owns, sources[:few], work)
        seconds: dict[str, list[Seconds]] = {name: [] for name in calls}
        for number in range(rounds + 1):  # the first round warms up
            texts = {name: call() for name, call in calls.items()}
            if number and PEFT in texts:
                check = TextCheck(plain, engine, sources, decoder)
                about["largest difference of scores"] = str(check.check(texts[DECODER], texts[PEFT]))
            for name, found in texts.items():
                seconds[name] += [found.seconds] if number else []
    counts = dict.fromkeys(calls, work.users) | {PEFT: few}
    return [Point("generate", n, counts[n] * work.new, tuple(s)) for n, s in seconds.items()], about


def _peft_texts(owns: Sequence[Any], sources: list[list[int]], work: Workload) -> Texts:
    found = [peft_generate(own, [source], work) for own, source in zip(owns, sources, strict=True)]
    seconds = Seconds(sum(t.seconds.wall for t in found), sum(t.seconds.cpu for t in found))
    return Texts([t.tokens[0] for t in found], seconds)


def measure_training(model: Model, plain: PreTrainedModel, work: Workload, settings: Settings) -> list[Point]:
    """Points of training.

    Raises:
        WrongResultError: If the losses differ.
    """
    rows = work.rows(model.vocab_size)
    tokens = work.steps * sum(len(r["input_ids"]) + len(r["labels"]) for r in rows)
    ((decoder,), (every,)) = (site_prefixes(model, work.prefix, 1, sites) for sites in (("self",), SITES))
    calls: dict[str, Callable[[], Losses]] = {
        DECODER: partial(train_ours, model, rows, decoder, work.steps),
        ALL: partial(train_ours, model, rows, every, work.steps),
    }
    if version("peft"):
        calls[PEFT_LOOP] = partial(train_peft, plain, rows, decoder, work.steps)
    seconds: dict[str, list[Seconds]] = {name: [] for name in calls}
    for _ in range(settings.rounds):
        found = {name: call() for name, call in calls.items()}
        same = {(n, 1): Run(0.0, found[n].values) for n in (DECODER, PEFT_LOOP) if n in found}
        check_same_losses(same, work.prefix, LIMIT[settings.dtype])
        for name, own in found.items():
            seconds[name].append(own.seconds)
    return [Point("train", name, tokens, tuple(s)) for name, s in seconds.items()]


def run(output: Path, settings: Settings, work: Workload | None = None, **shape: int) -> list[Point]:
    """Measure, print the tables and write ``results.jsonl``.

    Args:
        output: Folder for the results.
        settings: Options.
        work: Amounts of work, None for the standard ones.
        shape: Fields of the base's configuration in place of those of BART-base.

    Raises:
        WrongResultError: If the results of two contenders differ.
    """
    work, hf = work or Workload(), make_base(settings.dtype, **shape)
    plain = copy.deepcopy(hf)
    announce(hf.dtype, hf.device)
    with load(hf) as model:
        generation, about = measure_generation(model, plain, work, settings.rounds)
        points = generation + measure_training(model, plain, work, settings)
    head: dict[str, Any] = {
        "suite": "seq2seq",
        "model": DESCRIPTION,
        "dtype": settings.dtype,
        "command": settings.command,
    }
    head |= {"work": asdict(work), "engine": about}
    write_rows(output / "results.jsonl", [head, *(p.row() for p in points)])
    _show(points, work, settings)
    print(f"\n{output / 'results.jsonl'}")
    return points


def _show(points: Sequence[Point], work: Workload, settings: Settings) -> None:
    print(f"{DESCRIPTION}, {settings.dtype}, {cpu_name()}; tokens a second of CPU time, fastest of {settings.rounds}")
    title = f"{work.users} users, {work.prefix} prefix rows, {work.source} source tokens, {work.beams} beams"
    for kind, caption in (("generate", title), ("train", f"training, {work.batch} rows of SciTLDR's lengths")):
        own = [p for p in points if p.kind == kind]
        others = [p.rate for p in own if p.contender in (PEFT, PEFT_LOOP)]
        print(f"\n{caption}\n\n| contender | tokens/s | against PEFT |\n| --- | ---: | ---: |")
        for p in own:
            print(f"| {p.contender} | {p.rate:.1f} | {f'{p.rate / others[0]:.2f}' if others else ''} |")
