"""The decode rows: who holds them, their next tokens, and the choosing of tokens for all of them at once.

Shape letters: R decode rows of the engine, S requests of a step, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast.engine.logits_processors import Rules
from prefixfast.engine.request import Request, TokenLogprob
from prefixfast.engine.sampler import Sampler
from prefixfast.engine.search import Beam, Greedy, likeliest
from prefixfast.engine.transfer import Arriving, to_device

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Chosen:
    """What a step chose for the requests of one number of beams.

    Attributes:
        numbers: The requests; one with several samples as often.
        rows: Their rows, with beams the first ones.
        beams: Of each.
        values: ``[S]``: tokens, or with beams whether a request has ended.
        full: Those of ``numbers`` that have all the tokens they may have; with beams unknown, none.
        told: Log-probabilities of some of them.
    """

    numbers: list[int]
    rows: list[int]
    beams: int
    values: Arriving
    full: list[int]
    told: Told | None = None


@dataclass(frozen=True)
class Told:
    """Log-probabilities on their way to the host.

    Attributes:
        count: By place in the step: how many of the likeliest were asked for.
        own: Of the chosen tokens ``[m]``.
        top: The likeliest tokens' ``[m, n]``.
        ids: Those tokens ``[m, n]``.
    """

    count: dict[int, int]
    own: Arriving
    top: Arriving
    ids: Arriving

    def read(self, tokens: list[int]) -> dict[int, TokenLogprob]:
        """By place in the step, for the tokens that were chosen there."""
        columns = zip(self.count.items(), self.own.values(), self.top.values(), self.ids.values(), strict=True)
        return {
            at: TokenLogprob(tokens[at], own, dict(zip(ids[:n], top[:n], strict=True)))
            for (at, n), own, top, ids in columns
        }


class Rows:
    """State of R rows, and one more that stands for nothing. Tensors keep their memory, so that captured steps find them.

    Args:
        table: Slot table ``[R + 1, longest]``.
        eos: End tokens of the base's vocabulary.
    """

    def __init__(self, table: Tensor, eos: list[int]) -> None:
        count = len(table)
        self.table, self.ends = table, set(eos)
        self.eos = torch.tensor(eos, dtype=torch.int64, device=table.device)
        self.token = torch.zeros(count, dtype=torch.int64, device=table.device)
        self.greedy, self._beams = Greedy(count, self.eos), dict[int, Beam]()
        self.sampler, self.rules = Sampler(count, table.device), Rules(count, table.shape[1], self.eos)
        self.beams, self.number, self.left = (
            np.zeros(count, np.int64) for _ in range(3)
        )  # left: tokens that may still be chosen
        self.plain, self.drawn, self.ruled = (
            np.ones(count, bool),
            np.zeros(count, bool),
            np.zeros(count, bool),
        )  # plain: the likeliest token, no more
        self.told = np.full(count, -1)  # log-probabilities that are asked for, -1: none

    def beam(self, beams: int) -> Beam:
        """The state of all requests of a number of beams."""
        if beams not in self._beams:
            rows, longest = self.table.shape
            self._beams[beams] = Beam(beams, rows, longest, self.eos)
        return self._beams[beams]

    def start(self, number: int, request: Request, row: int) -> Numbers:
        """A request takes its rows, which are returned."""
        rows, p = np.arange(row, row + request.rows), request.params
        self.beams[rows], self.number[rows], self.left[rows] = (
            len(rows) if request.search else 1,
            number,
            p.max_new_tokens or 1,
        )
        self.drawn[rows], self.told[rows] = bool(p.do_sample), -1 if p.logprobs is None else p.logprobs
        self.ruled[rows] = ruled = self.rules.start(rows, request)
        self.plain[rows] = not (p.do_sample or ruled or p.logprobs is not None or request.search)
        if request.search:
            self.beam(len(rows)).start(row, p)
        for i, own in enumerate([] if request.search else rows.tolist()):
            self.greedy.start(own, p)
            if p.do_sample:
                self.sampler.start(own, p, i)
        return rows

    def choose(self, logits: Tensor, rows: Numbers, longest: int) -> list[Chosen]:
        """Select tokens of ``rows`` of at most ``longest`` keys from ``logits`` ``[n, V]``; one pass for each number of beams in use."""
        found, beams = [], self.beams[rows]
        for k in np.unique(beams).tolist():
            mine = np.flatnonzero(beams == k)
            own = logits if len(mine) == len(rows) else logits[to_device(mine, logits.device)]
            found.append(self._single(own, rows[mine]) if k == 1 else self._searched(own, rows[mine], k, longest))
        return found

    def _single(self, logits: Tensor, rows: Numbers) -> Chosen:
        """Rows without beams: likeliest or drawn, after their rules."""
        at = to_device(rows, logits.device)
        if self.plain[rows].all():
            self.token[at] = tokens = self.greedy.step(logits, at).tokens
            return self.chosen(tokens, rows, 1)
        scores, limits = logits.float(), self.greedy.limits
        wanted = np.flatnonzero(self.told[rows] >= 0)
        raw = scores[to_device(wanted, logits.device)].log_softmax(-1) if len(wanted) else None
        scores = scores.clone()  # a captured step's memory
        self.rules.apply(scores, rows)
        limits.hide_end(scores[:, None], at)
        tokens = likeliest(scores)
        if len(drawn := np.flatnonzero(self.drawn[rows])):
            some = to_device(drawn, logits.device)
            tokens[some] = self.sampler.draw(scores[some], at[some], limits.count[at[some]])
        limits.count[at] += 1
        self.rules.extend(rows, tokens)
        self.token[at] = tokens
        chosen = self.chosen(tokens, rows, 1)
        return chosen if raw is None else replace(chosen, told=self._tell(raw, tokens, wanted, self.told[rows[wanted]]))

    def _searched(self, logits: Tensor, rows: Numbers, k: int, longest: int) -> Chosen:
        """Rows of requests with k beams."""
        at = to_device(rows, logits.device)
        ruled = (lambda scores: self.rules.apply(scores, rows)) if self.ruled[rows].any() else None
        choice = self.beam(k).step(logits, at[::k], ruled)
        assert choice.source is not None
        assert choice.finished is not None
        self.table[at, :longest] = self.table[
            choice.source, :longest
        ]  # a beam reorder permutes rows of the slot table, no key or value moves
        self.rules.extend(rows, choice.tokens, choice.source)
        self.token[at] = choice.tokens
        return self.chosen(choice.finished, rows[::k], k)

    @staticmethod
    def _tell(raw: Tensor, tokens: Tensor, places: Numbers, counts: Numbers) -> Told:
        own = raw.gather(1, tokens[to_device(places, raw.device)][:, None])[:, 0]
        top, ids = raw.topk(int(counts.max()))
        return Told(
            dict(zip(places.tolist(), counts.tolist(), strict=True)), Arriving(own), Arriving(top), Arriving(ids)
        )

    def chosen(self, values: Tensor, first: Numbers, beams: int) -> Chosen:
        """Send to the host what was chosen for the requests whose first rows are ``first``."""
        self.left[first] -= 1
        numbers = self.number[first]
        full = np.unique(numbers[self.left[first] == 0]).tolist() if beams == 1 else []
        return Chosen(numbers.tolist(), first.tolist(), beams, Arriving(values), full)
