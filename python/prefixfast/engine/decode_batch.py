"""`DecodeBatch`, the state of all decode rows, which chooses the next tokens for all of them at once.

Shape letters: R decode rows of the engine, S requests of a step, n rows of a step, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast.engine.logits_processors import RowProcessors
from prefixfast.engine.logprobs import StepLogprobs, step_logprobs
from prefixfast.engine.request import Request
from prefixfast.engine.sampler import Sampler
from prefixfast.engine.search import BeamSearch, GreedySearch, most_likely, reorder_slot_table
from prefixfast.engine.transfer import HostCopy, to_device

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class StepTokens:
    """Tokens that a step has chosen for the requests with one number of beams.

    Attributes:
        numbers: Request numbers ``[S]``. A request with several samples occurs once per sample.
        rows: First decode row of each request or sample ``[S]``.
        num_beams: Number of beams of each request.
        values: Tokens ``[S]``, `NO_TOKEN` if none is possible. With beams whether each request has ended, bool ``[S]``.
        at_limit: Numbers of the requests that have all their tokens. Empty with beams, where it is unknown.
        logprobs: Log-probabilities, None if no row asked for them.
    """

    numbers: list[int]
    rows: list[int]
    num_beams: int
    values: HostCopy
    at_limit: list[int]
    logprobs: StepLogprobs | None = None


class DecodeBatch:
    """State of R decode rows and of one padding row.

    Tensors keep their memory, so that captured decode steps can use them.

    Args:
        slot_table: Slot table ``[R + 1, max_len]``.
        end_ids: End tokens in the base model's vocabulary.
    """

    def __init__(self, slot_table: Tensor, end_ids: list[int]) -> None:
        count, device = len(slot_table), slot_table.device
        self.slot_table, self.end_ids = slot_table, set(end_ids)
        self.end_tensor = torch.tensor(end_ids, dtype=torch.int64, device=device)
        self.next_token = torch.zeros(count, dtype=torch.int64, device=device)
        self.greedy, self._beam_searches = GreedySearch(count, self.end_tensor), dict[int, BeamSearch]()
        self.sampler = Sampler(count, device)
        self.processors = RowProcessors(count, slot_table.shape[1], self.end_tensor)
        self.request_number, self.num_beams = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.tokens_left = np.zeros(count, np.int64)  # tokens that a row can still get
        self.is_greedy = np.ones(count, bool)  # greedy search without logits processors and log-probabilities
        self.is_sampled, self.has_processors = np.zeros(count, bool), np.zeros(count, bool)
        self.num_logprobs = np.full(count, -1)  # most likely tokens to report, -1 for no log-probabilities at all

    def beam_search(self, num_beams: int) -> BeamSearch:
        """State of all requests with a number of beams."""
        if num_beams not in self._beam_searches:
            rows, max_len = self.slot_table.shape
            self._beam_searches[num_beams] = BeamSearch(num_beams, rows, max_len, self.end_tensor)
        return self._beam_searches[num_beams]

    def start(self, number: int, request: Request, row: int) -> Numbers:
        """Set the decode rows of a request.

        Args:
            number: Number of the request.
            request: Request.
            row: First decode row of the request.

        Returns:
            Decode rows of the request.
        """
        rows, p = np.arange(row, row + request.num_rows), request.params
        self.request_number[rows] = number
        self.num_beams[rows] = len(rows) if request.is_beam_search else 1
        self.tokens_left[rows] = p.max_new_tokens or 1
        self.is_sampled[rows] = bool(p.do_sample)
        self.num_logprobs[rows] = -1 if p.logprobs is None else p.logprobs
        self.has_processors[rows] = has_processors = self.processors.start(rows, request)
        self.is_greedy[rows] = not (p.do_sample or has_processors or p.logprobs is not None or request.is_beam_search)
        if request.processors:  # these limits are among the processors, so that the caller's can change the scores
            p = replace(p, min_new_tokens=0, forced_bos_token_id=None, forced_eos_token_id=None)
        if request.is_beam_search:
            self.beam_search(len(rows)).start(row, p)
            return rows
        for sample, own in enumerate(rows.tolist()):
            self.greedy.start(own, p)
            if p.do_sample:
                self.sampler.set_row(own, p, sample)
        return rows

    def choose_tokens(self, logits: Tensor, rows: Numbers, length: int) -> list[StepTokens]:
        """Choose the next tokens, in one pass for each number of beams in use.

        Args:
            logits: Logits ``[n, V]``.
            rows: Decode rows ``[n]``.
            length: Largest number of keys of a row.
        """
        chosen, num_beams = [], self.num_beams[rows]
        for k in np.unique(num_beams).tolist():
            places = np.flatnonzero(num_beams == k)
            own = logits if len(places) == len(rows) else logits[to_device(places, logits.device)]
            if k == 1:
                chosen.append(self._choose_single(own, rows[places]))
            else:
                chosen.append(self._choose_beams(own, rows[places], k, length))
        return chosen

    def _choose_single(self, logits: Tensor, rows: Numbers) -> StepTokens:
        """Choose by greedy search or sampling, after the logits processors."""
        at = to_device(rows, logits.device)
        if self.is_greedy[rows].all():
            tokens = self.greedy.step(logits, at).tokens
            self.next_token[at] = tokens.clamp(min=0)
            return self.send(tokens, rows, 1)
        scores, limits = logits.float(), self.greedy.limits
        wanted = np.flatnonzero(self.num_logprobs[rows] >= 0)
        logprobs = scores[to_device(wanted, logits.device)].log_softmax(-1) if len(wanted) else None
        scores = scores.clone()  # a replayed CUDA graph returns its own memory
        self.processors.apply(scores, rows)
        limits.apply(scores[:, None], at)
        tokens = most_likely(scores)
        if len(sampled := np.flatnonzero(self.is_sampled[rows])):
            some = to_device(sampled, logits.device)
            tokens[some] = self.sampler.draw(scores[some], at[some], limits.count[at[some]])
        limits.count[at] += 1
        self.next_token[at] = following = tokens.clamp(min=0)  # a row without a token ends when its tokens are read
        self.processors.append(rows, following)
        sent = self.send(tokens, rows, 1)
        if logprobs is None:
            return sent
        return replace(sent, logprobs=step_logprobs(logprobs, following, wanted, self.num_logprobs[rows[wanted]]))

    def _choose_beams(self, logits: Tensor, rows: Numbers, k: int, length: int) -> StepTokens:
        """Advance requests with k beams, and let their rows continue the chosen beams."""
        at = to_device(rows, logits.device)
        has_processors = self.has_processors[rows].any()
        process = (lambda scores: self.processors.apply(scores, rows)) if has_processors else None
        choice = self.beam_search(k).step(logits, at[::k], process)
        assert choice.sources is not None
        assert choice.finished is not None
        reorder_slot_table(self.slot_table, at, choice.sources, length)
        self.processors.append(rows, choice.tokens, choice.sources)
        self.next_token[at] = choice.tokens
        return self.send(choice.finished, rows[::k], k)

    def send(self, values: Tensor, first_rows: Numbers, num_beams: int) -> StepTokens:
        """Start to copy the result of a step to the host.

        Args:
            values: Tokens ``[S]``, or with beams whether each request has ended, bool ``[S]``.
            first_rows: First decode row of each request or sample ``[S]``.
            num_beams: Number of beams of each request.
        """
        self.tokens_left[first_rows] -= 1
        numbers = self.request_number[first_rows]
        at_limit = np.unique(numbers[self.tokens_left[first_rows] == 0]).tolist() if num_beams == 1 else []
        return StepTokens(numbers.tolist(), first_rows.tolist(), num_beams, HostCopy(values), at_limit)
