"""Rules about tokens that a request has had: transformers' own logits processors, for each request that asks for them, and the caller's.

This is the slow path: one call for each such request and step. What all requests share (end tokens before a minimum) is in `select`.

Shape letters: R decode rows of the engine, n rows of a step, V vocabulary.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from prefixfast.engine.request import Request
from prefixfast.engine.transfer import to_device

Numbers = NDArray[np.int64]


def processors_of(request: Request, ends: Tensor) -> LogitsProcessorList:
    """What transformers' ``generate`` would apply for these parameters, in its order, then the request's own; empty without rules.

    Single tokens that may not come are not among them: see `Rules.banned`.

    Args:
        request: Resolved.
        ends: End tokens.
    """
    p, made = request.params, LogitsProcessorList()
    if (p.repetition_penalty or 1.0) != 1.0:
        made.append(RepetitionPenaltyLogitsProcessor(float(p.repetition_penalty or 1.0)))
    if p.no_repeat_ngram_size:
        made.append(NoRepeatNGramLogitsProcessor(p.no_repeat_ngram_size))
    if words := [list(word) for word in p.bad_words_ids or () if len(word) > 1]:
        made.append(NoBadWordsLogitsProcessor(words))
    if request.processors:
        if p.min_new_tokens and len(ends):
            made.append(MinNewTokensLengthLogitsProcessor(len(request.prompt), p.min_new_tokens, ends))
        made.extend(request.processors)
    return made


class Rules:
    """Processors of rows, and the tokens that these have had.

    Args:
        rows: R.
        longest: Most tokens of a row.
        ends: End tokens ``[E]``.
    """

    def __init__(self, rows: int, longest: int, ends: Tensor) -> None:
        self.ends, self.shape = ends, (rows, longest)
        self.said = torch.zeros(0, 0, dtype=torch.int64)  # [R, longest] once a request needs it
        self.lists: list[LogitsProcessorList | None] = [None] * rows
        self.banned: list[Numbers | None] = [None] * rows  # tokens that may not come, for all rows of a step at once
        self.length = np.zeros(rows, np.int64)
        self.failed: dict[int, Exception] = {}  # by row: what a request's own processor raised

    def start(self, rows: Numbers, request: Request) -> bool:
        """A request takes rows; returns whether it has rules."""
        made, ends = processors_of(request, self.ends), self.ends.tolist()
        single = [word[0] for word in request.params.bad_words_ids or () if len(word) == 1 and word[0] not in ends]
        banned = np.array(single, np.int64) if single else None
        for row in rows:
            self.lists[row], self.banned[row] = made or None, banned
        if not made:
            return banned is not None
        if not len(self.said):
            self.said = torch.zeros(self.shape, dtype=torch.int64, device=self.ends.device)
        self.length[rows] = len(request.prompt)
        self.said[rows[0] : rows[-1] + 1, : len(request.prompt)] = (
            torch.from_numpy(request.prompt).long().to(self.said.device)
        )
        return True

    def end(self, rows: Numbers) -> None:
        """A request leaves its rows."""
        for row in rows:
            self.lists[row] = self.banned[row] = None

    def apply(self, scores: Tensor, rows: Numbers) -> None:
        """Change scores ``[n, V]`` of rows; rows of one request are neighbours."""
        tokens = [(i, own) for i, row in enumerate(rows) if (own := self.banned[row]) is not None]
        if tokens:
            place = np.repeat([i for i, _ in tokens], [len(own) for _, own in tokens])
            scores[
                to_device(place, scores.device), to_device(np.concatenate([own for _, own in tokens]), scores.device)
            ] = -torch.inf
        at = 0
        for _, group in itertools.groupby(
            rows, key=lambda row: id(self.lists[row])
        ):  # lists of the same processors are equal
            count, first = len(list(group)), int(rows[at])
            if (made := self.lists[first]) is not None:
                here = slice(at, at + count)
                try:
                    scores[here] = made(self.said[first : first + count, : int(self.length[first])], scores[here])
                except Exception as e:  # the caller's code: one request's matter
                    self.failed[first] = e
            at += count

    def extend(self, rows: Numbers, tokens: Tensor, source: Tensor | None = None) -> None:
        """Rows have a token more; with beams each first becomes row ``source``."""
        mine = [i for i, row in enumerate(rows) if self.lists[row] is not None]
        if not mine:
            return
        at = torch.from_numpy(rows[mine]).to(self.said.device)
        if source is not None:
            self.said[at] = self.said[source[mine]]
        self.said[at, torch.from_numpy(self.length[rows[mine]]).to(at.device)] = tokens[mine]
        self.length[rows[mine]] += 1
