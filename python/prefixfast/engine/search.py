"""Choosing tokens: greedy and beam search as transformers defines them, over tensors, for requests that start and end at different times.

Shape letters: R decode rows of the engine, S requests of a step, K beams, V vocabulary, L most new tokens of a request.
State lies in tensors over all R rows and is addressed by a request's first row, so a step costs no loop over requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast.config import GenerationParams

NEVER = -1.0e9  # what transformers uses for impossible beams
PIECE = 256  # entries of the vocabulary
EARLY = {False: 0, True: 1, "never": 2}


@dataclass(frozen=True)
class Choice:
    """Outcome of a step.

    Attributes:
        tokens: ``[S * K]`` next token of each row.
        source: ``[S * K]`` row of the slot table that each row continues; None: its own.
        finished: Bool ``[S]``; None: a token says it (an end token, or the last one allowed).
    """

    tokens: Tensor
    source: Tensor | None
    finished: Tensor | None


class _Limits:
    """Length rules by first row."""

    def __init__(self, rows: int, eos: Tensor) -> None:
        self.eos = eos
        self.max_new, self.min_new, self.count = (
            torch.zeros(rows, dtype=torch.int64, device=eos.device) for _ in range(3)
        )

    def start(self, row: int, params: GenerationParams) -> None:
        self.max_new[row], self.min_new[row], self.count[row] = (
            params.max_new_tokens or 1,
            params.min_new_tokens or 0,
            0,
        )

    def hide_end(self, scores: Tensor, at: Tensor) -> None:
        """Set end tokens to -inf in ``[S, K or 1, V]`` where a request is shorter than its minimum."""
        if len(self.eos):
            early = self.count[at] < self.min_new[at]
            scores.index_copy_(
                -1, self.eos, scores.index_select(-1, self.eos).masked_fill(early[:, None, None], -torch.inf)
            )

    def ends(self, tokens: Tensor, at: Tensor) -> Tensor:
        """Which ``[S, n]`` candidate tokens end their sequence, by end token or length."""
        full = self.count[at] + 1 >= self.max_new[at]
        return torch.isin(tokens, self.eos) | full[:, None]


class Greedy:
    """The likeliest token at each step. Nothing here reads a tensor on the host, so a step can be captured.

    Args:
        rows: R.
        eos: End tokens ``[E]``, may be empty.
    """

    def __init__(self, rows: int, eos: Tensor) -> None:
        self.limits = _Limits(rows, eos)

    def start(self, row: int, params: GenerationParams) -> None:
        """A request takes its row."""
        self.limits.start(row, params)

    def step(self, logits: Tensor, at: Tensor) -> Choice:
        """Choose for requests at rows ``at`` ``[S]`` from logits ``[S, V]``."""
        scores = logits[:, None].float()
        self.limits.hide_end(scores, at)
        self.limits.count[at] += 1
        return Choice(likeliest(scores[:, 0]), None, None)


class Beam:
    """Beam search with K beams.

    Args:
        num_beams: K.
        rows: R.
        longest: L.
        eos: End tokens ``[E]``, may be empty.

    Source:
        transformers 5.23, generation/utils.py ``_beam_search`` and its helpers, whose results a single request has exactly.
    """

    def __init__(self, num_beams: int, rows: int, longest: int, eos: Tensor) -> None:
        self.k, self.limits = num_beams, _Limits(rows, eos)
        device, k = eos.device, num_beams
        self.keep = max(2, 1 + len(eos)) * k
        self.running, self.done_tokens = (
            torch.zeros(rows, k, longest, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.running_score, self.score = (torch.zeros(rows, k, device=device) for _ in range(2))
        self.done = torch.zeros(rows, k, dtype=torch.bool, device=device)
        self.length = torch.zeros(rows, k, dtype=torch.int64, device=device)
        self.hope = torch.zeros(rows, dtype=torch.bool, device=device)
        self.penalty, self.early = torch.zeros(rows, device=device), torch.zeros(rows, dtype=torch.int64, device=device)

    def start(self, row: int, params: GenerationParams) -> None:
        """A request takes the K rows from ``row`` on."""
        self.limits.start(row, params)
        self.running[row], self.done_tokens[row], self.length[row], self.done[row], self.hope[row] = (
            0,
            0,
            0,
            False,
            True,
        )
        self.running_score[row], self.running_score[row, 0], self.score[row] = NEVER, 0.0, NEVER
        self.penalty[row] = 1.0 if params.length_penalty is None else params.length_penalty
        self.early[row] = EARLY[params.early_stopping or False]

    def step(self, logits: Tensor, at: Tensor, ruled: Callable[[Tensor], None] | None = None) -> Choice:
        """Choose for requests whose first rows are ``at`` ``[S]`` from logits ``[S * K, V]``; ``ruled`` changes log-probabilities ``[S * K, V]`` in place."""
        num, k = len(at), self.k
        logp = logits.view(num, k, -1).float().log_softmax(-1)
        if ruled is not None:
            ruled(logp.view(num * k, -1))
        self.limits.hide_end(logp, at)
        total = (logp + self.running_score[at][:, :, None]).view(num, -1)
        value, index = total.topk(self.keep)
        parent, token = index // logp.shape[-1], index % logp.shape[-1]
        count = self.limits.count[at]
        used = int(count.max()) + 1
        candidates = _pick(self.running[at, :, :used], parent).scatter_(
            2, count[:, None, None].expand(-1, self.keep, 1), token[..., None]
        )
        ends = self.limits.ends(token, at)

        still = value + ends * NEVER
        chosen = still.topk(k)[1]
        running_score = _pick(still, chosen)
        self.running[at, :, :used], self.running_score[at] = _pick(candidates, chosen), running_score
        self._finish(at, candidates, value, ends)
        self.limits.count[at] += 1
        open_ = self._open(at, running_score) & ~ends.all(1)
        source = (_pick(parent, chosen) + at[:, None]).view(-1)
        return Choice(_pick(token, chosen).view(-1), source, ~open_)

    def _finish(self, at: Tensor, candidates: Tensor, value: Tensor, ends: Tensor) -> None:
        """Merge candidates that just ended, if among the best K, with those that ended before."""
        best = torch.arange(self.keep, device=at.device) < self.k
        ended, length = ends & best, self.limits.count[at] + 1
        done = self.done[at]
        value = value / length[:, None].float() ** self.penalty[at][:, None]
        full = done.all(1) & (self.early[at] == EARLY[True])
        value = value + (full[:, None] * NEVER) + (~self.hope[at][:, None] * NEVER) + (~ended * NEVER)
        score = torch.cat([self.score[at], value], 1)
        order = score.topk(self.k)[1]
        self.score[at] = _pick(score, order)
        used = candidates.shape[2]
        self.done_tokens[at, :, :used] = _pick(torch.cat([self.done_tokens[at, :, :used], candidates], 1), order)
        self.done[at] = _pick(torch.cat([done, ended], 1), order)
        self.length[at] = _pick(torch.cat([self.length[at], length[:, None].expand(-1, self.keep)], 1), order)

    def _open(self, at: Tensor, running_score: Tensor) -> Tensor:
        """Which requests can still improve."""
        penalty, early, done = self.penalty[at], self.early[at], self.done[at]
        best_length = torch.where(
            (early == EARLY["never"]) & (penalty > 0), self.limits.max_new[at], self.limits.count[at]
        )
        reachable = running_score[:, 0] / best_length.float() ** penalty
        worst = torch.where(done, self.score[at].min(1, keepdim=True)[0], NEVER)
        self.hope[at] = hope = self.hope[at] & (reachable[:, None] > worst).any(1)
        return hope & ~(done.all(1) & (early == EARLY[True]))

    def result(self, row: int, most: int = 1) -> list[tuple[list[int], float]]:
        """Tokens and scores of a request's ``most`` best finished beams; of its best running one while none has finished."""
        if bool(self.done[row].any()):
            done = range(min(most, int(self.done[row].sum())))
            return [
                (self.done_tokens[row, i, : int(self.length[row, i])].tolist(), float(self.score[row, i])) for i in done
            ]
        count = int(self.limits.count[row])
        return [
            (
                self.running[row, 0, :count].tolist(),
                float(self.running_score[row, 0] / max(count, 1) ** self.penalty[row]),
            )
        ]


def likeliest(scores: Tensor) -> Tensor:
    """The first largest entry of each row of ``[S, V]``; on a CPU the maxima of pieces come first, since `torch.argmax` does not use vectors there."""
    n = scores.shape[1] // PIECE
    if scores.device.type != "cpu" or n < 2:
        return scores.argmax(-1)
    pieces = scores[:, : n * PIECE].unflatten(1, (n, PIECE)).amax(-1)
    rest = scores[:, n * PIECE :]
    if rest.shape[1]:
        pieces = torch.cat([pieces, rest.amax(-1, keepdim=True)], 1)
    at = pieces.argmax(-1, keepdim=True) * PIECE + torch.arange(PIECE)
    return at[:, 0] + scores.gather(1, at.clamp_(max=scores.shape[1] - 1)).argmax(-1)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``[S, n]`` of ``[S, m]`` or ``[S, m, L]``."""
    return torch.take_along_dim(x, index if x.dim() == 2 else index[..., None], 1)
