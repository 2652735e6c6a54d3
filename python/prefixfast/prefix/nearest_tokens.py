"""The vocabulary tokens that are nearest to the rows of a prefix.

A prefix row holds keys and values of every layer, and only its key in the first layer can be compared to a token, since
a token's key depends on the token and its position alone there. The measure is the cosine between two vectors
``[H * D]``: the row's first-layer key over all key-value heads, and the key that a token of the vocabulary has at the
row's position, after RoPE and norms. Row i of P stands at position ``pos_start - P + i``, at least 0. A row that
`Prefix.from_text` made from a text has cosine 1 with that text's token.

Shape letters: P prefix rows, H key-value heads, D head dimension, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prefixfast.attention.plan import AttentionCall, plain_plan
from prefixfast.model.base import Model
from prefixfast.prefix.kv import kv_by_layer
from prefixfast.prefix.record import PrefixData

TOKENS_PER_CHUNK = 4096


@torch.no_grad()
def nearest_tokens(
    model: Model, prefix: PrefixData, rows: Sequence[int], count: int
) -> dict[int, list[tuple[int, float]]]:
    """Find the tokens of the vocabulary that are nearest to prefix rows.

    Args:
        model: Base model.
        prefix: Prefix with rows in layer 0.
        rows: Numbers of the rows.
        count: Number of tokens for each row.

    Returns:
        Token ids and their cosines by row, nearest first.
    """
    wanted = kv_by_layer(prefix, model.layers)[0][0].flatten(1)
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
    """Largest cosines ``[rows, count]`` with the keys of all tokens at ``position``, and the ids of the tokens."""
    scores, ids = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.long, device=query.device)
    for first in range(0, model.vocab_size, TOKENS_PER_CHUNK):
        tokens = torch.arange(first, min(first + TOKENS_PER_CHUNK, model.vocab_size), device=model.device)
        keys = torch.nn.functional.normalize(_first_layer_keys(model, tokens, position).float().flatten(1), dim=1)
        scores = torch.cat([scores, query @ keys.T], 1)
        ids = torch.cat([ids, tokens.expand(len(query), -1)], 1)
        scores, best = scores.topk(min(count, scores.shape[1]), dim=1)
        ids = ids.gather(1, best)
    return scores, ids


class _StopForwardError(Exception):
    """Ends a forward pass after the first layer's attention."""


def _first_layer_keys(model: Model, tokens: Tensor, position: int) -> Tensor:
    """First-layer keys ``[n, H, D]`` of tokens, each of which stands alone at ``position``."""
    seen: list[Tensor] = []

    def probe(call: AttentionCall) -> None:
        seen.append(call.k)
        raise _StopForwardError

    plan = plain_plan([1] * len(tokens), backend=model.backend, device=model.device)
    plan = replace(plan, position_ids=torch.full_like(plan.position_ids, position), probe=probe)
    try:
        with model.guard.running():
            model.forward(plan, tokens)
    except _StopForwardError:
        return seen[0]
    msg = "the first layer's attention was never reached"
    raise AssertionError(msg)
