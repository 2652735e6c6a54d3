"""Leading text that many requests have in common (a system prompt, few-shot examples), computed once and read in place as a prefix."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import replace

import numpy as np

from prefixfast.engine.request import Request
from prefixfast.model.base import Model
from prefixfast.model.text_kv import text_kv
from prefixfast.prefix.kv import context
from prefixfast.prefix.prefix import Prefix

KEPT = 32
Before = tuple[str, ...]  # digests of a request's prefixes


class SharedPrompts:
    """Finds shared leading text in batches and keeps its keys and values.

    Args:
        model: The base.
        least: Tokens that must be shared.
    """

    def __init__(self, model: Model, least: int) -> None:
        self.model, self.least = model, least
        self.known: OrderedDict[tuple[Before, bytes], Prefix] = OrderedDict()  # the one used last comes last

    def split(self, requests: list[Request]) -> list[Request]:
        """Requests whose shared leading text is a prefix; the others as they are. Results do not change but for rounding."""
        groups: dict[tuple[Before, bytes], list[Request]] = defaultdict(list)
        for r in requests:
            if len(r.ids) > self.least:
                groups[_before(r), r.ids[: self.least].tobytes()].append(r)
        for (before, _), group in groups.items():
            if len(group) > 1 and self._find(before, group[0].ids, _common(group)) is None:
                self._learn(group[0], _common(group))
        return [self._cut(r) for r in requests]

    def _find(self, before: Before, ids: np.ndarray, least: int) -> tuple[Before, bytes] | None:
        """The longest known text of at least ``least`` tokens that these begin with and go on from."""
        fits = [
            (b, text)
            for b, text in self.known
            if b == before and 4 * least <= len(text) < 4 * len(ids) and ids.tobytes().startswith(text)
        ]
        return max(fits, key=lambda key: len(key[1]), default=None)

    def _learn(self, request: Request, length: int) -> None:
        after = [p if isinstance(p, Prefix) else p.read() for p in request.prefixes]
        kv = text_kv(self.model, request.ids[:length].tolist(), length, *context(after, self.model))
        pos = max((p.pos_start for p in after), default=0) + length
        tensors = {f"self.{i}.{x}": t for i, pair in enumerate(kv) for x, t in zip("kv", pair, strict=True)}
        self.known[_before(request), request.ids[:length].tobytes()] = Prefix(tensors, pos_start=pos)
        while len(self.known) > KEPT:
            self.known.popitem(last=False)

    def _cut(self, request: Request) -> Request:
        key = self._find(_before(request), request.ids, self.least)
        if key is None:
            return request
        self.known.move_to_end(key)
        prefix = self.known[key]
        return replace(
            request, ids=request.ids[prefix.length :], prefixes=(*request.prefixes, prefix), shared=prefix.length
        )


def _before(request: Request) -> Before:
    return tuple(p.digest for p in request.prefixes)


def _common(group: list[Request]) -> int:
    """Leading tokens that all of these have in common, at least one short of the shortest."""
    first = group[0].ids
    least = min(len(r.ids) for r in group) - 1
    return min((int(np.argmin(np.append(r.ids[:least] == first[:least], False))) for r in group[1:]), default=least)
