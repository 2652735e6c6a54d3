"""`generate` and `score`, which make an engine for one call over the process's cached base model.

This module imports no torch, so that a wrong call is refused at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from prefixfast.config import GenerationFields, GenerationParams, ScoreFields
from prefixfast.config.engine import BASE_FIELDS
from prefixfast.data.encode import Input
from prefixfast.engine.call_checks import Call, CheckedCall, check_generate, check_score
from prefixfast.engine.request_prefixes import Prefixes
from prefixfast.errors import check_flag
from prefixfast.io.progress import show_progress
from prefixfast.store import PrefixStore

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LogitsProcessorList, PreTrainedModel

    from prefixfast.engine.engine import Engine
    from prefixfast.engine.request import Generation
    from prefixfast.engine.score import Score
    from prefixfast.model.base import Model


def generate(
    batch: Sequence[Input],
    prefixes: Prefixes = None,
    *,
    model: str | Path | PreTrainedModel | PeftModel | Model | None = None,
    store: PrefixStore | str | Path | None = None,
    params: GenerationParams | None = None,
    logits_processor: LogitsProcessorList | None = None,
    on_error: Literal["raise", "return"] = "raise",
    progress: bool | None = None,
    **fields: Unpack[GenerationFields],
) -> list[Generation]:
    """Generate for one batch of requests, each with its own prefixes.

    Args:
        batch: Prompts, as strings, lists of token ids or rows. The target of a row is not read.
        prefixes: One prefix for all requests; one entry per request (None, a prefix, or a sequence of prefixes from
            left to right); or a mapping of names to entries for rows with a ``prefix`` key. With a store, a prefix can
            be a name in the store, and None lets rows name theirs. `TunedWeights` act in the base model for all
            requests of the call.
        model: Base model: hub id, folder, Hugging Face model, PeftModel or `Model`. None takes the base model that the
            prefixes name.
        store: Store of the prefixes that are given by name. A path is opened read-only.
        params: Generation parameters.
        logits_processor: Logits processors of transformers or of your own, applied to every request after those that
            the parameters ask for. Each one is called once per step and request, which is slow.
        on_error: Handling of a request that is wrong or fails: ``"raise"`` raises its error, ``"return"`` gives a
            `Generation` with the ``error`` and runs the other requests.
        progress: Whether to report progress. None shows a bar on a terminal or in a notebook, and elsewhere a line
            every 10 s. True shows the bar everywhere.
        fields: Fields of `GenerationParams` and `EngineConfig`; ``seed`` is that of `GenerationParams`.

    Returns:
        One `Generation` per request, in the order of the batch.

    Raises:
        RequestError: For a wrong request, before any work.
        ConfigError: For arguments that do not fit.
        BaseMismatchError: For a prefix of another base model.
        UnknownPrefixError: For a name that the store does not have.
        CapacityError: If a request can never fit.

    Example:
        >>> texts = generate(["Write about tea.", "Write about rain."], [prefix, None], model=base, max_new_tokens=4)
        >>> [t.usage["prefix_rows"] for t in texts], len(texts[1].token_ids) <= 4
        ([14, 0], True)
    """
    return generate_each(
        None,
        batch,
        prefixes,
        model=model,
        store=store,
        params=params,
        logits_processor=logits_processor,
        on_error=on_error,
        progress=progress,
        **fields,
    )


def generate_each(
    on_result: Callable[[Generation], None] | None,
    batch: Sequence[Input],
    prefixes: Prefixes = None,
    *,
    model: str | Path | PreTrainedModel | PeftModel | Model | None = None,
    store: PrefixStore | str | Path | None = None,
    params: GenerationParams | None = None,
    logits_processor: LogitsProcessorList | None = None,
    on_error: Literal["raise", "return"] = "raise",
    progress: bool | None = None,
    **fields: Unpack[GenerationFields],
) -> list[Generation]:
    """Generate as `generate` does, and hand over each result as soon as its request has ended.

    Args:
        on_result: Function that is called with each text, in the order in which they end. An error that it raises ends
            the call. None calls nothing.
        batch: Argument of `generate`.
        prefixes: Argument of `generate`.
        model: Argument of `generate`.
        store: Argument of `generate`.
        params: Argument of `generate`.
        logits_processor: Argument of `generate`.
        on_error: Argument of `generate`.
        progress: Argument of `generate`.
        fields: Fields of `GenerationParams` and `EngineConfig`.
    """

    def report(result: Generation | BaseException) -> None:
        if on_result is not None and not isinstance(result, BaseException):
            on_result(result)

    checked = check_generate(Call(batch, prefixes, model, store), params, on_error, fields)
    if progress is not None:
        check_flag("progress", progress)
    with show_progress(progress), _engine(checked) as engine:
        engine.driver.on_result = None if on_result is None else report
        return engine.generate(
            batch,
            prefixes,
            params=params,
            logits_processor=logits_processor,
            on_error=on_error,
            **checked.own,
        )


def score(
    batch: Sequence[Input],
    prefixes: Prefixes = None,
    *,
    targets: Sequence[str | Sequence[int]] | None = None,
    model: str | Path | PreTrainedModel | PeftModel | Model | None = None,
    store: PrefixStore | str | Path | None = None,
    end_token: bool = False,
    progress: bool | None = None,
    **fields: Unpack[ScoreFields],
) -> list[Score]:
    """Log-probabilities (natural log) of targets, each request with its own prefixes.

    Args:
        batch: Prompts, as strings, lists of token ids or rows. Rows of all formats of training have their targets.
        prefixes: One prefix for all requests; one entry per request (None, a prefix, or a sequence of prefixes from
            left to right); or a mapping of names to entries for rows with a ``prefix`` key. With a store, a prefix can
            be a name in the store, and None lets rows name theirs. `TunedWeights` act in the base model for all
            requests of the call.
        targets: Target of each request, text or token ids. None takes the targets of the rows.
        model: Base model: hub id, folder, Hugging Face model, PeftModel or `Model`. None takes the base model that the
            prefixes name.
        store: Store of the prefixes that are given by name. A path is opened read-only.
        end_token: Whether the end token after each target is scored too, as in training.
        progress: Whether to report progress. None shows a bar on a terminal or in a notebook, and elsewhere a line
            every 10 s. True shows the bar everywhere.
        fields: Fields of `EngineConfig`.

    Returns:
        One `Score` per request, in the order of the batch.

    Raises:
        RequestError: For a wrong request or target.
        ConfigError: For arguments that do not fit.
        BaseMismatchError: For a prefix of another base model.
        UnknownPrefixError: For a name that the store does not have.

    Example:
        >>> found = score(["The capital of France is"], prefix, targets=[" Paris"], model=base)[0]
        >>> len(found.token_logprobs), found.logprob < 0
        (6, True)
    """
    checked = check_score(Call(batch, prefixes, model, store), targets, fields, end_token=end_token)
    # Nothing is generated, so the KV arena is as small as possible.
    if progress is not None:
        check_flag("progress", progress)
    with show_progress(progress), _engine(checked, kv_cache_memory=None, max_num_seqs=1, max_model_len=2) as engine:
        return engine.score(batch, prefixes, targets=targets, end_token=end_token)


@contextlib.contextmanager
def _engine(checked: CheckedCall, **smaller: Any) -> Iterator[Engine]:
    """Context manager of an engine for one call."""
    from prefixfast.engine.engine import Engine
    from prefixfast.model.shared_base import borrowed

    fields: dict[str, Any] = {**checked.engine, **smaller}
    base_fields = {name: value for name, value in fields.items() if name in BASE_FIELDS}
    with borrowed(checked.model, **base_fields) as loaded, Engine(loaded, store=checked.store, **fields) as engine:
        yield engine
