"""`queue_request`, which hands a request to the scheduler."""

from __future__ import annotations

import hashlib

from prefixfast import _rust
from prefixfast.engine.request import Request
from prefixfast.errors import CapacityError


def queue_request(scheduler: _rust.Scheduler, number: int, request: Request, prefixes: list[int]) -> None:
    """Queue a request in the scheduler.

    Args:
        scheduler: Scheduler.
        number: Number that no unfinished request has.
        request: Request.
        prefixes: Numbers of its prefixes in the scheduler.

    Raises:
        CapacityError: If the request can never run.
    """
    assert request.params.max_new_tokens is not None
    try:
        scheduler.add(
            number,
            prefixes,
            len(request.ids),
            request.num_rows,
            request.params.max_new_tokens,
            encoder_len=request.encoder_len,
            tenant=_tenant_number(request.tenant, prefixes),
            priority=request.priority,
            deadline=request.deadline,
        )
    except CapacityError as e:
        rows, prefix_rows = request.num_rows, sum(p.num_rows for p in request.prefixes)
        prompt = (
            f"{request.encoder_len} tokens for the encoder"
            if request.encoder_len
            else f"{len(request.ids)} prompt tokens"
        )
        msg = (
            f"request {request.index} can never run: {prompt}, {rows} sequences of "
            f"{request.params.max_new_tokens} new tokens and {prefix_rows} prefix rows need {e}"
        )
        raise CapacityError(msg, limit=e.limit, needed=e.needed, available=e.available) from e


def _tenant_number(name: str | None, prefixes: list[int]) -> int:
    """Number of a tenant: below those of prefixes for a named tenant, else the number of the first prefix, or -1."""
    if name is None:
        return prefixes[0] if prefixes else -1
    return -2 - int.from_bytes(hashlib.blake2b(name.encode("utf8", "surrogatepass"), digest_size=7).digest())
