"""`RequestSubmission`, the methods of `Engine` that queue single requests for the engine's thread."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Unpack

from transformers import LogitsProcessorList

from prefixfast.config import EngineConfig, GenerationParams
from prefixfast.config.fields import GenerationParamsFields
from prefixfast.config.options import INT32_MAX, plain_number
from prefixfast.data.encode import Input
from prefixfast.engine.driver import LoopDriver
from prefixfast.engine.request import Generation, Request
from prefixfast.engine.request_factory import RequestFactory, call_params
from prefixfast.engine.request_prefixes import PrefixLike
from prefixfast.engine.stream import Stream, TextPieces
from prefixfast.engine.ticket import Ticket, seconds
from prefixfast.errors import ConfigError, RequestError, shown
from prefixfast.model.base import Model


class SubmitFields(GenerationParamsFields, total=False):
    """Keyword arguments of `Engine.submit`."""

    params: GenerationParams | None
    logits_processor: LogitsProcessorList | None
    tenant: str | None
    priority: int
    timeout: float | None


class RequestSubmission:
    """Requests that come one at a time, as tickets, streams and coroutines."""

    model: Model
    config: EngineConfig
    driver: LoopDriver
    requests: RequestFactory

    def submit(
        self,
        item: Input,
        prefix: PrefixLike = None,
        *,
        params: GenerationParams | None = None,
        logits_processor: LogitsProcessorList | None = None,
        tenant: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        **fields: Unpack[GenerationParamsFields],
    ) -> Ticket:
        """Queue one request for the engine's thread, and return its `Ticket` at once.

        If the engine has no thread yet and another thread is inside `generate`, the call waits for that batch.

        Args:
            item: Prompt, as a string, a list of token ids or a row. The target of a row is not read.
            prefix: Prefix, name in the store, or sequence of them from left to right. None generates without a prefix.
            params: Generation parameters.
            logits_processor: Logits processors of transformers or of your own, applied after those that the parameters
                ask for. Each one is called once per step, which is slow.
            tenant: Name of the tenant. Tenants of one priority get equal service. None groups requests by their first
                prefix.
            priority: Priority; requests of a higher priority are scheduled first.
            timeout: Seconds until the deadline, at which the request ends with the tokens so far and
                ``finish_reason="deadline"``. None sets no deadline.
            fields: Fields of `GenerationParams`, which take precedence over ``params``.

        Raises:
            RequestError: For a wrong request.
            CapacityError: If ``max_waiting`` requests are waiting already.
            ConfigError: For arguments that do not fit.
        """
        self.driver.check_callable("submit")
        request = self.requests.make_one(item, prefix, call_params(params, fields), logits_processor)
        return self.driver.submit(_scheduled(request, tenant, priority, timeout))

    def stream(
        self,
        item: Input,
        prefix: PrefixLike = None,
        *,
        params: GenerationParams | None = None,
        logits_processor: LogitsProcessorList | None = None,
        tenant: str | None = None,
        priority: int = 0,
        timeout: float | None = None,
        **fields: Unpack[GenerationParamsFields],
    ) -> Stream:
        """Queue one request, and return its text piece by piece. Joined, the pieces are the text of its ``generation``.

        Args:
            item: Prompt, as a string, a list of token ids or a row. The target of a row is not read.
            prefix: Prefix, name in the store, or sequence of them from left to right. None generates without a prefix.
            params: Generation parameters for one text without beams.
            logits_processor: Logits processors of transformers or of your own, applied after those that the parameters
                ask for.
            tenant: Name of the tenant. None groups requests by their first prefix.
            priority: Priority; requests of a higher priority are scheduled first.
            timeout: Seconds until the deadline, at which the text ends. None sets no deadline.
            fields: Fields of `GenerationParams`, which take precedence over ``params``.

        Raises:
            RequestError: For a wrong request, beams or several texts.
            CapacityError: If ``max_waiting`` requests are waiting already.
            ConfigError: If the base model has no tokenizer, or for arguments that do not fit.
        """
        self.driver.check_callable("stream")
        request = self.requests.make_one(item, prefix, call_params(params, fields), logits_processor)
        if request.num_rows > 1:
            msg = f"request 0: stream: expected one text without beams, got {request.num_rows} rows; use submit"
            raise RequestError(msg, index=0)
        pieces = TextPieces(self.model.require_tokenizer().stream(), strip=request.task.strip)
        scheduled = _scheduled(request, tenant, priority, timeout)
        return Stream(lambda on_token: self.driver.submit(replace(scheduled, on_token=on_token)), pieces)

    def astream(self, item: Input, prefix: PrefixLike = None, **options: Unpack[SubmitFields]) -> Stream:
        """Queue one request, and return its text piece by piece for ``async for``.

        Args:
            item: Prompt, as a string, a list of token ids or a row. The target of a row is not read.
            prefix: Prefix, name in the store, or sequence of them from left to right. None generates without a prefix.
            options: Keyword arguments of `stream`.

        Returns:
            The same `Stream` as that of `stream`.
        """
        return self.stream(item, prefix, **options)

    def cancel(self, request: Ticket | Stream) -> None:
        """End a request at the next step with the tokens so far.

        Args:
            request: Ticket or stream of the request. A request that has ended is not changed.

        Raises:
            ConfigError: If ``request`` is neither.
        """
        given: object = request
        if not isinstance(given, Ticket | Stream):
            msg = f"request: expected a Ticket or a Stream, got {shown(request)}"
            raise ConfigError(msg)
        request.cancel()

    async def agenerate(self, item: Input, prefix: PrefixLike = None, **options: Unpack[SubmitFields]) -> Generation:
        """Queue one request, and wait for its `Generation` without blocking the event loop.

        A cancelled task cancels its request.

        Args:
            item: Prompt, as a string, a list of token ids or a row. The target of a row is not read.
            prefix: Prefix, name in the store, or sequence of them from left to right. None generates without a prefix.
            options: Keyword arguments of `submit`.

        Raises:
            RequestError: For a wrong request.
            CapacityError: If ``max_waiting`` requests are waiting already.
            ConfigError: For arguments that do not fit.
        """
        self.driver.check_callable("agenerate", waits=True)
        # The call can wait for the engine's thread, or for a batch in another thread.
        if self.config.share_prompts or self.driver.lock.locked():
            submitted = asyncio.get_running_loop().run_in_executor(None, lambda: self.submit(item, prefix, **options))
            try:
                ticket = await asyncio.shield(submitted)
            except asyncio.CancelledError:
                submitted.add_done_callback(lambda done: None if done.exception() else done.result().cancel())
                raise
        else:
            ticket = self.submit(item, prefix, **options)
        try:
            return await ticket
        except BaseException:
            ticket.cancel()
            raise


def _scheduled(request: Request, tenant: str | None, priority: int, timeout: float | None) -> Request:
    """The request with its tenant, priority and deadline."""
    timeout, priority = seconds(timeout, least=0), plain_number(priority)
    wrong = {
        ("tenant", "a string or None"): (tenant, not isinstance(tenant, str | None)),
        ("priority", "an integer of 32 bits"): (priority, type(priority) is not int or abs(priority) > INT32_MAX),
    }
    for (name, expected), (value, is_wrong) in wrong.items():
        if is_wrong:
            msg = f"{name}: expected {expected}, got {shown(value)}"
            raise ConfigError(msg)
    deadline = None if timeout is None else time.monotonic() + timeout
    return replace(request, tenant=tenant, priority=priority, deadline=deadline)
