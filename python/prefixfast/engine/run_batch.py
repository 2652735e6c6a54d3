"""A whole batch through a loop in the caller's thread, or through the engine's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from prefixfast.engine.loop import Loop
from prefixfast.engine.output import Outcome
from prefixfast.engine.request import Generation, Request
from prefixfast.engine.ticket import Ticket
from prefixfast.errors import PrefixFastError


def run_all(loop: Loop, requests: list[tuple[int, Request]], bar: Any) -> list[Outcome]:
    """Drive a loop until all have ended; an error that is not one request's ends all of them."""
    waiting = deque(requests)
    ended: dict[int, Outcome] = {}
    try:
        while waiting or loop.busy:
            while waiting and not loop.full:
                number, request = waiting.popleft()
                try:
                    loop.add(number, request)
                except PrefixFastError as e:
                    ended[number] = Outcome(request, [], e)
            done = loop.step() if loop.busy else {}
            ended |= done
            bar.update(len(done))
    except BaseException:
        loop.abandon()
        raise
    return [ended[number] for number, _ in requests]


def wait_all(submits: Iterable[Callable[[], Ticket]], bar: Any) -> list[Generation | BaseException]:
    """Submit all and wait for each; an interrupt cancels them."""
    tickets: list[Ticket] = []
    try:
        tickets += (submit() for submit in submits)
        out: list[Generation | BaseException] = []
        for ticket in tickets:
            try:
                out.append(ticket.result())
            except Exception as e:
                out.append(e)
            bar.update()
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    return out
