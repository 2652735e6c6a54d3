"""Runs of a whole batch: in the caller's thread, or through tickets of the engine's thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from prefixfast.engine.loop import Loop
from prefixfast.engine.output import RequestOutput
from prefixfast.engine.request import Generation, Request
from prefixfast.engine.ticket import Ticket, request_error
from prefixfast.io.progress import Progress
from prefixfast.model.process import check_not_exiting


def run_batch(
    loop: Loop,
    requests: list[tuple[int, Request]],
    work: Progress,
    on_output: Callable[[RequestOutput], None] | None = None,
) -> list[RequestOutput]:
    """Run steps of a loop until all requests have ended.

    Args:
        loop: Loop of the engine.
        requests: Requests with their numbers.
        work: Progress that counts the finished requests.
        on_output: Function that is called with each output as soon as its request has ended, between two steps.

    Returns:
        Outputs in the order of the requests. An error that concerns some of the requests is in their outputs, any other
        error ends all requests and is raised.
    """
    waiting = deque(requests)
    num_beams = max((r.params.num_beams or 1 for _, r in requests), default=1)
    num_decoded = loop.counts["decoded_rows"]
    ended: dict[int, RequestOutput] = {}
    try:
        while waiting or loop.busy:
            check_not_exiting()
            while waiting and not loop.queue_full:
                number, request = waiting.popleft()
                try:
                    loop.add(number, request)
                except Exception as e:
                    ended[number] = RequestOutput(request, [], request_error(e))
            outputs = loop.step() if loop.busy else {}
            ended |= outputs
            if on_output is not None:
                for output in outputs.values():
                    on_output(output)
            work.update(len(outputs), tokens=(loop.counts["decoded_rows"] - num_decoded) // num_beams)
            num_decoded = loop.counts["decoded_rows"]
    except BaseException:
        loop.restart()
        raise
    return [ended[number] for number, _ in requests]


def wait_for_tickets(submits: Iterable[Callable[[], Ticket]], work: Progress) -> list[Generation | BaseException]:
    """Submit requests and wait for all of them. An interrupt cancels them.

    Args:
        submits: Functions that submit one request each.
        work: Progress that counts the finished requests.

    Returns:
        Result or error of each request, in their order.
    """
    tickets: list[Ticket] = []
    try:
        tickets += (submit() for submit in submits)
        results: list[Generation | BaseException] = []
        for ticket in tickets:
            tokens = 0
            try:
                results.append(result := ticket.result())
                tokens = result.usage.get("completion_tokens", 0)
            except Exception as e:
                results.append(e)
            work.update(tokens=tokens)
    except BaseException:
        for ticket in tickets:
            ticket.cancel()
        raise
    return results
