"""Greedy and beam search as transformers defines them, for requests that start and end at different times.

The state of all requests lies in tensors over the R decode rows, at the first row of each request. A step therefore
needs no loop over requests.

Shape letters: R decode rows of the engine, S requests of a step, K beams, V vocabulary, L largest number of new tokens
of a request, E end tokens, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast.config import GenerationParams
from prefixfast.engine.best_tokens import best_tokens

IMPOSSIBLE = -1.0e9  # transformers' score of impossible beams
CHUNK = 256  # entries of the vocabulary whose maximum is taken at once
NO_TOKEN = -1  # choice of a row in which no token is possible
EARLY_STOPPING = {False: 0, True: 1, "never": 2}


@dataclass(frozen=True)
class Choice:
    """Tokens that a step has chosen.

    Attributes:
        tokens: Next token of each row ``[S * K]``; `NO_TOKEN` in greedy search if none is possible.
        sources: Decode row that each row continues ``[S * K]``, None if each row continues itself.
        finished: Whether each request has ended, bool ``[S]``. None if the tokens alone tell: an end token, or the last
            token that is allowed.
    """

    tokens: Tensor
    sources: Tensor | None
    finished: Tensor | None


class _LengthLimits:
    """Smallest and largest number of new tokens, tokens that are forced there, and the number of tokens so far.

    All of them are kept by the first row of each request.
    """

    def __init__(self, rows: int, end_ids: Tensor) -> None:
        self.end_ids = end_ids
        self.max_new, self.min_new, self.count, self.first, self.last = (
            torch.full((rows,), number, dtype=torch.int64, device=end_ids.device)
            for number in (0, 0, 0, NO_TOKEN, NO_TOKEN)
        )
        self.forces = False  # whether a request ever forced a token, which those of decoder-only bases never do

    def set_row(self, row: int, params: GenerationParams) -> None:
        self.max_new[row] = params.max_new_tokens or 1
        self.min_new[row] = params.min_new_tokens or 0
        self.count[row] = 0
        forced = [
            NO_TOKEN if token is None else token for token in (params.forced_bos_token_id, params.forced_eos_token_id)
        ]
        self.forces = self.forces or max(forced) != NO_TOKEN
        if self.forces:
            self.first[row], self.last[row] = forced

    def apply(self, scores: Tensor, rows: Tensor) -> None:
        """Leave the end tokens out of scores ``[S, K or 1, V]`` where they are too early, and all but a forced token.

        A forced token has the score 0 and all others have -inf, as in transformers.
        """
        self.mask_end_tokens(scores, rows)
        if self.forces:
            at, forced = self._forced(rows)
            scores[at] = -torch.inf
            scores[at, :, forced] = 0.0

    def apply_to_best(self, scores: Tensor, tokens: Tensor, rows: Tensor) -> None:
        """Do the same as `apply` with the best tokens ``[S, K, C]`` of beams and their scores, in place."""
        too_short = self.count[rows] < self.min_new[rows]
        scores.masked_fill_(too_short[:, None, None] & torch.isin(tokens, self.end_ids), -torch.inf)
        if self.forces:
            at, forced = self._forced(rows)
            scores[at] = -torch.inf
            scores[at, :, 0], tokens[at, :, 0] = 0.0, forced[:, None]

    def _forced(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Requests whose next token is forced, as places in ``rows``, and their tokens."""
        count = self.count[rows]
        forced = torch.where(count + 1 == self.max_new[rows], self.last[rows], NO_TOKEN)
        # The last token takes precedence over the first one where a request has one token.
        forced = torch.where((count == 0) & (forced == NO_TOKEN), self.first[rows], forced)
        at = (forced != NO_TOKEN).nonzero()[:, 0]
        return at, forced[at]

    def mask_end_tokens(self, scores: Tensor, rows: Tensor) -> None:
        """Set the scores of end tokens in ``[S, K or 1, V]`` to -inf for requests below their minimum length."""
        if len(self.end_ids):
            too_short = self.count[rows] < self.min_new[rows]
            masked = scores.index_select(-1, self.end_ids).masked_fill(too_short[:, None, None], -torch.inf)
            scores.index_copy_(-1, self.end_ids, masked)

    def is_last(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Whether each candidate token ``[S, n]`` ends its sequence, as an end token or by length."""
        at_limit = self.count[rows] + 1 >= self.max_new[rows]
        return torch.isin(tokens, self.end_ids) | at_limit[:, None]


class GreedySearch:
    """Greedy search. A step reads no tensor on the host, so a CUDA graph can capture it.

    Args:
        rows: Number of decode rows R.
        end_ids: End tokens ``[E]``, can be empty.
    """

    def __init__(self, rows: int, end_ids: Tensor) -> None:
        self.limits = _LengthLimits(rows, end_ids)

    def start(self, row: int, params: GenerationParams) -> None:
        """Start a request.

        Args:
            row: Decode row of the request.
            params: Resolved parameters.
        """
        self.limits.set_row(row, params)

    def step(self, logits: Tensor, rows: Tensor) -> Choice:
        """Choose the most likely token of each row.

        Args:
            logits: Logits ``[S, V]``.
            rows: Decode rows ``[S]``.
        """
        scores = logits[:, None].float()
        self.limits.apply(scores, rows)
        self.limits.count[rows] += 1
        return Choice(most_likely(scores[:, 0]), None, None)


class BeamSearch:
    """Beam search with K beams.

    A request alone gives exactly the results of ``_beam_search`` and its helpers in transformers 5.23,
    generation/utils.py.

    Args:
        num_beams: Number of beams K.
        rows: Number of decode rows R.
        max_len: Largest number of new tokens L.
        end_ids: End tokens ``[E]``, can be empty.
    """

    def __init__(self, num_beams: int, rows: int, max_len: int, end_ids: Tensor) -> None:
        self.k, self.limits = num_beams, _LengthLimits(rows, end_ids)
        device, k = end_ids.device, num_beams
        self.num_candidates = max(2, 1 + len(end_ids)) * k
        self.running_tokens, self.finished_tokens = (
            torch.zeros(rows, k, max_len, dtype=torch.int64, device=device) for _ in range(2)
        )
        self.running_score, self.finished_score = (torch.zeros(rows, k, device=device) for _ in range(2))
        self.is_finished = torch.zeros(rows, k, dtype=torch.bool, device=device)
        self.finished_length = torch.zeros(rows, k, dtype=torch.int64, device=device)
        self.can_improve = torch.zeros(rows, dtype=torch.bool, device=device)
        self.length_penalty = torch.zeros(rows, device=device)
        self.early_stopping = torch.zeros(rows, dtype=torch.int64, device=device)

    def start(self, row: int, params: GenerationParams) -> None:
        """Start a request.

        Args:
            row: First of the K decode rows of the request.
            params: Resolved parameters.
        """
        self.limits.set_row(row, params)
        self.running_tokens[row] = self.finished_tokens[row] = self.finished_length[row] = 0
        self.is_finished[row], self.can_improve[row] = False, True
        self.running_score[row], self.running_score[row, 0], self.finished_score[row] = IMPOSSIBLE, 0.0, IMPOSSIBLE
        self.length_penalty[row] = 1.0 if params.length_penalty is None else params.length_penalty
        self.early_stopping[row] = EARLY_STOPPING[params.early_stopping or False]

    def step(self, logits: Tensor, rows: Tensor, process: Callable[[Tensor], None] | None = None) -> Choice:
        """Advance the beams of requests by one token.

        Args:
            logits: Logits ``[S * K, V]``.
            rows: First decode row of each request ``[S]``.
            process: Function that applies logits processors to log-probabilities ``[S * K, V]`` in place.
        """
        num, k, vocab = len(rows), self.k, logits.shape[-1]
        # The best candidates of a request are among the best of each beam. An end token can turn out to be too early.
        most = min(self.num_candidates + len(self.limits.end_ids), vocab)
        logp, tokens = (t.view(num, k, most) for t in _best_of_each(logits, most, process))
        self.limits.apply_to_best(logp, tokens, rows)
        total = (logp + self.running_score[rows][:, :, None]).flatten(1)
        value, index = total.topk(self.num_candidates)
        parent, token = index // most, _gather(tokens.flatten(1), index)
        count = self.limits.count[rows]
        length = int(count.max()) + 1
        candidates = _gather(self.running_tokens[rows, :, :length], parent).scatter_(
            2, count[:, None, None].expand(-1, self.num_candidates, 1), token[..., None]
        )
        is_last = self.limits.is_last(token, rows)

        running = value + is_last * IMPOSSIBLE
        chosen = running.topk(k)[1]
        running_score = _gather(running, chosen)
        self.running_tokens[rows, :, :length], self.running_score[rows] = _gather(candidates, chosen), running_score
        self._merge_finished(rows, candidates, value, is_last)
        self.limits.count[rows] += 1
        is_open = self._is_open(rows, running_score) & ~is_last.all(1)
        sources = (_gather(parent, chosen) + rows[:, None]).view(-1)
        return Choice(_gather(token, chosen).view(-1), sources, ~is_open)

    def _merge_finished(self, rows: Tensor, candidates: Tensor, value: Tensor, is_last: Tensor) -> None:
        """Merge candidates that have just ended, if among the best K, with the beams that ended before."""
        is_best = torch.arange(self.num_candidates, device=rows.device) < self.k
        ended, length = is_last & is_best, self.limits.count[rows] + 1
        finished = self.is_finished[rows]
        value = value / length[:, None].float() ** self.length_penalty[rows][:, None]
        full = finished.all(1) & (self.early_stopping[rows] == EARLY_STOPPING[True])
        value = value + (full[:, None] * IMPOSSIBLE) + (~self.can_improve[rows][:, None] * IMPOSSIBLE)
        value = value + (~ended * IMPOSSIBLE)
        score = torch.cat([self.finished_score[rows], value], 1)
        order = score.topk(self.k)[1]
        self.finished_score[rows] = _gather(score, order)
        used = candidates.shape[2]
        tokens = torch.cat([self.finished_tokens[rows, :, :used], candidates], 1)
        self.finished_tokens[rows, :, :used] = _gather(tokens, order)
        self.is_finished[rows] = _gather(torch.cat([finished, ended], 1), order)
        lengths = torch.cat([self.finished_length[rows], length[:, None].expand(-1, self.num_candidates)], 1)
        self.finished_length[rows] = _gather(lengths, order)

    def _is_open(self, rows: Tensor, running_score: Tensor) -> Tensor:
        """Whether each request can still get a better beam, bool ``[S]``."""
        penalty, early, finished = self.length_penalty[rows], self.early_stopping[rows], self.is_finished[rows]
        best_length = torch.where(
            (early == EARLY_STOPPING["never"]) & (penalty > 0), self.limits.max_new[rows], self.limits.count[rows]
        )
        reachable = running_score[:, 0] / best_length.float() ** penalty
        worst = torch.where(finished, self.finished_score[rows].min(1, keepdim=True)[0], IMPOSSIBLE)
        self.can_improve[rows] = can_improve = self.can_improve[rows] & (reachable[:, None] > worst).any(1)
        return can_improve & ~(finished.all(1) & (early == EARLY_STOPPING[True]))

    def best(self, row: int, count: int = 1) -> list[tuple[list[int], float]]:
        """Token ids and scores of the best beams of a request.

        Args:
            row: First decode row of the request.
            count: Largest number of beams.

        Returns:
            Best finished beams, the best one first. The best running beam if none has finished.
        """
        if bool(self.is_finished[row].any()):
            finished = range(min(count, int(self.is_finished[row].sum())))
            return [
                (
                    self.finished_tokens[row, i, : int(self.finished_length[row, i])].tolist(),
                    float(self.finished_score[row, i]),
                )
                for i in finished
            ]
        length = int(self.limits.count[row])
        score = float(self.running_score[row, 0] / max(length, 1) ** self.length_penalty[row])
        return [(self.running_tokens[row, 0, :length].tolist(), score)]


def _best_of_each(logits: Tensor, count: int, process: Callable[[Tensor], None] | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities and tokens of the ``count`` best tokens of each row, after logits processors."""
    if process is None:
        return best_tokens(logits, count)
    logp = logits.float().log_softmax(-1)
    process(logp)
    found = logp.topk(count)
    return found.values, found.indices


def reorder_slot_table(table: Tensor, rows: Tensor, sources: Tensor, length: int) -> None:
    """Let each decode row continue another row's keys. Slots are permuted in place, and no key or value is copied.

    Args:
        table: Slot table ``[R + 1, max_len]``.
        rows: Decode rows ``[n]``.
        sources: Decode row that each row continues ``[n]``.
        length: Largest number of keys of a row.
    """
    table[rows, :length] = table[sources, :length]


def most_likely(scores: Tensor) -> Tensor:
    """Most likely token of each row of ``[S, V]``; `NO_TOKEN` if a score is NaN, or all are -inf."""
    tokens = argmax_rows(scores)
    largest = scores.gather(1, tokens[:, None])[:, 0]  # NaN counts as the largest
    return tokens.masked_fill(~(largest > -torch.inf), NO_TOKEN)


def argmax_rows(scores: Tensor) -> Tensor:
    """Place of the first largest entry of each row of ``[S, V]``.

    On a CPU the maxima of chunks are taken first, since `torch.argmax` does not use vector instructions there.
    """
    n = scores.shape[1] // CHUNK
    if scores.device.type != "cpu" or n < 2:
        return scores.argmax(-1)
    maxima = scores[:, : n * CHUNK].unflatten(1, (n, CHUNK)).amax(-1)
    rest = scores[:, n * CHUNK :]
    if rest.shape[1]:
        maxima = torch.cat([maxima, rest.amax(-1, keepdim=True)], 1)
    at = maxima.argmax(-1, keepdim=True) * CHUNK + torch.arange(CHUNK)
    return at[:, 0] + scores.gather(1, at.clamp_(max=scores.shape[1] - 1)).argmax(-1)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Entries ``index`` ``[S, n]`` of each row of ``[S, m]`` or ``[S, m, L]``."""
    return torch.take_along_dim(x, index if x.dim() == 2 else index[..., None], 1)
