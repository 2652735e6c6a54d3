"""Drawing tokens: temperature, top-k, top-p and min-p as transformers defines them, for rows with parameters of their own.

Which tokens may be drawn is decided by values alone (ties stay together), and a row's random number depends on its seed and on how many tokens it has, so
that a row's text does not depend on the batch.

Shape letters: R decode rows of the engine, S rows of a step, V vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from prefixfast.config import GenerationParams
from prefixfast.counter_rng import uniform

FIRST = 1024  # tokens that a top-p looks at before it sorts the whole vocabulary
PIECE = 256  # tokens summed before one of them is looked for


class Sampler:
    """Parameters by row.

    Args:
        rows: R.
        device: Where they lie.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.seed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.temperature, self.top_p, self.min_p = (
            torch.zeros(rows, dtype=torch.float32, device=device) for _ in range(3)
        )
        self.top_k = torch.zeros(rows, dtype=torch.int64, device=device)

    def start(self, row: int, params: GenerationParams, number: int) -> None:
        """A request's sample takes a row.

        Args:
            row: Which.
            params: Resolved, with a seed.
            number: Of the sample in its request.
        """
        seed = params.seed or 0
        self.seed[row] = (
            seed
            if number == 0
            else int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=7).digest())
        )
        self.temperature[row], self.top_k[row] = params.temperature or 1.0, params.top_k or 0
        self.top_p[row], self.min_p[row] = params.top_p or 1.0, params.min_p or 0.0

    def draw(self, scores: Tensor, at: Tensor, counts: Tensor) -> Tensor:
        """Tokens ``[S]`` of rows ``at`` ``[S]`` from scores ``[S, V]`` (fp32, after all rules); ``counts`` ``[S]``: tokens that each row has."""
        kept = scores / self.temperature[at][:, None]
        kept = keep_top_k(kept, self.top_k[at])
        kept = keep_top_p(kept, self.top_p[at])
        kept = keep_min_p(kept, self.min_p[at])
        return inverse(kept.softmax(-1), uniform(self.seed[at], counts))


def keep_top_k(scores: Tensor, k: Tensor) -> Tensor:
    """Scores ``[S, V]``, -inf where less than the row's k-th largest; ``k`` int64 ``[S]``, 0: all stay."""
    most = min(int(k.max()), scores.shape[1])
    if most == 0:
        return scores
    least = scores.topk(most)[0].gather(1, (k.clamp(1, most) - 1)[:, None])
    return scores.masked_fill((scores < least) & (k > 0)[:, None], -torch.inf)


def keep_top_p(scores: Tensor, p: Tensor) -> Tensor:
    """Scores ``[S, V]``, -inf where the more likely tokens together have at least probability ``p`` ``[S]`` already; at 1 all stay."""
    rows = (p < 1).nonzero()[:, 0]
    if not len(rows):
        return scores
    own, share = scores[rows], p[rows]
    probability = own.softmax(-1)
    least, found = _least(probability, share, min(FIRST, scores.shape[1]))
    if not bool(found.all()):
        rest = (~found).nonzero()[:, 0]
        least[rest] = _least(probability[rest], share[rest], scores.shape[1])[0]
    return scores.index_copy(0, rows, own.masked_fill(probability < least, -torch.inf))


def _least(probability: Tensor, share: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The smallest probability ``[n, 1]`` that stays, looking at the ``first`` largest, and bool ``[n]``: whether they were enough."""
    largest = probability.topk(first)[0]
    before = largest.double().cumsum(-1) - largest
    stays = before < share[:, None]
    least = largest.gather(1, stays.sum(-1, keepdim=True).clamp(min=1) - 1)
    return least, ~stays[:, -1] | (first == probability.shape[1])


def keep_min_p(scores: Tensor, p: Tensor) -> Tensor:
    """Scores ``[S, V]``, -inf where less than ``p`` ``[S]`` times as likely as the row's likeliest."""
    if not bool(p.any()):
        return scores
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + p.log()[:, None], -torch.inf)


def inverse(probability: Tensor, u: Tensor) -> Tensor:
    """The token ``[S]`` at which the sum of ``probability`` ``[S, V]`` in the vocabulary's order exceeds the share ``u`` ``[S]`` of the whole.

    Never one of probability 0.
    """
    whole = probability.shape[1] // PIECE * PIECE
    sums = probability[:, :whole].unflatten(1, (-1, PIECE)).sum(-1, dtype=torch.float64)
    sums = torch.cat([sums, probability[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)], 1)
    piece, rest = _first_over(sums, u.double(), share=True)
    at = piece[:, None] * PIECE + torch.arange(PIECE, device=piece.device)
    own = probability.gather(1, at.clamp(max=probability.shape[1] - 1)).double()
    token, _ = _first_over(own.masked_fill(at >= probability.shape[1], 0.0), rest, share=False)
    return piece * PIECE + token


def _first_over(weights: Tensor, target: Tensor, *, share: bool) -> tuple[Tensor, Tensor]:
    """The first place ``[S]`` of ``[S, n]`` where the running sum exceeds the target (or that share of the sum), and what the target has left there."""
    sums = weights.cumsum(-1)
    target = (target * sums[:, -1] if share else target)[:, None]
    last = (weights > 0).long().cumsum(-1).argmax(-1)  # rounding may leave the target at the very end
    place = torch.minimum((sums <= target.clamp(min=0)).sum(-1), last)
    return place, target[:, 0] - (sums.gather(1, place[:, None]) - weights.gather(1, place[:, None]))[:, 0]
