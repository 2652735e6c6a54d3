"""`SharedPrompts`, which computes leading tokens that several requests share once, as a prefix."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from prefixfast.engine.request import Request
from prefixfast.model.base import Model
from prefixfast.model.text_kv import text_kv
from prefixfast.model.weights import content_state
from prefixfast.prefix.kv import context
from prefixfast.prefix.prefix import Prefix

MAX_SHARED_PROMPTS = 32
Digests = tuple[str, ...]  # digests of a request's prefixes


class SharedPrompts:
    """Finds shared leading tokens in batches, and holds their keys and values as prefixes.

    Args:
        model: Base model.
        min_tokens: Smallest number of leading tokens that requests share.
    """

    def __init__(self, model: Model, min_tokens: int) -> None:
        self.model, self.min_tokens = model, min_tokens
        # By digests of the requests' prefixes and bytes of the int32 tokens, the most recently used one last.
        self.state: object = None  # state of the base in which the prompts were computed
        self.prompts: OrderedDict[tuple[Digests, bytes], Prefix] = OrderedDict()

    def split(self, requests: list[Request]) -> list[Request]:
        """Replace shared leading tokens of requests by a prefix. Results change by rounding only.

        Args:
            requests: Checked requests of a batch.

        Returns:
            Requests in the same order. Requests without shared leading tokens are unchanged.
        """
        with self.model.guard.running():
            state = content_state(self.model.hf)
        if state != self.state:
            self.prompts.clear()
            self.state = state
        groups: dict[tuple[Digests, bytes], list[Request]] = defaultdict(list)
        for r in requests:
            # Leading tokens before an infix would be a prefix beside it, which not every base takes.
            if len(r.ids) > self.min_tokens and all(p.position == "prefix" for p in r.prefixes):
                groups[_digests(r), r.ids[: self.min_tokens].tobytes()].append(r)
        for (digests, _), group in groups.items():
            if len(group) > 1 and self._find(digests, group[0].ids, _common_length(group)) is None:
                self._compute(group[0], _common_length(group))
        return [self._use(r) for r in requests]

    def _find(self, digests: Digests, ids: NDArray[np.int32], min_tokens: int) -> tuple[Digests, bytes] | None:
        """Key of the longest shared prompt of at least ``min_tokens`` tokens with which ``ids`` begin."""
        fits = [
            (own, prompt)
            for own, prompt in self.prompts
            if own == digests and 4 * min_tokens <= len(prompt) < 4 * len(ids) and ids.tobytes().startswith(prompt)
        ]
        return max(fits, key=lambda key: len(key[1]), default=None)

    def _compute(self, request: Request, length: int) -> None:
        """Compute the keys and values of the first ``length`` prompt tokens of a request."""
        prefixes = [p if isinstance(p, Prefix) else p.read() for p in request.prefixes]
        with self.model.run():
            kv = text_kv(self.model, request.ids[:length].tolist(), length, *context(prefixes, self.model))
        pos = max((p.pos_start for p in prefixes), default=0) + length
        tensors = {f"self.{i}.{x}": t for i, pair in enumerate(kv) for x, t in zip("kv", pair, strict=True)}
        self.prompts[_digests(request), request.ids[:length].tobytes()] = Prefix(tensors, pos_start=pos)
        while len(self.prompts) > MAX_SHARED_PROMPTS:
            self.prompts.popitem(last=False)

    def _use(self, request: Request) -> Request:
        """The request with its longest shared prompt as a further prefix."""
        key = self._find(_digests(request), request.ids, self.min_tokens)
        if key is None:
            return request
        self.prompts.move_to_end(key)
        prefix = self.prompts[key]
        ids, prefixes = request.ids[prefix.length_at("self") :], (*request.prefixes, prefix)
        return replace(request, ids=ids, prefixes=prefixes, shared_tokens=prefix.length_at("self"))


def _digests(request: Request) -> Digests:
    return tuple(p.digest for p in request.prefixes)


def _common_length(group: list[Request]) -> int:
    """Number of leading tokens that all requests share. At least one token of the shortest request is left."""
    first = group[0].ids
    limit = min(len(r.ids) for r in group) - 1
    return min((int(np.argmin(np.append(r.ids[:limit] == first[:limit], False))) for r in group[1:]), default=limit)
