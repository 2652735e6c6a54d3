"""Positions of the tokens of a packed forward, which the replaced embeddings of positions read.

Layers are recomputed in a backward pass, embeddings never, so that a context variable around each stack is enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

_POSITIONS: ContextVar[Tensor | None] = ContextVar("prefixfast_positions", default=None)


@contextlib.contextmanager
def packed_positions(positions: Tensor) -> Iterator[None]:
    """Context manager of a stack's forward.

    Args:
        positions: Positions of its tokens, ``[1, N]``.
    """
    token = _POSITIONS.set(positions)
    try:
        yield
    finally:
        _POSITIONS.reset(token)


def current_positions() -> Tensor | None:
    """Positions of the tokens of the packed forward that runs, None outside of one."""
    return _POSITIONS.get()
