"""The vocabulary tokens that are nearest to the rows of a prefix.

A prefix row holds keys and values of every layer, and only its key in the first layer can be compared to a token, since
a token's key depends on the token and its position alone there. The measure is the cosine between two vectors
``[H * D]``: the row's first-layer key over all key-value heads, and the key that a token of the vocabulary has at the
row's position, after RoPE and norms. Row i of P stands at position ``pos_start - P + i``, at least 0. Row i of the site
``enc`` stands at position i, since sources and the texts that become prefixes start at 0. A row that
`Prefix.from_text` made from a text has cosine 1 with that text's token. A row of cross-attention is no token's key.

Shape letters: P prefix rows, H key-value heads, D head dimension, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prefixfast.attention.plan import AttentionCall, Plan, plain_plan
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan, plain_seq2seq_plan
from prefixfast.config.sites import Site
from prefixfast.model.base import Model
from prefixfast.prefix.kv import kv_by_layer
from prefixfast.prefix.record import PrefixData

TOKENS_PER_CHUNK, TOKENS_PER_TEXT = 4096, 64


@torch.no_grad()
def nearest_tokens(
    model: Model, prefix: PrefixData, rows: Sequence[int], count: int, site: Site = "self"
) -> dict[int, list[tuple[int, float]]]:
    """Find the tokens of the vocabulary that are nearest to prefix rows.

    Args:
        model: Base model.
        prefix: Prefix with rows in layer 0 of the site.
        rows: Numbers of the rows.
        count: Number of tokens for each row.
        site: Site, ``"self"`` or ``"enc"``.

    Returns:
        Token ids and their cosines by row, nearest first.
    """
    wanted = kv_by_layer(prefix, model.sites[site], site)[0][0].flatten(1)
    start = 0 if site == "enc" else prefix.pos_start - len(wanted)
    last = model.max_positions if site == "self" or model.seq2seq is None else model.seq2seq.encoder_positions
    at = {row: min(max(0, start + row), last - 1) for row in rows}
    found: dict[int, list[tuple[int, float]]] = {}
    for position in sorted({*at.values()}):
        here = [row for row in rows if at[row] == position]
        query = torch.nn.functional.normalize(wanted[here].to(model.device, torch.float32), dim=1)
        scores, ids = _best(model, site, position, query, count)
        for row, own_scores, own_ids in zip(here, scores.tolist(), ids.tolist(), strict=True):
            found[row] = list(zip(own_ids, own_scores, strict=True))
    return {row: found[row] for row in rows}


def _best(model: Model, site: Site, position: int, query: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Largest cosines ``[rows, count]`` with the keys of all tokens at ``position``, and the ids of the tokens."""
    scores, ids = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.long, device=query.device)
    decoder = None if site == "enc" else model.seq2seq
    vocab_size = model.vocab_size if decoder is None else decoder.vocab_size
    for first in range(0, vocab_size, TOKENS_PER_CHUNK):
        tokens = torch.arange(first, min(first + TOKENS_PER_CHUNK, vocab_size), device=model.device)
        found = _first_layer_keys(model, tokens, position, site)
        keys = torch.nn.functional.normalize(found.float().flatten(1), dim=1)
        scores = torch.cat([scores, query @ keys.T], 1)
        ids = torch.cat([ids, tokens.expand(len(query), -1)], 1)
        scores, best = scores.topk(min(count, scores.shape[1]), dim=1)
        ids = ids.gather(1, best)
    return scores, ids


class _StopForwardError(Exception):
    """Ends a forward pass after the first layer's attention."""


def _first_layer_keys(model: Model, tokens: Tensor, position: int, site: Site) -> Tensor:
    """First-layer keys ``[n, H, D]`` of tokens, each of which stands at ``position``."""
    seen: list[Tensor] = []

    def probe(call: AttentionCall) -> None:
        if call.site == site:
            seen.append(call.k)
            raise _StopForwardError

    def placed(plan: Plan) -> Plan:
        return replace(plan, position_ids=torch.full_like(plan.position_ids, position))

    encoder_ids: Tensor | None = None
    if model.seq2seq is None:
        plan: Plan | Seq2SeqPlan = replace(
            placed(plain_plan([1] * len(tokens), backend=model.backend, device=model.device)), probe=probe
        )
    else:
        # A key of the first layer does not depend on other tokens of its sequence. Texts of several tokens need fewer
        # tokens at the other side.
        counts = [min(TOKENS_PER_TEXT, len(tokens) - i) for i in range(0, len(tokens), TOKENS_PER_TEXT)]
        other = torch.full((len(counts),), model.seq2seq.pad, device=model.device)
        lengths = ([1] * len(counts), counts) if site == "enc" else (counts, [1] * len(counts))
        pair = plain_seq2seq_plan(*lengths, backend=model.backend, device=model.device)
        assert pair.encoder is not None
        pair = (
            replace(pair, encoder=placed(pair.encoder))
            if site == "enc"
            else replace(pair, decoder=placed(pair.decoder))
        )
        plan = pair.with_probe(probe)
        tokens, encoder_ids = (other, tokens) if site == "enc" else (tokens, other)
    try:
        with model.guard.running():
            model.forward(plan, tokens, encoder_ids)
    except _StopForwardError:
        return seen[0]
    msg = "the first layer's attention was never reached"
    raise AssertionError(msg)
