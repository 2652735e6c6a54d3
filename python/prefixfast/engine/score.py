"""`Score`: log-probabilities of given targets, in packed forwards with the prefixes in place; nothing is generated.

Shape letters: S sequences, N packed tokens, T target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast.attention.plan import Plan, training_plan
from prefixfast.data.encode import Input, encode_target, request_error
from prefixfast.engine.request import Request
from prefixfast.engine.search import likeliest
from prefixfast.errors import ConfigError, RequestError
from prefixfast.model.base import Model
from prefixfast.model.lm_head import packed_hidden
from prefixfast.prefix.kv import concat_kv, row_table
from prefixfast.store import StoredPrefix

PIECE = 256  # rows of logits at a time
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Score:
    """Log-probabilities (natural log) of one request's target.

    Attributes:
        index: Place in the batch.
        id: The request's ``id``, if it had one.
        logprob: Of the whole target: the sum of ``token_logprobs``.
        token_logprobs: Of each token given all before it.
        token_ids: The target's tokens.
        is_greedy: Whether every token is the likeliest one.
        prefix_digest: Digests of the request's prefixes, joined by "+"; None without one.
        usage: ``prompt_tokens``, ``completion_tokens``, ``prefix_rows``.
    """

    index: int
    id: Any
    logprob: float
    token_logprobs: list[float]
    token_ids: list[int]
    is_greedy: bool
    prefix_digest: str | None
    usage: dict[str, int]


def target_ids(
    model: Model,
    batch: Sequence[Input],
    requests: list[Request],
    targets: Sequence[str | list[int]] | None,
    *,
    end_token: bool,
) -> list[Ints]:
    """Tokens of every request's target: as given, or from the row.

    Raises:
        ConfigError: If there is not one target for each request.
        RequestError: For a request without a target, or one that does not fit.
    """
    if targets is not None and (isinstance(targets, str) or len(targets) != len(batch)):
        got = repr(targets[:40]) if isinstance(targets, str) else str(len(targets))
        msg = f"targets: expected one entry for each of the {len(batch)} requests, got {got}"
        raise ConfigError(msg)
    given: list[Any] = (
        [_own_target(item, r) for item, r in zip(batch, requests, strict=True)] if targets is None else list(targets)
    )
    end = [model.require_tokenizer().eos_id] if end_token else []
    out = []
    for r, target in zip(requests, given, strict=True):
        ids = encode_target(model, target, r.index).tolist()
        ids = ids + [e for e in end if e is not None]
        room = (
            model.max_positions - max((p.pos_start for p in r.prefixes), default=0) - len(r.ids) + 1
        )  # the last token is only predicted
        if not ids or len(ids) > room:
            msg = f"request {r.index}: target: expected 1 to {room} tokens below {model.vocab_size}, got {len(ids)} of {target!r:.80}"
            raise RequestError(msg, index=r.index)
        out.append(np.array(ids, np.int32))
    return out


def _own_target(item: Input, request: Request) -> str:
    with request_error(request.index):
        found = request.task.targets(item, 0) if isinstance(item, Mapping) and "input_ids" not in item else []
    if len(found) != 1:
        msg = f"request {request.index}: expected one target in the row or targets=[...], got {len(found)}"
        raise RequestError(msg, index=request.index)
    return found[0]


@torch.inference_mode()
def score(model: Model, requests: list[Request], targets: list[Ints], token_budget: int) -> list[Score]:
    """Scores of requests in order.

    Args:
        model: The base.
        requests: Checked.
        targets: int32, tokens of each one's target.
        token_budget: Most tokens of one forward, but at least one request.
    """
    out: list[Score] = []
    for part in _parts([len(r.ids) + len(t) for r, t in zip(requests, targets, strict=True)], token_budget):
        own, wanted = requests[part], targets[part]
        logprobs, best = _forward(model, own, wanted)
        ends = np.cumsum([len(t) for t in wanted])[:-1]
        for r, t, some, likely in zip(own, wanted, np.split(logprobs, ends), np.split(best, ends), strict=True):
            usage = {
                "prompt_tokens": len(r.ids),
                "completion_tokens": len(t),
                "prefix_rows": sum(p.length for p in r.prefixes),
            }
            digest = "+".join(p.digest for p in r.prefixes) or None
            out.append(
                Score(r.index, r.id, float(some.sum()), some.tolist(), t.tolist(), bool(likely.all()), digest, usage)
            )
    return out


def _parts(lengths: list[int], budget: int) -> Iterator[slice]:
    start, total = 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > budget:
            yield slice(start, i)
            start, total = i, 0
        total += length
    if lengths:
        yield slice(start, len(lengths))


def _forward(
    model: Model, requests: list[Request], targets: list[Ints]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-probabilities of all target tokens of one packed forward, and whether each is the likeliest."""
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
    plan = training_plan(
        lengths, indptr, flat, row_table(prefixes, len(model.layers)), kv, backend=model.backend, device=model.device
    )
    plan = plan.with_logits_at(torch.from_numpy(at).to(model.device))
    wanted = torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(model.device)
    logprobs, best = [], []
    for logits, target in zip(
        _logits(model, plan, torch.from_numpy(ids.astype(np.int64)).to(model.device)), wanted.split(PIECE), strict=True
    ):
        exact = logits.double() if logits.dtype == torch.float64 else logits.float()
        logprobs.append(exact.log_softmax(-1).gather(1, target[:, None])[:, 0].double().cpu())
        best.append((likeliest(exact) == target).cpu())
    return torch.cat(logprobs).numpy(), torch.cat(best).numpy()


def _logits(model: Model, plan: Plan, ids: Tensor) -> Iterator[Tensor]:
    """Logits at the plan's places, some rows at a time where the output layer is a plain one."""
    if model.head is None:
        return iter(model.forward(plan, ids).split(PIECE))
    return map(model.head.logits, packed_hidden(model.hf, plan, ids).split(PIECE))
