"""Which vocabulary tokens the rows of a prefix resemble.

A prefix row is no word: it holds keys and values of every layer. What can be compared is its key in the FIRST layer, since there a token's key depends on the
token and its position alone. The measure is the cosine between the row's first-layer key, all kv heads as one vector ``[H * D]``, and the first-layer key that
each token of the vocabulary would have at the row's position (row i of P stands at position pos_start - P + i, at least 0), after RoPE and norms.
A row made from a text by `Prefix.from_text` has cosine 1 with that text's token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prefixfast.attention.plan import AttentionCall, plain_plan
from prefixfast.model.base import Model
from prefixfast.prefix.record import PrefixData

CHUNK = 4096


@torch.no_grad()
def nearest_tokens(
    model: Model, prefix: PrefixData, rows: Sequence[int], count: int
) -> dict[int, list[tuple[int, float]]]:
    """The ``count`` tokens of the vocabulary that are nearest to each of these rows, by the measure above, nearest first.

    Returns:
        By row: token ids and cosines.
    """
    wanted = prefix.kv["self.0.k"].flatten(1)
    start = prefix.pos_start - len(wanted)
    found: dict[int, list[tuple[int, float]]] = {}
    for position in sorted({max(0, start + row) for row in rows}):
        here = [row for row in rows if max(0, start + row) == position]
        query = torch.nn.functional.normalize(wanted[here].to(model.device, torch.float32), dim=1)
        scores, ids = _best(model, position, query, count)
        for row, own_scores, own_ids in zip(here, scores.tolist(), ids.tolist(), strict=True):
            found[row] = list(zip(own_ids, own_scores, strict=True))
    return {row: found[row] for row in rows}


def _best(model: Model, position: int, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Largest cosines ``[rows, count]`` with the keys of all tokens at ``position``, and the tokens."""
    scores, ids = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.long, device=query.device)
    for first in range(0, model.vocab_size, CHUNK):
        tokens = torch.arange(first, min(first + CHUNK, model.vocab_size), device=model.device)
        keys = torch.nn.functional.normalize(_first_keys(model, tokens, position).float().flatten(1), dim=1)
        scores = torch.cat([scores, query @ keys.T], 1)
        ids = torch.cat([ids, tokens.expand(len(query), -1)], 1)
        scores, best = scores.topk(min(count, scores.shape[1]), dim=1)
        ids = ids.gather(1, best)
    return scores, ids


class _FoundError(Exception):
    """Ends a forward after the first layer's attention."""


def _first_keys(model: Model, tokens: Tensor, position: int) -> Tensor:
    """First-layer keys ``[n, H, D]`` of tokens that each stand alone at ``position``."""
    seen: list[Tensor] = []

    def probe(call: AttentionCall) -> None:
        seen.append(call.k)
        raise _FoundError

    plan = plain_plan([1] * len(tokens), backend=model.backend, device=model.device)
    plan = replace(plan, position_ids=torch.full_like(plan.position_ids, position), probe=probe)
    try:
        model.forward(plan, tokens)
    except _FoundError:
        return seen[0]
    msg = "the first layer's attention was never reached"
    raise AssertionError(msg)
