"""Requests put directly into an engine's loop, for suites that time single steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefixfast.config import GenerationParams
from prefixfast.engine.engine import Engine
from prefixfast.engine.make_requests import make_requests


def add_requests(
    engine: Engine, prompts: Sequence[Sequence[int]], prefixes: Any, params: GenerationParams
) -> list[int]:
    """Add prompts of token ids to the loop of an engine, which the caller steps.

    Args:
        engine: Engine whose loop gets the requests.
        prompts: Token ids of each request.
        prefixes: Prefixes as `Engine.generate` takes them.
        params: Parameters of all requests.

    Returns:
        Numbers of the requests in the loop.
    """
    requests = make_requests(engine.model, prompts, prefixes, params, engine.max_model_len, engine.store)
    numbers = [next(engine.driver.next_number) for _ in requests]
    for number, request in zip(numbers, requests, strict=True):
        engine.loop.add(number, request)
    return numbers
