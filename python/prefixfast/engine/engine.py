"""`Engine`, which generates and scores for requests with any mix of prefixes over one frozen base model."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

from transformers import LogitsProcessorList, PreTrainedModel

from prefixfast.config import EngineConfig, EngineFields, GenerationParams
from prefixfast.config.engine import BASE_FIELDS
from prefixfast.config.fields import GenerationParamsFields
from prefixfast.config.json_types import JSON
from prefixfast.data.encode import Input
from prefixfast.engine.driver import LoopDriver
from prefixfast.engine.explain import EngineExplanation, explain, memory_summary
from prefixfast.engine.kv_arena import DEFAULT_MAX_MODEL_LEN
from prefixfast.engine.loop import Loop
from prefixfast.engine.output import error_generation
from prefixfast.engine.pinning import PrefixPinning
from prefixfast.engine.request import Generation
from prefixfast.engine.request_factory import RequestFactory, call_params
from prefixfast.engine.request_prefixes import Prefixes
from prefixfast.engine.sampling_params import warn_unsupported_defaults
from prefixfast.engine.score import Score, score_requests
from prefixfast.engine.score_inputs import make_score_requests
from prefixfast.engine.seq2seq_prompts import check_engine_options
from prefixfast.engine.settings_line import call_settings, generation_settings
from prefixfast.engine.stats import EngineStats, engine_stats
from prefixfast.engine.submission import RequestSubmission
from prefixfast.errors import ConfigError, check_choice, check_flag, shown
from prefixfast.io.progress import Progress, show_progress
from prefixfast.model import kept_memory
from prefixfast.model.base import Model
from prefixfast.model.load import load
from prefixfast.model.process import check_num_threads
from prefixfast.model.shared_base import check_base_fields
from prefixfast.model.tokenizer import Tokenizer
from prefixfast.prefix.tuned_weights import TunedWeights
from prefixfast.store import PrefixStore, open_store

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


class Engine(RequestSubmission, PrefixPinning):
    """Generates and scores for requests with any mix of prefixes over one frozen base model.

    `generate` and `score` run a batch in the caller's thread. The first `submit`, `stream` or `agenerate` starts a
    thread that owns the model from then on; later batches go through this thread too. A logits processor cannot call
    its own engine, except for `cancel`. A callback of a ticket can, except for calls that wait for requests. A process
    that was forked later cannot use the engine. The end of the program cancels what still runs.

    Example:
        >>> with Engine(base, max_num_seqs=8) as engine:
        ...     now = engine.generate(["2+2="], prefix, max_new_tokens=3)[0]
        ...     ticket = engine.submit("2+2=", prefix, max_new_tokens=3)
        ...     stream = engine.stream("2+2=", prefix, max_new_tokens=3)
        ...     scored = engine.score(["2+2="], prefix, targets=["4"])[0]
        ...     "".join(stream) == ticket.result().text == now.text, scored.logprob < 0
        (True, True)

    Args:
        model: Base model: hub id, folder, Hugging Face model (attached until `close`), PeftModel or `Model`.
        store: Store of the prefixes that are given by name. A path is opened read-only.
        config: Memory and batching options, an `EngineConfig` or a mapping.
        fields: Fields of `EngineConfig`, which take precedence over ``config``.

    Raises:
        ConfigError: For options that do not fit.
        CapacityError: If ``kv_cache_memory`` is too small for any request.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel | PeftModel | Model,
        *,
        store: PrefixStore | str | Path | None = None,
        config: EngineConfig | Mapping[str, JSON] | None = None,
        **fields: Unpack[EngineFields],
    ) -> None:
        self.config = EngineConfig.make(config, **fields)
        self.store = open_store(store, read_only=True)
        self._owns_model = not isinstance(model, Model)
        base_fields = {name: getattr(self.config, name) for name in BASE_FIELDS}
        self.model = load(model, **base_fields) if isinstance(model, str | Path) else load(model)
        try:
            check_base_fields(self.model, **base_fields)
            with self.model.guard.running():  # copies and graphs of weights are those of one state
                self._allocate()
        except BaseException:
            if self._owns_model:
                self.model.close()
            raise

    def _allocate(self) -> None:
        check_num_threads(self.config.num_threads)
        check_engine_options(self.model, self.config.share_prompts)
        self.max_model_len = min(self.config.max_model_len or DEFAULT_MAX_MODEL_LEN, self.model.max_positions)
        if self.config.prepack and self.model.device.type == "cpu":
            self.model.prepack()
        self.loop = Loop(self.model, self.config, self.max_model_len, end_ids(self.model.hf, self.model.tokenizer))
        self.driver = LoopDriver(self.model, self.loop, self.config.num_threads)
        self.requests = RequestFactory(self.model, self.config, self.max_model_len, self.store, self.driver)
        warn_unsupported_defaults(self.model)
        kept_memory.hold()
        self._release_memory = weakref.finalize(self, kept_memory.release)
        logger.debug(memory_summary(self.model, self.loop, self.config))

    def generate(
        self,
        batch: Sequence[Input],
        prefixes: Prefixes = None,
        *,
        params: GenerationParams | None = None,
        logits_processor: LogitsProcessorList | None = None,
        on_error: Literal["raise", "return"] = "raise",
        progress: bool | None = None,
        **fields: Unpack[GenerationParamsFields],
    ) -> list[Generation]:
        """Generate for a batch.

        Args:
            batch: Prompts, as strings, lists of token ids or rows. The target of a row is not read.
            prefixes: One prefix for all requests; one entry per request (None, a prefix, or a sequence of prefixes from
                left to right); or a mapping of names to entries for rows with a ``prefix`` key. With a store, a prefix
                can be a name in the store, and None lets rows name theirs. `TunedWeights` act in the base model for
                all requests of the call.
            params: Generation parameters.
            logits_processor: Logits processors of transformers or of your own, applied to every request after those
                that the parameters ask for. Each one is called once per step and request, which is slow.
            on_error: Handling of a request that is wrong or fails: ``"raise"`` raises its error, ``"return"`` gives a
                `Generation` with the ``error`` and runs the other requests.
            progress: Whether to report progress. None shows a bar on a terminal or in a notebook, and elsewhere a line
                every 10 s. True shows the bar everywhere.
            fields: Fields of `GenerationParams`, which take precedence over ``params``.

        Returns:
            One `Generation` per request, in the order of the batch.

        Raises:
            RequestError: For a wrong request, before any work.
            UnknownPrefixError: For a name that the store does not have, before any work.
            BaseMismatchError: For a prefix of another base model, before any work.
            ConfigError: For arguments that do not fit.
            CapacityError: If a request can never fit the KV arena or the decode rows.
        """
        self.driver.check_callable("generate", waits=True)
        check_choice("on_error", on_error, ("raise", "return"))
        if progress is not None:
            check_flag("progress", progress)
        call, only_good = call_params(params, fields), on_error == "return"
        with show_progress(progress):
            with Progress("prepare requests"):
                requests, errors = self.requests.make(batch, prefixes, call, logits_processor, only_good=only_good)
            logger.info("%s", generation_settings(self.model, requests))
            with Progress("generate", len(requests), "requests") as work:
                results = self.driver.run(requests, work, _weights(prefixes))
        if on_error == "raise":
            for result in results:
                if isinstance(result, BaseException):
                    raise result
        ended = {r.index: result for r, result in zip(requests, results, strict=True)} | errors
        return [
            error_generation(i, item, found) if isinstance(found := ended[i], BaseException) else found
            for i, item in enumerate(batch)
        ]

    def score(
        self,
        batch: Sequence[Input],
        prefixes: Prefixes = None,
        *,
        targets: Sequence[str | Sequence[int]] | None = None,
        end_token: bool = False,
        progress: bool | None = None,
    ) -> list[Score]:
        """Log-probabilities (natural log) of targets.

        Args:
            batch: Prompts, as strings, lists of token ids or rows. Rows of all formats of training have their targets.
            prefixes: One prefix for all requests; one entry per request (None, a prefix, or a sequence of prefixes from
                left to right); or a mapping of names to entries for rows with a ``prefix`` key. With a store, a prefix
                can be a name in the store, and None lets rows name theirs. `TunedWeights` act in the base model for
                all requests of the call.
            targets: Target of each request, text or token ids. None takes the targets of the rows.
            end_token: Whether the end token after each target is scored too, as in training.
            progress: Whether to report progress. None shows a bar on a terminal or in a notebook, and elsewhere a line
                every 10 s. True shows the bar everywhere.

        Returns:
            One `Score` per request, in the order of the batch.

        Raises:
            RequestError: For a wrong request or target.
            UnknownPrefixError: For a name that the store does not have.
            BaseMismatchError: For a prefix of another base model.
            ConfigError: For arguments that do not fit.
        """
        self.driver.check_callable("score")
        if progress is not None:
            check_flag("progress", progress)
        with show_progress(progress):
            with Progress("prepare requests"):
                requests = make_score_requests(
                    self.model, batch, prefixes, targets, end_token=end_token, store=self.store
                )
            logger.info("%s", call_settings(self.model, requests))
            with Progress("score", len(requests), "requests") as work:

                def job() -> list[Score]:
                    with self.model.run():
                        return score_requests(self.model, requests, self.config.max_num_batched_tokens, work)

                return self.driver.between_steps("score", job, _weights(prefixes))

    def stats(self) -> EngineStats:
        """Counters since the engine was made, such as ``steps``, ``decoded_rows``, ``loads`` and ``evictions``."""
        return engine_stats(self.loop)

    def explain(self) -> EngineExplanation:
        """Implementation of each operator of this engine, and the reason why no faster one is used."""
        return explain(self.model, self.loop, self.config)

    def close(self) -> None:
        """Free the KV arena, end the engine's thread and cancel its requests. A Hugging Face model is restored.

        Waits for a `generate` of another thread.

        Raises:
            ConfigError: In a logits processor, or in a callback of a ticket, which runs in the engine's own thread.
        """
        self.driver.check_outside("close", waits=True)
        self.driver.close()
        self._release_memory()
        if self._owns_model:
            self.model.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _weights(prefixes: Prefixes) -> TunedWeights | None:
    """Trained weights in the place of the one prefix of all requests, None for prefixes."""
    return prefixes if isinstance(prefixes, TunedWeights) else None


def end_ids(hf: PreTrainedModel, tokenizer: Tokenizer | None) -> list[int]:
    """End tokens of the base model's ``generation_config``, else the end token of its tokenizer.

    Raises:
        ConfigError: If the ``generation_config`` holds something else.
    """
    found = getattr(getattr(hf, "generation_config", None), "eos_token_id", None)
    if found is None and tokenizer is not None:
        found = tokenizer.eos_id
    if found is None:
        return []
    ids = [found] if isinstance(found, int) else found
    if not isinstance(ids, list | tuple) or not all(type(i) is int for i in ids):
        msg = f"generation_config.eos_token_id: expected a token id or a list of them, got {shown(found)}"
        raise ConfigError(msg)
    return list(ids)
