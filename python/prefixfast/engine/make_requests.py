"""Checks that turn a caller's batch into `Request` objects before any work is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from prefixfast.config import GenerationParams
from prefixfast.config.json_types import JSON
from prefixfast.data.builtin_tasks import PLAIN, request_task
from prefixfast.data.columns import content_keys, has_own_columns, missing_columns
from prefixfast.data.encode import Input, check_prompts, encode_prompts, request_error
from prefixfast.data.formats import CORPUS_KEYS, INPUT_KEYS, KNOWN_KEYS
from prefixfast.data.layouts import request_layout_keys
from prefixfast.data.rows import Row
from prefixfast.data.task import Task
from prefixfast.engine.request import Request
from prefixfast.engine.request_prefixes import (
    Assigned,
    Prefixes,
    assign_prefixes,
    attended,
    check_name,
    prefix_source,
    weights_of,
)
from prefixfast.engine.sampling_params import (
    UNSET,
    ParamSources,
    base_defaults,
    check_params,
    given_params,
    resolve_params,
)
from prefixfast.engine.seq2seq_prompts import decoder_prompt, encoder_prompt
from prefixfast.errors import ConfigError, PrefixFastError, RequestError, did_you_mean, shown, suggestion
from prefixfast.prefix.compatibility import (
    base_mismatch,
    check_base,
    check_composition,
    check_shapes,
    described,
    start_position,
)
from prefixfast.prefix.prefix import Prefix
from prefixfast.prefix.tuned_weights import TunedWeights
from prefixfast.store import PrefixStore, StoredPrefix

if TYPE_CHECKING:
    from prefixfast.model.base import Model


def make_requests(
    model: Model,
    batch: Sequence[Input],
    prefixes: Prefixes,
    params: GenerationParams,
    max_model_len: int,
    store: PrefixStore | None = None,
) -> list[Request]:
    """Check a whole batch.

    Args:
        model: Base model.
        batch: Prompts, as strings, lists of token ids or rows. The target of a row is not read.
        prefixes: One prefix for all requests; one entry per request (None, a prefix, or a sequence of prefixes from
            left to right); or a mapping of names to entries for rows with a ``prefix`` key.
        params: Generation parameters of the call.
        max_model_len: Largest number of prompt and generated tokens.
        store: Store of the prefixes that are given by name.

    Returns:
        Requests in the order of the batch.

    Raises:
        RequestError: For a wrong request, with its place in the batch.
        ConfigError: For arguments that do not fit each other.
        UnknownPrefixError: For a name that the store does not have.
        BaseMismatchError: For a prefix of another base model.
    """
    assigned, tasks = prefixes_and_tasks(model, batch, prefixes, store)
    prompts = encode_prompts(model, batch, tasks)
    base = base_defaults(model)
    requests = []
    for i, (item, ids, own, task) in enumerate(zip(batch, prompts, assigned, tasks, strict=True)):
        sources = ParamSources(params, request_value(item, task, "params"), [p.decoding for p in own], base)
        prompt_len, encoder_ids = (len(ids), None) if model.seq2seq is None else (1, ids)
        limit, has_encoder = min(max_model_len, text_positions(model, own)), model.seq2seq is not None
        resolved = resolve_params(sources, i, prompt_len, limit, has_encoder=has_encoder)
        check_params(resolved, i, model)
        if encoder_ids is not None:
            encoder_ids = encoder_prompt(model, encoder_ids, resolved, i)
            ids = decoder_prompt(resolved, i)
        own_id = request_value(item, task, "id")
        made = Request(
            index=i,
            id=own_id,
            ids=ids,
            prompt_ids=ids,
            prefixes=attended(own),
            params=resolved,
            task=task,
            encoder_ids=encoder_ids,
            weights=weights_of(own),
            base_mismatch=base_mismatch(model, own),
        )
        requests.append(made)
    return requests


def prefixes_and_tasks(
    model: Model, batch: Sequence[Input], prefixes: Prefixes, store: PrefixStore | None
) -> tuple[list[tuple[Assigned, ...]], list[Task]]:
    """Prefixes and task of each request of a batch.

    Args:
        model: Base model.
        batch: Requests.
        prefixes: Prefixes of the batch, as for `make_requests`.
        store: Store of the prefixes that are given by name.

    Raises:
        RequestError: For a wrong request, with its place in the batch.
        ConfigError: For arguments that do not fit each other.
        UnknownPrefixError: For a name that the store does not have.
        BaseMismatchError: For a prefix of another base model.
    """
    assigned, tasks = check_batch(batch, prefixes, store)
    distinct = {id(p): p for own in assigned for p in own}.values()
    fingerprint = model.fingerprint if distinct else None
    for prefix in distinct:
        if isinstance(prefix, TunedWeights):
            check_base(model, prefix.base, f"the set of weights {prefix.digest[:12]}", fingerprint)
            if prefix.prefix is not None:  # whose base is this one with the weights in it
                check_shapes(model, prefix.prefix, f"the prefix of the set of weights {prefix.digest[:12]}")
        else:
            what = described(prefix, prefixes)
            check_base(model, prefix.base, what, fingerprint)
            check_shapes(model, prefix, what)
    for i, own in enumerate(assigned):
        with request_error(i):
            check_composition(model, [p.position for p in attended(own)])
        if text_positions(model, own) < 1:
            start = start_position(attended(own))
            msg = (
                f"request {i}: its text starts at position {start} behind its prefixes, expected a position below "
                f"{model.max_positions}, the base model's number of positions; use shorter prefixes"
            )
            raise RequestError(msg, index=i)
    return assigned, tasks


def check_batch(
    batch: Sequence[Input],
    prefixes: Prefixes,
    store: PrefixStore | None,
    types: tuple[type, ...] = (Prefix, StoredPrefix),
) -> tuple[list[tuple[Assigned, ...]], list[Task]]:
    """Prefixes and task of each request, checked as far as no base model is needed.

    Args:
        batch: Requests.
        prefixes: Prefixes of the batch, as for `make_requests`.
        store: Store of the prefixes that are given by name.
        types: Types of a prefix, of which task and decoding defaults are read.

    Raises:
        RequestError: For a wrong request, with its place in the batch.
        ConfigError: For arguments that do not fit each other.
        UnknownPrefixError: For a name that the store does not have.
    """
    _check_sequence(batch)
    assigned = assign_prefixes(batch, prefixes, store, types)
    tasks = _tasks(batch, assigned)
    source = prefix_source(batch, prefixes, store)
    for i, (item, task) in enumerate(zip(batch, tasks, strict=True)):
        check_name(item, i, source, is_text=isinstance(item, Mapping) and "prefix" in content_keys(task, item))
    return assigned, tasks


def check_requests(
    batch: Sequence[Input],
    assigned: Sequence[tuple[Assigned, ...]],
    tasks: Sequence[Task],
    call: GenerationParams,
) -> None:
    """Check prompts and generation parameters of requests as far as no base model is needed.

    Args:
        batch: Requests.
        assigned: Prefixes of each request.
        tasks: Task of each request.
        call: Generation parameters of the call.

    Raises:
        RequestError: For a wrong request, with its place in the batch.
    """
    check_prompts(batch, tasks)
    met: set[tuple[int, ...]] = set()
    for i, (item, own, task) in enumerate(zip(batch, assigned, tasks, strict=True)):
        key, asked = tuple(map(id, own)), request_value(item, task, "params")
        if key not in met or asked is not None:
            given_params(ParamSources(call, asked, [p.decoding for p in own], UNSET), i)
            met.add(key)


def _check_sequence(batch: Sequence[Input]) -> None:
    """Raise `ConfigError` for a batch that is one request, or no sequence."""
    if isinstance(batch, str | Mapping) or not isinstance(batch, Sequence) or (batch and isinstance(batch[0], int)):
        got = "a flat list of ints" if isinstance(batch, list) else type(batch).__name__
        msg = f"batch: expected a sequence of requests, got {got}; wrap one request in a list"
        raise ConfigError(msg)


def text_positions(model: Model, prefixes: Sequence[Assigned]) -> int:
    """Number of positions of the base model that prefixes leave for text."""
    return model.max_positions - start_position(attended(prefixes))


def request_value(item: Input, task: Task, key: str) -> JSON:
    """Value of the ``id`` or ``params`` of a request, None without one, and if the task reads this column as text."""
    return item.get(key) if isinstance(item, Mapping) and key not in content_keys(task, item) else None


def make_good_requests(
    batch: Sequence[Input], prefixes: Prefixes, make: Callable[[Sequence[Input], Prefixes], list[Request]]
) -> tuple[list[Request], dict[int, BaseException]]:
    """Check each request of a batch alone, so that wrong requests do not stop the others.

    Args:
        batch: Prompts.
        prefixes: Prefixes of the batch, as for `make_requests`.
        make: Function that makes the requests of a batch and its prefixes.

    Returns:
        Good requests in the order of the batch, and the error of each other request by its place in the batch.
    """
    good: list[Request] = []
    errors: dict[int, BaseException] = {}
    for i, item in enumerate(batch):
        own = [prefixes[i]] if isinstance(prefixes, Sequence) and not isinstance(prefixes, str) else prefixes
        try:
            good += (replace(r, index=i) for r in make([item], own))
        except PrefixFastError as e:
            text = str(e)  # the number stands at the start; the same words in a user's text stay as they are
            if text.startswith("request 0"):
                text = f"request {i}{text.removeprefix('request 0')}"
            errors[i] = RequestError(text, index=i) if isinstance(e, RequestError) else type(e)(text)
    return good, errors


def prefix_tasks(assigned: Sequence[tuple[Assigned, ...]]) -> list[Task]:
    """Task of the last prefix of each request, or that of plain prompts. Requests of one task share one object.

    Args:
        assigned: Prefixes of each request.

    Raises:
        RequestError: If a prefix holds a wrong task.
    """
    by_spec: dict[str, Task] = {}
    keys: dict[int, str] = {}  # by identity of the prefix's specification, since to write it takes longer
    tasks = []
    for i, prefixes in enumerate(assigned):
        spec = next((p.task for p in reversed(prefixes) if p.task is not None), None)
        task = PLAIN
        if spec is not None:
            key = keys.get(id(spec)) or keys.setdefault(id(spec), json.dumps(dict(spec), sort_keys=True))
            with request_error(i):
                task = by_spec.get(key) or by_spec.setdefault(key, Task.from_spec(spec))
        tasks.append(task)
    return tasks


def unknown_keys(row: Row, task: Task) -> set[str]:
    """Keys of a row that have no meaning; none of a row with columns that the task of its prefix reads."""
    if has_own_columns(task, row):
        return set()
    return set(row) - KNOWN_KEYS - CORPUS_KEYS - request_layout_keys(row, task.format)


def has_input(row: Row, task: Task) -> bool:
    """Whether a row has a key that can be the input of a request to a prefix of a task."""
    return not {*INPUT_KEYS, "input_ids"}.isdisjoint(row) or bool(request_layout_keys(row, task.format))


def _tasks(batch: Sequence[Input], assigned: list[tuple[Assigned, ...]]) -> list[Task]:
    """Task of each request: the task of its last prefix, else the task that fits the row's keys.

    Requests of one task share one object.
    """
    tasks = []
    for i, (item, of_prefix) in enumerate(zip(batch, prefix_tasks(assigned), strict=True)):
        task = of_prefix
        if isinstance(item, Mapping):
            if unknown := unknown_keys(item, task):
                misspelt = [key for key in sorted(map(str, unknown)) if did_you_mean(key, KNOWN_KEYS)]
                if task.format != "columns" and not has_input(item, task) and not misspelt:
                    with request_error(i):
                        request_task(task, item)  # raises
                first = (misspelt or sorted(map(str, unknown)))[0]
                known = f"unknown key {shown(first)}; {suggestion(first, sorted(KNOWN_KEYS), listed=99)}"
                msg = f"request {i}: {missing_columns(task, item) if task.format == 'columns' else known}"
                raise RequestError(msg, index=i)
            with request_error(i):
                task = request_task(task, item)
        tasks.append(task)
    return tasks
