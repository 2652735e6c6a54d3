"""`RequestFactory`, which makes the checked requests of an engine, with seeds and shared prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import LogitsProcessorList

from prefixfast.config import EngineConfig, GenerationParams, unknown_option
from prefixfast.config.fields import GenerationParamsFields
from prefixfast.data.encode import Input
from prefixfast.engine.driver import LoopDriver
from prefixfast.engine.make_requests import make_good_requests, make_requests
from prefixfast.engine.request import Request
from prefixfast.engine.request_prefixes import Prefixes, PrefixLike, is_weights
from prefixfast.engine.shared_prompts import SharedPrompts
from prefixfast.errors import ConfigError, PrefixFastError
from prefixfast.model.base import Model
from prefixfast.store import PrefixStore


class RequestFactory:
    """Makes requests of what callers pass to an engine.

    Args:
        model: Base model.
        config: Options of the engine.
        max_model_len: Largest number of prompt and generated tokens of a request.
        store: Store of the prefixes that are given by name.
        driver: Owner of the thread in which shared prompts are computed.
    """

    def __init__(
        self, model: Model, config: EngineConfig, max_model_len: int, store: PrefixStore | None, driver: LoopDriver
    ) -> None:
        self.model, self.max_model_len, self.store, self.driver = model, max_model_len, store, driver
        self.seed_generator = np.random.default_rng(config.seed)
        self.shared_prompts = SharedPrompts(model, config.share_prompts) if config.share_prompts else None

    def make_one(
        self, item: Input, prefix: PrefixLike, call: GenerationParams, processors: LogitsProcessorList | None
    ) -> Request:
        """Make one request.

        Args:
            item: Prompt, as a string, a list of token ids or a row.
            prefix: Prefix, name in the store, or sequence of them from left to right. None generates without a prefix.
            call: Generation parameters of the call.
            processors: The caller's own logits processors.

        Raises:
            RequestError: For a wrong request.
            ConfigError: For arguments that do not fit, or a closed engine.
        """
        (request,), _ = self.make([item], None if prefix is None else [prefix], call, processors)
        return request

    def make(
        self,
        batch: Sequence[Input],
        prefixes: Prefixes,
        call: GenerationParams,
        processors: LogitsProcessorList | None,
        *,
        only_good: bool = False,
    ) -> tuple[list[Request], dict[int, BaseException]]:
        """Make the requests of a batch.

        Args:
            batch: Prompts, as strings, lists of token ids or rows.
            prefixes: Prefixes of the batch, as `Engine.generate` takes them.
            call: Generation parameters of the call.
            processors: The caller's own logits processors.
            only_good: Whether to leave out wrong requests instead of raising their errors.

        Returns:
            Checked requests with their seeds, and the errors of the requests left out by place in the batch.

        Raises:
            RequestError: For a wrong request.
            ConfigError: For arguments that do not fit each other, or a closed engine.
        """
        if processors is not None and not (isinstance(processors, list) and all(map(callable, processors))):
            got = type(processors).__name__
            msg = f"logits_processor: expected a LogitsProcessorList or a list of processors, got {got}"
            raise ConfigError(msg)

        def make(batch: Sequence[Input], prefixes: Prefixes) -> list[Request]:
            return make_requests(self.model, batch, prefixes, call, self.max_model_len, self.store)

        errors: dict[int, BaseException] = {}
        try:
            requests = make(batch, prefixes)
        except PrefixFastError as e:
            if not only_good or isinstance(e, ConfigError):
                raise
            requests, errors = make_good_requests(batch, prefixes, make)
        requests = [replace(r, params=self._with_seed(r.params), processors=processors) for r in requests]
        if (shared := self.shared_prompts) is not None and not is_weights(prefixes):
            requests = self.driver.between_steps("share_prompts", lambda: shared.split(requests))
        return requests, errors

    def _with_seed(self, params: GenerationParams) -> GenerationParams:
        """Parameters with a random seed, if they sample and have none."""
        if not params.do_sample or params.seed is not None:
            return params
        return replace(params, seed=int(self.seed_generator.integers(2**62)))


def call_params(params: GenerationParams | None, fields: GenerationParamsFields) -> GenerationParams:
    """Generation parameters of a call.

    Args:
        params: Parameters that the caller passed as an object.
        fields: Parameters that the caller passed as keyword arguments, which take precedence.

    Raises:
        ConfigError: If a name is unknown or a value is wrong.
    """
    for name in fields:
        if name not in GenerationParams.names():
            raise ConfigError(unknown_option(name, GenerationParams.names(), "generate"))
    return GenerationParams.make(params, **fields)
