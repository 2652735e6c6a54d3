"""`EngineStats`, the counters of an engine."""

from __future__ import annotations

from typing import TypedDict

from prefixfast.engine.loop import Loop


class EngineStats(TypedDict):
    """Counters of an engine since it was made.

    Attributes:
        steps: Steps of the scheduler.
        prefill_tokens: Prompt tokens computed.
        continued_prefills: Prefill steps that continued a prompt of an earlier step.
        decode_steps: Decode steps.
        decoded_rows: Decode rows of all decode steps, padding rows not counted.
        loads: Prefixes loaded into the KV arena.
        evictions: Prefixes evicted from the KV arena to make room.
        cancelled: Requests that ended since they were cancelled.
        expired: Requests that ended at their deadline.
        reads: Prefixes read from files.
    """

    steps: int
    prefill_tokens: int
    continued_prefills: int
    decode_steps: int
    decoded_rows: int
    loads: int
    evictions: int
    cancelled: int
    expired: int
    reads: int


def engine_stats(loop: Loop) -> EngineStats:
    """Counters of an engine.

    Args:
        loop: Loop of the engine.
    """
    counts = loop.counts
    return EngineStats(
        steps=counts["steps"],
        prefill_tokens=counts["prefill_tokens"],
        continued_prefills=counts["continued_prefills"],
        decode_steps=counts["decode_steps"],
        decoded_rows=counts["decoded_rows"],
        loads=counts["loads"],
        evictions=counts["evictions"],
        cancelled=counts["cancelled"],
        expired=counts["expired"],
        reads=loop.prefix_cache.loader.num_reads,
    )
