"""Logits processors of requests: transformers' own ones for the request's parameters, and the caller's.

Each processor is called once per step for each request that has it, which is slow. The minimum number of new tokens
and forced tokens apply to all requests at once, in `search`.

Shape letters: R decode rows of the engine, n rows of a step, V vocabulary.
"""

from __future__ import annotations

import itertools
import threading

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    EncoderNoRepeatNGramLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from prefixfast.engine.request import Request
from prefixfast.engine.transfer import to_device

Numbers = NDArray[np.int64]


def processors_of(request: Request, end_ids: Tensor) -> LogitsProcessorList:
    """Logits processors that transformers' ``generate`` applies for the request's parameters, then the caller's own.

    Bad words of one token are left out, since `RowProcessors` bans these tokens for all rows of a step at once.

    Args:
        request: Request with resolved parameters.
        end_ids: End tokens ``[E]``.

    Returns:
        Processors in transformers' order, empty if the request needs none.
    """
    p, processors = request.params, LogitsProcessorList()
    if (p.repetition_penalty or 1.0) != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(float(p.repetition_penalty or 1.0)))
    if p.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(p.no_repeat_ngram_size))
    if p.encoder_no_repeat_ngram_size:
        text = request.prompt_ids if request.encoder_ids is None else request.encoder_ids
        encoder_ids = torch.from_numpy(text).long().to(end_ids.device)
        processors.append(EncoderNoRepeatNGramLogitsProcessor(p.encoder_no_repeat_ngram_size, encoder_ids))
    if words := [list(word) for word in p.bad_words_ids or () if len(word) > 1]:
        processors.append(NoBadWordsLogitsProcessor(words))
    if request.processors:
        if p.min_new_tokens and len(end_ids):
            processors.append(MinNewTokensLengthLogitsProcessor(len(request.prompt_ids), p.min_new_tokens, end_ids))
        processors.extend(_forced_tokens(request))
        processors.extend(request.processors)
    return processors


def _forced_tokens(request: Request) -> LogitsProcessorList:
    """Processors of a request's forced tokens, whose scores the caller's processors see."""
    p, processors = request.params, LogitsProcessorList()
    if p.forced_bos_token_id not in (None, -1):
        processors.append(ForcedBOSTokenLogitsProcessor(p.forced_bos_token_id))
    if p.forced_eos_token_id not in (None, -1):
        max_length = len(request.prompt_ids) + (p.max_new_tokens or 1)
        processors.append(ForcedEOSTokenLogitsProcessor(max_length, p.forced_eos_token_id))
    return processors


class RowProcessors:
    """Logits processors of all decode rows, and the tokens that these processors look at.

    Args:
        rows: Number of decode rows R.
        max_len: Largest number of tokens of a row.
        end_ids: End tokens ``[E]``.
    """

    def __init__(self, rows: int, max_len: int, end_ids: Tensor) -> None:
        self.end_ids, self.shape = end_ids, (rows, max_len)
        self.tokens = torch.zeros(
            0, 0, dtype=torch.int64
        )  # [R, max_len], allocated for the first request that needs it
        self.processors: list[LogitsProcessorList | None] = [None] * rows
        self.banned: list[Numbers | None] = [None] * rows  # tokens that are never generated
        self.length = np.zeros(rows, np.int64)
        self.errors: dict[int, BaseException] = {}  # errors of the callers' processors, by the request's first row

    def start(self, rows: Numbers, request: Request) -> bool:
        """Set the processors of the rows of a request.

        Args:
            rows: Decode rows of the request, consecutive.
            request: Request with resolved parameters.

        Returns:
            Whether the request has processors or banned tokens.
        """
        processors, end_ids = processors_of(request, self.end_ids), self.end_ids.tolist()
        single = [word[0] for word in request.params.bad_words_ids or () if len(word) == 1 and word[0] not in end_ids]
        banned = np.array(single, np.int64) if single else None
        for row in rows:
            self.processors[row], self.banned[row] = processors or None, banned
        if not processors:
            return banned is not None
        if not len(self.tokens):
            self.tokens = torch.zeros(self.shape, dtype=torch.int64, device=self.end_ids.device)
        self.length[rows] = len(request.prompt_ids)
        prompt = torch.from_numpy(request.prompt_ids).long().to(self.tokens.device)
        self.tokens[rows[0] : rows[-1] + 1, : len(prompt)] = prompt
        return True

    def end(self, rows: Numbers) -> None:
        """Remove the processors of the rows of a request that has ended.

        Args:
            rows: Decode rows of the request.
        """
        for row in rows:
            self.processors[row] = self.banned[row] = None

    def apply(self, scores: Tensor, rows: Numbers) -> None:
        """Change scores in place. An error of a caller's processor is stored in ``errors``.

        Args:
            scores: Scores ``[n, V]``.
            rows: Decode rows ``[n]``. Rows of one request are neighbours.
        """
        banned = [(i, ids) for i, row in enumerate(rows) if (ids := self.banned[row]) is not None]
        if banned:
            places = np.repeat([i for i, _ in banned], [len(ids) for _, ids in banned])
            tokens = np.concatenate([ids for _, ids in banned])
            scores[to_device(places, scores.device), to_device(tokens, scores.device)] = -torch.inf
        at = 0
        # Lists with the same processors compare equal, so rows are grouped by the identity of their request's list.
        for _, group in itertools.groupby(rows, key=lambda row: id(self.processors[row])):
            count, first = len(list(group)), int(rows[at])
            if (processors := self.processors[first]) is not None:
                here = slice(at, at + count)
                try:
                    scores[here] = processors(
                        self.tokens[first : first + count, : int(self.length[first])], scores[here]
                    )
                except BaseException as e:  # code of the caller: the error belongs to this request alone
                    if isinstance(e, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                        raise  # the user interrupts `generate`
                    self.errors[first] = e
            at += count

    def append(self, rows: Numbers, tokens: Tensor, sources: Tensor | None = None) -> None:
        """Append a token to each row that has processors.

        Args:
            rows: Decode rows ``[n]``.
            tokens: Tokens ``[n]``.
            sources: Row that each row continues ``[n]``, for beams. None if each row continues itself.
        """
        places = [i for i, row in enumerate(rows) if self.processors[row] is not None]
        if not places:
            return
        at = torch.from_numpy(rows[places]).to(self.tokens.device)
        if sources is not None:
            self.tokens[at] = self.tokens[sources[places]]
        self.tokens[at, torch.from_numpy(self.length[rows[places]]).to(at.device)] = tokens[places]
        self.length[rows[places]] += 1
