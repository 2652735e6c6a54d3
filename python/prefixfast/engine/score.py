"""`Score`, the log-probabilities of given targets, from packed forwards with the prefixes in place.

Shape letters: N packed tokens, T target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast.attention.plan import Plan, PrefixUse, training_plan
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan, seq2seq_training_plan
from prefixfast.config.engine import BaseMismatch
from prefixfast.config.json_types import JSON
from prefixfast.data.encode import Example
from prefixfast.engine.score_inputs import ScoreRequest
from prefixfast.engine.search import argmax_rows
from prefixfast.errors import RequestError
from prefixfast.io.progress import Progress
from prefixfast.model.base import Model
from prefixfast.model.process import check_not_exiting
from prefixfast.prefix.kv import concat_kv, row_table, site_prefixes
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import StoredPrefix

LOGITS_ROWS = 256  # rows of logits computed at once


@dataclass(frozen=True)
class Score:
    """Log-probabilities (natural log) of one request's targets.

    The targets of a row are those of training: one text, the assistant's turns of a conversation, or several
    references, whose tokens follow each other.

    Attributes:
        index: Place of the request in the batch, from 0.
        id: Value of the request's ``id`` key, None without one.
        logprob: Log-probability of all targets, the sum of ``token_logprobs``.
        token_logprobs: Log-probability of each target token, given all tokens before it.
        token_ids: Token ids of the targets.
        is_greedy: Whether each target token is the most likely one.
        prefix_digest: Digests of the request's prefixes, joined by "+", None without a prefix.
        usage: Counts ``prompt_tokens``, ``completion_tokens`` and ``prefix_rows``.
        base_mismatch: ``"quantized"`` if a prefix was made for the base model before its quantization
            (``allow_base_mismatch``), None without a mismatch.
    """

    index: int
    id: JSON
    logprob: float
    token_logprobs: list[float]
    token_ids: list[int]
    is_greedy: bool
    prefix_digest: str | None
    usage: dict[str, int]
    base_mismatch: BaseMismatch | None = None


@torch.inference_mode()
def score_requests(model: Model, requests: Sequence[ScoreRequest], token_budget: int, work: Progress) -> list[Score]:
    """Scores of requests, in their order.

    Args:
        model: Base model.
        requests: Checked requests.
        token_budget: Largest number of tokens of one forward. A longer example gets a forward of its own.
        work: Progress that counts the finished requests.

    Raises:
        RequestError: If a log-probability is NaN.
    """
    examples = [(r, e) for r in requests for e in r.examples]
    found: dict[int, list[tuple[NDArray[np.float64], NDArray[np.bool_]]]] = {r.index: [] for r in requests}
    last = np.cumsum([len(r.examples) for r in requests])  # number of examples up to the end of each request
    for part in _batches([e.num_tokens for _, e in examples], token_budget):
        check_not_exiting()
        logprobs, greedy = _target_logprobs(model, examples[part])
        ends = np.cumsum([len(e.targets) for _, e in examples[part]])[:-1]
        for (r, _), values, is_best in zip(
            examples[part], np.split(logprobs, ends), np.split(greedy, ends), strict=True
        ):
            found[r.index].append((values, is_best))
        num_ended = int(np.searchsorted(last, part.stop, "right"))
        work.update(num_ended - work.done, tokens=sum(e.num_tokens for _, e in examples[part]))
    return [_score(r, found[r.index]) for r in requests]


def _score(request: ScoreRequest, found: list[tuple[NDArray[np.float64], NDArray[np.bool_]]]) -> Score:
    """Score of a request from the log-probabilities of its examples."""
    values, is_best = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    ids = np.concatenate([e.ids[e.targets] for e in request.examples])
    first = request.examples[0]
    if np.isnan(values).any():
        msg = f"request {request.index}: its log-probabilities are NaN; use another dtype or prefix"
        raise RequestError(msg, index=request.index)
    usage = {
        "prompt_tokens": len(first.ids) - len(first.targets) if first.encoder_ids is None else len(first.encoder_ids),
        "completion_tokens": len(ids),
        "prefix_rows": sum(p.num_rows for p in request.prefixes),
    }
    return Score(
        index=request.index,
        id=request.id,
        logprob=float(values.sum()),
        token_logprobs=values.tolist(),
        token_ids=ids.tolist(),
        is_greedy=bool(is_best.all()),
        prefix_digest=getattr(request.weights, "digest", None) or "+".join(p.digest for p in request.prefixes) or None,
        usage=usage,
        base_mismatch=request.base_mismatch,
    )


def _batches(lengths: list[int], token_budget: int) -> Iterator[slice]:
    """Consecutive requests of at most ``token_budget`` tokens together, at least one request each."""
    start, total = 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > token_budget:
            yield slice(start, i)
            start, total = i, 0
        total += length
    if lengths:
        yield slice(start, len(lengths))


def _target_logprobs(
    model: Model, examples: Sequence[tuple[ScoreRequest, Example]]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-probability of each target token of one packed forward, and whether the token is the most likely one."""
    # The last target is predicted, but is no input. Each target is predicted at the token before it.
    lengths = np.array([len(e.ids) - 1 for _, e in examples], np.int32)
    ids = np.concatenate([e.ids[:-1] for _, e in examples])
    starts = np.cumsum(lengths) - lengths
    at = np.concatenate([start + e.targets - 1 for start, (_, e) in zip(starts, examples, strict=True)])
    plan = _plan(model, examples, lengths).with_logits_at(torch.from_numpy(at).to(model.device))
    wanted = torch.from_numpy(np.concatenate([e.ids[e.targets] for _, e in examples]).astype(np.int64)).to(model.device)
    texts = [e.encoder_ids for _, e in examples if e.encoder_ids is not None]
    encoder_ids = torch.from_numpy(np.concatenate(texts).astype(np.int64)).to(model.device) if texts else None
    packed = _logits(model, plan, torch.from_numpy(ids.astype(np.int64)).to(model.device), encoder_ids)
    logprobs, greedy = [], []
    for logits, target in zip(packed, wanted.split(LOGITS_ROWS), strict=True):
        exact = logits.double() if logits.dtype == torch.float64 else logits.float()
        logprobs.append(exact.log_softmax(-1).gather(1, target[:, None])[:, 0].double().cpu())
        greedy.append((argmax_rows(exact) == target).cpu())
    return torch.cat(logprobs).numpy(), torch.cat(greedy).numpy()


def _plan(
    model: Model, examples: Sequence[tuple[ScoreRequest, Example]], lengths: NDArray[np.int32]
) -> Plan | Seq2SeqPlan:
    """Plan of the packed forward of examples with ``lengths`` tokens, of the decoder in an encoder-decoder base."""
    distinct = {p.digest: p for r, _ in examples for p in r.prefixes}
    number = {digest: i for i, digest in enumerate(distinct)}
    prefixes: list[Prefix] = [p.read() if isinstance(p, StoredPrefix) else p for p in distinct.values()]
    used = [[number[p.digest] for p in r.prefixes] for r, _ in examples]
    flat = np.array([n for numbers in used for n in numbers], np.int32)
    use = PrefixUse(np.cumsum([0, *map(len, used)]).astype(np.int32), flat)
    backend, device = model.backend, model.device
    if model.seq2seq is not None:
        encoder_lengths = np.array([len(e.encoder_ids) for _, e in examples if e.encoder_ids is not None], np.int32)
        sites = site_prefixes(prefixes, model)
        return seq2seq_training_plan(lengths, encoder_lengths, use, sites, backend=backend, device=device)
    return training_plan(
        lengths,
        use,
        row_table(prefixes, model),
        concat_kv(prefixes, model.layers, model.dtype, device) if prefixes else None,
        backend=backend,
        device=device,
        last_prompt_token=np.array([e.targets[0] - 1 for _, e in examples], np.int32),
    )


def _logits(model: Model, plan: Plan | Seq2SeqPlan, ids: Tensor, encoder_ids: Tensor | None) -> Iterator[Tensor]:
    """Logits ``[LOGITS_ROWS, V]`` at the plan's places. A known output head computes them one part at a time."""
    if model.head is None:
        return iter(model.forward(plan, ids, encoder_ids).split(LOGITS_ROWS))
    return map(model.head.logits, model.hidden(plan, ids, encoder_ids).split(LOGITS_ROWS))
