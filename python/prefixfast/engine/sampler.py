"""Sampling with temperature, top-k, top-p and min-p as in transformers, for rows with parameters of their own.

The tokens that a row can draw depend on their scores alone, so equally likely tokens are kept or removed together. The
random number of a row depends on its seed and on its number of generated tokens. The text of a row therefore does not
depend on the other rows of the batch.

Shape letters: R decode rows of the engine, S rows of a step, V vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from prefixfast.config import GenerationParams
from prefixfast.counter_rng import uniform
from prefixfast.engine.search import NO_TOKEN

TOP_P_CANDIDATES = 1024  # most likely tokens that top-p looks at before it sorts the whole vocabulary
CHUNK = 256  # entries of the vocabulary whose probabilities are summed before one of them is searched


class Sampler:
    """Sampling parameters of all decode rows.

    Args:
        rows: Number of decode rows R.
        device: Device of the parameters.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.seed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.temperature, self.top_p, self.min_p = (
            torch.zeros(rows, dtype=torch.float32, device=device) for _ in range(3)
        )
        self.top_k = torch.zeros(rows, dtype=torch.int64, device=device)

    def set_row(self, row: int, params: GenerationParams, sample: int) -> None:
        """Set the parameters of a row.

        Args:
            row: Decode row.
            params: Resolved parameters with a seed.
            sample: Number of the sample in its request, from 0.
        """
        seed = params.seed or 0
        if sample:
            seed = int.from_bytes(hashlib.blake2b(f"{seed} {sample}".encode(), digest_size=7).digest())
        self.seed[row] = seed
        self.temperature[row], self.top_k[row] = params.temperature or 1.0, params.top_k or 0
        self.top_p[row], self.min_p[row] = params.top_p or 1.0, params.min_p or 0.0

    def draw(self, scores: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
        """Draw a token for each row.

        Args:
            scores: Scores ``[S, V]`` after all logits processors, fp32.
            rows: Decode rows ``[S]``.
            counts: Number of generated tokens of each row ``[S]``.

        Returns:
            Tokens ``[S]``, `NO_TOKEN` where no token is possible.
        """
        scores = scores / self.temperature[rows][:, None]
        scores = keep_top_k(scores, self.top_k[rows])
        scores = keep_top_p(scores, self.top_p[rows])
        scores = keep_min_p(scores, self.min_p[rows])
        probability = scores.softmax(-1)
        tokens = sample_inverse_cdf(probability, uniform(self.seed[rows], counts))
        possible = probability.gather(1, tokens[:, None])[:, 0] > 0  # false for NaN
        return tokens.masked_fill(~possible, NO_TOKEN)


def keep_top_k(scores: Tensor, k: Tensor) -> Tensor:
    """Set scores below the k-th largest one of their row to -inf.

    Args:
        scores: Scores ``[S, V]``.
        k: Number of tokens to keep, int64 ``[S]``; 0 keeps all.
    """
    largest_k = min(int(k.max()), scores.shape[1])
    if largest_k == 0:
        return scores
    smallest = scores.topk(largest_k)[0].gather(1, (k.clamp(1, largest_k) - 1)[:, None])
    return scores.masked_fill((scores < smallest) & (k > 0)[:, None], -torch.inf)


def keep_top_p(scores: Tensor, p: Tensor) -> Tensor:
    """Set scores to -inf where the more likely tokens of the row have at least probability ``p`` together.

    Args:
        scores: Scores ``[S, V]``.
        p: Total probability to keep ``[S]``; 1 keeps all tokens.
    """
    rows = (p < 1).nonzero()[:, 0]
    if not len(rows):
        return scores
    own, share = scores[rows], p[rows]
    probability = own.softmax(-1)
    smallest, enough = _smallest_kept(probability, share, min(TOP_P_CANDIDATES, scores.shape[1]))
    if not bool(enough.all()):
        rest = (~enough).nonzero()[:, 0]
        smallest[rest] = _smallest_kept(probability[rest], share[rest], scores.shape[1])[0]
    return scores.index_copy(0, rows, own.masked_fill(probability < smallest, -torch.inf))


def _smallest_kept(probability: Tensor, share: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Smallest probability that top-p keeps, searched among the most likely tokens.

    Args:
        probability: Probabilities ``[n, V]``.
        share: Total probability to keep ``[n]``.
        candidates: Number of most likely tokens to search.

    Returns:
        Smallest kept probability ``[n, 1]``, and whether the candidates were enough, bool ``[n]``.
    """
    largest = probability.topk(candidates)[0]
    before = largest.double().cumsum(-1) - largest
    kept = before < share[:, None]
    smallest = largest.gather(1, kept.sum(-1, keepdim=True).clamp(min=1) - 1)
    return smallest, ~kept[:, -1] | (candidates == probability.shape[1])


def keep_min_p(scores: Tensor, p: Tensor) -> Tensor:
    """Set scores of tokens that are less than ``p`` times as likely as the row's most likely token to -inf.

    Args:
        scores: Scores ``[S, V]``.
        p: Share of the largest probability ``[S]``; 0 keeps all tokens.
    """
    if not bool(p.any()):
        return scores
    return scores.masked_fill(scores < scores.amax(-1, keepdim=True) + p.log()[:, None], -torch.inf)


def sample_inverse_cdf(probability: Tensor, u: Tensor) -> Tensor:
    """Draw a token per row by inversion of the cumulative distribution, in the order of the vocabulary.

    Args:
        probability: Probabilities ``[S, V]``.
        u: Random numbers ``[S]`` from 0 to 1.

    Returns:
        First token ``[S]`` at which the cumulative probability exceeds the share ``u`` of the total. Its probability is
        never 0.
    """
    whole = probability.shape[1] // CHUNK * CHUNK
    sums = probability[:, :whole].unflatten(1, (-1, CHUNK)).sum(-1, dtype=torch.float64)
    sums = torch.cat([sums, probability[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)], 1)
    chunk, rest = _first_above(sums, u.double(), share=True)
    at = chunk[:, None] * CHUNK + torch.arange(CHUNK, device=chunk.device)
    own = probability.gather(1, at.clamp(max=probability.shape[1] - 1)).double()
    token, _ = _first_above(own.masked_fill(at >= probability.shape[1], 0.0), rest, share=False)
    return chunk * CHUNK + token


def _first_above(weights: Tensor, target: Tensor, *, share: bool) -> tuple[Tensor, Tensor]:
    """First place where the running sum of a row exceeds a target.

    Args:
        weights: Weights ``[S, n]``.
        target: Target ``[S]``.
        share: Whether the target is a share of the row's sum.

    Returns:
        Place ``[S]``, and the rest of the target ``[S]`` after the weights before that place.
    """
    sums = weights.cumsum(-1)
    target = (target * sums[:, -1] if share else target)[:, None]
    # Rounding can leave the target at the very end of the sums, behind the last weight above 0.
    last = (weights > 0).long().cumsum(-1).argmax(-1)
    place = torch.minimum((sums <= target.clamp(min=0)).sum(-1), last)
    return place, target[:, 0] - (sums.gather(1, place[:, None]) - weights.gather(1, place[:, None]))[:, 0]
