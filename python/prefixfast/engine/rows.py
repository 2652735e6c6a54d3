"""The decode rows: who holds them, their next tokens, and the choosing of tokens for all of them at once.

Shape letters: R decode rows of the engine, S requests of a step, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast.engine.request import Request
from prefixfast.engine.select import Beam, Greedy
from prefixfast.engine.transfer import Arriving, to_device

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Chosen:
    """What a step chose for the requests of one number of beams.

    Attributes:
        numbers: The requests.
        rows: Their first rows.
        beams: Of each.
        values: ``[S]``: tokens, or with beams whether a request has ended.
        full: Those of ``numbers`` that have all the tokens they may have; with beams unknown, none.
    """

    numbers: list[int]
    rows: list[int]
    beams: int
    values: Arriving
    full: list[int]


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
        self.beams, self.number, self.left = (np.zeros(count, np.int64) for _ in range(3))  # left: tokens that may still be chosen

    def beam(self, beams: int) -> Beam:
        """The state of all requests of a number of beams."""
        if beams not in self._beams:
            rows, longest = self.table.shape
            self._beams[beams] = Beam(beams, rows, longest, self.eos)
        return self._beams[beams]

    def start(self, number: int, request: Request, row: int, beams: int) -> Numbers:
        """A request takes its rows, which are returned."""
        rows = np.arange(row, row + beams)
        self.beams[rows], self.number[rows], self.left[rows] = beams, number, request.params.max_new_tokens or 1
        (self.greedy if beams == 1 else self.beam(beams)).start(row, request.params)
        return rows

    def choose(self, logits: Tensor, rows: Numbers, longest: int) -> list[Chosen]:
        """Select tokens of ``rows`` of at most ``longest`` keys from ``logits`` ``[n, V]``; one pass for each number of beams in use."""
        found, beams = [], self.beams[rows]
        for k in np.unique(beams).tolist():
            mine = np.flatnonzero(beams == k)
            at = to_device(rows[mine], logits.device)
            own = logits if len(mine) == len(rows) else logits[to_device(mine, logits.device)]
            choice = (self.greedy if k == 1 else self.beam(k)).step(own, at[::k])
            if choice.source is not None:  # a beam reorder is a permutation of slot-table rows, no key or value moves
                self.table[at, :longest] = self.table[choice.source, :longest]
            self.token[at] = choice.tokens
            found.append(self.chosen(choice.tokens if choice.finished is None else choice.finished, rows[mine][::k], k))
        return found

    def chosen(self, values: Tensor, first: Numbers, beams: int) -> Chosen:
        """Send to the host what was chosen for the requests whose first rows are ``first``."""
        self.left[first] -= 1
        numbers = self.number[first]
        full = numbers[self.left[first] == 0].tolist() if beams == 1 else []
        return Chosen(numbers.tolist(), first.tolist(), beams, Arriving(values), full)
