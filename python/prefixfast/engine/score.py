"""`Score`, the log-probabilities of given targets, from packed forwards with the prefixes in place.

Shape letters: N packed tokens, T target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast.attention.plan import Plan, PrefixUse, training_plan
from prefixfast.config.json_types import JSON
from prefixfast.data.encode import Input, Ints, encode_target, request_error
from prefixfast.engine.request import Request
from prefixfast.engine.search import argmax_rows
from prefixfast.errors import ConfigError, RequestError
from prefixfast.model.base import Model
from prefixfast.model.lm_head import packed_hidden
from prefixfast.prefix.kv import concat_kv, row_table
from prefixfast.store import StoredPrefix

LOGITS_ROWS = 256  # rows of logits computed at once


@dataclass(frozen=True)
class Score:
    """Log-probabilities (natural log) of one request's target.

    Attributes:
        index: Place of the request in the batch, from 0.
        id: Value of the request's ``id`` key, None without one.
        logprob: Log-probability of the whole target, the sum of ``token_logprobs``.
        token_logprobs: Log-probability of each target token, given all tokens before it.
        token_ids: Token ids of the target.
        is_greedy: Whether each target token is the most likely one.
        prefix_digest: Digests of the request's prefixes, joined by "+", None without a prefix.
        usage: Counts ``prompt_tokens``, ``completion_tokens`` and ``prefix_rows``.
    """

    index: int
    id: JSON
    logprob: float
    token_logprobs: list[float]
    token_ids: list[int]
    is_greedy: bool
    prefix_digest: str | None
    usage: dict[str, int]


def encode_targets(
    model: Model,
    batch: Sequence[Input],
    requests: list[Request],
    targets: Sequence[str | Sequence[int]] | None,
    *,
    end_token: bool,
) -> list[Ints]:
    """Token ids of each request's target.

    Args:
        model: Base model.
        batch: Requests as the caller gave them.
        requests: Checked requests.
        targets: Target of each request, text or token ids. None takes the targets of the rows.
        end_token: Whether the end token follows each target.

    Raises:
        ConfigError: If there is not one target for each request.
        RequestError: For a request without a target, or with one that does not fit.
    """
    if targets is not None and (isinstance(targets, str) or len(targets) != len(batch)):
        got = repr(targets[:40]) if isinstance(targets, str) else str(len(targets))
        msg = f"targets: expected one entry for each of the {len(batch)} requests, got {got}"
        raise ConfigError(msg)
    if targets is None:
        targets = [_row_target(item, r) for item, r in zip(batch, requests, strict=True)]
    end = [model.require_tokenizer().eos_id] if end_token else []
    out = []
    for r, target in zip(requests, targets, strict=True):
        ids = encode_target(model, target, r.index).tolist()
        ids = ids + [e for e in end if e is not None]
        # The last target token is predicted, but takes no position.
        room = model.max_positions - max((p.pos_start for p in r.prefixes), default=0) - len(r.ids) + 1
        if not ids or len(ids) > room:
            msg = (
                f"request {r.index}: target: expected 1 to {room} tokens below {model.vocab_size}, got {len(ids)} of "
                f"{target!r:.80}"
            )
            raise RequestError(msg, index=r.index)
        out.append(np.array(ids, np.int32))
    return out


def _row_target(item: Input, request: Request) -> str:
    """The only target of a row."""
    with request_error(request.index):
        found = request.task.targets(item, 0) if isinstance(item, Mapping) and "input_ids" not in item else []
    if len(found) != 1:
        msg = f"request {request.index}: expected one target in the row or targets=[...], got {len(found)}"
        raise RequestError(msg, index=request.index)
    return found[0]


@torch.inference_mode()
def score_requests(model: Model, requests: list[Request], targets: list[Ints], token_budget: int) -> list[Score]:
    """Scores of requests, in their order.

    Args:
        model: Base model.
        requests: Checked requests.
        targets: Token ids of each request's target, int32.
        token_budget: Largest number of tokens of one forward. A longer request gets a forward of its own.
    """
    scores: list[Score] = []
    for part in _batches([len(r.ids) + len(t) for r, t in zip(requests, targets, strict=True)], token_budget):
        own, wanted = requests[part], targets[part]
        logprobs, greedy = _target_logprobs(model, own, wanted)
        ends = np.cumsum([len(t) for t in wanted])[:-1]
        for r, t, values, is_best in zip(own, wanted, np.split(logprobs, ends), np.split(greedy, ends), strict=True):
            usage = {
                "prompt_tokens": len(r.ids),
                "completion_tokens": len(t),
                "prefix_rows": sum(p.length for p in r.prefixes),
            }
            scores.append(
                Score(
                    index=r.index,
                    id=r.id,
                    logprob=float(values.sum()),
                    token_logprobs=values.tolist(),
                    token_ids=t.tolist(),
                    is_greedy=bool(is_best.all()),
                    prefix_digest="+".join(p.digest for p in r.prefixes) or None,
                    usage=usage,
                )
            )
    return scores


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
    model: Model, requests: list[Request], targets: list[Ints]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-probability of each target token of one packed forward, and whether the token is the most likely one."""
    distinct = {p.digest: p for r in requests for p in r.prefixes}
    number = {digest: i for i, digest in enumerate(distinct)}
    prefixes = [p.read() if isinstance(p, StoredPrefix) else p for p in distinct.values()]
    kv = concat_kv(prefixes, model.layers, model.dtype, model.device) if prefixes else None
    used = [[number[p.digest] for p in r.prefixes] for r in requests]
    indptr = np.cumsum([0, *map(len, used)]).astype(np.int32)
    lengths = np.array([len(r.ids) + len(t) - 1 for r, t in zip(requests, targets, strict=True)], np.int32)
    ids = np.concatenate([np.concatenate([r.ids, t[:-1]]) for r, t in zip(requests, targets, strict=True)])
    ends = np.cumsum(lengths)
    at = np.concatenate([np.arange(end - len(t), end) for end, t in zip(ends, targets, strict=True)])
    flat = np.array([n for numbers in used for n in numbers], np.int32)
    rows = row_table(prefixes, len(model.layers))
    plan = training_plan(lengths, PrefixUse(indptr, flat), rows, kv, backend=model.backend, device=model.device)
    plan = plan.with_logits_at(torch.from_numpy(at).to(model.device))
    wanted = torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(model.device)
    packed = _logits(model, plan, torch.from_numpy(ids.astype(np.int64)).to(model.device))
    logprobs, greedy = [], []
    for logits, target in zip(packed, wanted.split(LOGITS_ROWS), strict=True):
        exact = logits.double() if logits.dtype == torch.float64 else logits.float()
        logprobs.append(exact.log_softmax(-1).gather(1, target[:, None])[:, 0].double().cpu())
        greedy.append((argmax_rows(exact) == target).cpu())
    return torch.cat(logprobs).numpy(), torch.cat(greedy).numpy()


def _logits(model: Model, plan: Plan, ids: Tensor) -> Iterator[Tensor]:
    """Logits ``[LOGITS_ROWS, V]`` at the plan's places. A known output head computes them one part at a time."""
    if model.head is None:
        return iter(model.forward(plan, ids).split(LOGITS_ROWS))
    return map(model.head.logits, packed_hidden(model.hf, plan, ids).split(LOGITS_ROWS))
