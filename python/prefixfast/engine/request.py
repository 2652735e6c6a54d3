"""What goes into the engine and what comes out, and the checks between a user's batch and both."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import LogitsProcessorList

from prefixfast.config import GenerationParams
from prefixfast.data.encode import Input, encode_prompts, request_error
from prefixfast.data.formats import CHAT_KEYS, INPUT_KEYS, TARGET_KEYS
from prefixfast.data.tasks import PLAIN, Task, request_task
from prefixfast.engine.sampling_params import NOTHING, base_defaults, check_params, resolve
from prefixfast.errors import ConfigError, PrefixFastError, RequestError
from prefixfast.model.base import Model
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import PrefixStore, StoredPrefix

logger = logging.getLogger(__name__)
KNOWN_KEYS = frozenset({"input_ids", "prefix", "id", "params", "labels", *INPUT_KEYS, *TARGET_KEYS, *CHAT_KEYS})


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities (natural log) at one generated token, as the model gives them before any rule.

    Attributes:
        token_id: The token that was chosen.
        logprob: Its log-probability.
        top: The likeliest tokens and their log-probabilities, the best first.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True)
class Generation:
    """One request's result; ``str(generation)`` is its text.

    Attributes:
        index: Place in the batch.
        id: The request's ``id``, if it had one.
        text: Without special tokens; a stop string stays in it.
        texts: All texts of the request, ``text`` first: as many as ``num_return_sequences``.
        token_ids: Generated tokens of ``text``, the end token included.
        finish_reason: ``"stop"`` (end token or stop string), ``"length"``, ``"cancelled"``, ``"deadline"`` or ``"error"``.
        score: Beam search's length-normalized log-probability (natural log); None without beams.
        logprobs: One entry for each of ``token_ids``; None unless asked for.
        prefix_digest: Digests of the request's prefixes, joined by "+"; None without one.
        usage: ``prompt_tokens``, ``completion_tokens`` (of all texts), ``prefix_rows``.
        error: With ``on_error="return"`` what went wrong, as ``"class: message"``; else None.
    """

    index: int
    id: Any
    text: str
    texts: list[str]
    token_ids: list[int]
    finish_reason: str
    score: float | None
    logprobs: list[TokenLogprob] | None
    prefix_digest: str | None
    usage: dict[str, int]
    error: str | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        index: Place in the batch.
        id: As the user gave it.
        ids: Prompt tokens that are computed for this request, int32.
        prompt: All prompt tokens, int32: with shared leading text more than ``ids``.
        prefixes: Left to right.
        params: Resolved; only ``seed`` and ``logprobs`` may be None.
        task: How the text is cleaned.
        processors: The caller's own logits processors.
        tenant: Who asks; None: whoever uses the first prefix.
        priority: Higher goes first.
        deadline: When it is dropped, in seconds of `time.monotonic`; None for never.
        shared: Leading prompt tokens that the last prefix stands for.
        watch: Called in the engine's thread with each token of the first text.
    """

    index: int
    id: Any
    ids: NDArray[np.int32]
    prompt: NDArray[np.int32]
    prefixes: tuple[Prefix | StoredPrefix, ...]
    params: GenerationParams
    task: Task
    processors: LogitsProcessorList | None = None
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None
    shared: int = 0
    watch: Callable[[int], None] | None = None

    @property
    def search(self) -> bool:
        """Whether beams are searched."""
        return (self.params.num_beams or 1) > 1

    @property
    def rows(self) -> int:
        """Decode rows: one a beam, or one a sample."""
        return (self.params.num_beams or 1) if self.search else (self.params.num_return_sequences or 1)


def make_requests(
    model: Model,
    batch: Sequence[Input],
    prefixes: Any,
    call: GenerationParams | None,
    max_model_len: int,
    store: PrefixStore | None = None,
    processors: LogitsProcessorList | None = None,
) -> list[Request]:
    """Check a whole batch before any work.

    Args:
        model: The base.
        batch: Prompts: strings, lists of token ids, or rows without their target.
        prefixes: None, one prefix for all, one entry a request (each None, a prefix, or a sequence that composes), or a mapping for rows with a ``prefix`` key.
        call: Parameters of this call; None: nothing is generated, so that none are looked for and the prompt may fill all positions.
        max_model_len: Longest prompt plus generation in tokens.
        store: Where a prefix that is given by name lies.
        processors: The caller's own logits processors.

    Raises:
        RequestError: For one bad request, with its index.
        ConfigError: For arguments that do not fit each other.
        UnknownPrefixError: For a name that the store does not have.
        BaseMismatchError: For a prefix of another base.
    """
    if isinstance(batch, str | Mapping) or not isinstance(batch, Sequence) or (batch and isinstance(batch[0], int)):
        got = "a flat list of ints" if isinstance(batch, list) else type(batch).__name__
        msg = f"batch: expected a sequence of requests, got {got}; wrap one request in a list"
        raise ConfigError(msg)
    chosen = assign(batch, prefixes, store)
    for prefix in {id(p): p for ps in chosen for p in ps}.values():
        check_fits(model, prefix)
    tasks = _tasks(batch, chosen)
    ids = encode_prompts(model, batch, tasks)
    inherited = base_defaults(model) if call is not None else NOTHING
    requests = []
    for i, (item, own, ps, task) in enumerate(zip(batch, ids, chosen, tasks, strict=True)):
        room = model.max_positions - max((p.pos_start for p in ps), default=0)
        if call is None:
            params = NOTHING
            if len(own) > room:
                msg = f"request {i}: {len(own)} prompt tokens exceed the base's {room} positions"
                raise RequestError(msg, index=i)
            requests.append(
                Request(i, item.get("id") if isinstance(item, Mapping) else None, own, own, ps, params, task)
            )
            continue
        limit = min(max_model_len, room)
        params = resolve(item, i, [p.decoding for p in ps], call, inherited, len(own), limit)
        check_params(params, i, model.vocab_size)
        requests.append(
            Request(i, item.get("id") if isinstance(item, Mapping) else None, own, own, ps, params, task, processors)
        )
    return requests


def one_by_one(
    batch: Sequence[Input], prefixes: Any, check: Callable[[Sequence[Input], Any], list[Request]]
) -> tuple[list[Request], dict[int, BaseException]]:
    """Check a batch in which something is wrong request by request: the good ones, and by index what is wrong with the others."""
    good: list[Request] = []
    bad: dict[int, BaseException] = {}
    each = isinstance(prefixes, Sequence) and not isinstance(prefixes, str)
    for i, item in enumerate(batch):
        try:
            good += (replace(r, index=i) for r in check([item], [prefixes[i]] if each else prefixes))
        except PrefixFastError as e:
            text = str(e).replace("request 0", f"request {i}")
            bad[i] = RequestError(text, index=i) if isinstance(e, RequestError) else type(e)(text)
    return good, bad


def failed(index: int, item: Input, error: BaseException) -> Generation:
    """The result of a request that could not be served."""
    name = item.get("id") if isinstance(item, Mapping) else None
    return Generation(index, name, "", [], [], "error", None, None, None, {}, f"{type(error).__name__}: {error}")


Chosen = tuple[Prefix | StoredPrefix, ...]


def assign(batch: Sequence[Input], prefixes: Any, store: PrefixStore | None) -> list[Chosen]:
    """The prefixes of every request."""
    named = next((i for i, item in enumerate(batch) if isinstance(item, Mapping) and "prefix" in item), None)
    if named is not None and prefixes is None and store is not None:
        prefixes = store
    if named is not None and not isinstance(prefixes, Mapping):
        msg = f"request {named}: its 'prefix' key needs prefixes to be a mapping of names to prefixes, or a store, got {type(prefixes).__name__}"
        raise RequestError(msg, index=named)
    if prefixes is None or isinstance(prefixes, Prefix | StoredPrefix | str):
        return [_composition(prefixes, i, store) for i in range(len(batch))]
    if isinstance(prefixes, Mapping):
        out = []
        for i, item in enumerate(batch):
            name = item.get("prefix") if isinstance(item, Mapping) else None
            if not isinstance(name, str) or name not in prefixes:
                msg = f"request {i}: expected a 'prefix' key with one of {[str(n) for n in itertools.islice(prefixes, 10)]}, got {name!r}"
                raise RequestError(msg, index=i)
            found = prefixes.info(name) if isinstance(prefixes, PrefixStore) else prefixes[name]
            out.append(_composition(found, i, store))
        return out
    if not isinstance(prefixes, Sequence):
        got = type(prefixes).__name__
        msg = f"prefixes: expected a Prefix, a sequence with one entry a request, or a mapping, got {got}; read a folder with Prefix.from_pretrained"
        raise ConfigError(msg)
    if len(prefixes) != len(batch):
        msg = f"prefixes: expected one entry for each of the {len(batch)} requests, got {len(prefixes)}; one prefix for all is given without a list"
        raise ConfigError(msg)
    return [_composition(entry, i, store) for i, entry in enumerate(prefixes)]


def _composition(entry: Any, index: int, store: PrefixStore | None) -> Chosen:
    composed = isinstance(entry, Sequence) and not isinstance(entry, str)
    parts = () if entry is None else tuple(entry) if composed else (entry,)
    if store is not None:
        parts = tuple(store.info(part) if isinstance(part, str) else part for part in parts)
    for part in parts:
        if not isinstance(part, Prefix | StoredPrefix):
            msg = (
                f"request {index}: prefix: expected a Prefix, None or a sequence of Prefix, got {part!r:.80}; read a folder with Prefix.from_pretrained, "
                "or give Engine(store=...) for names"
            )
            raise RequestError(msg, index=index)
    if len({p.digest for p in parts}) != len(parts):
        msg = f"request {index}: the same prefix twice in one composition"
        raise RequestError(msg, index=index)
    return parts


def _tasks(batch: Sequence[Input], chosen: list[Chosen]) -> list[Task]:
    """The task of every request: its last prefix's, else told by the row. Requests of one task share one object."""
    by_spec: dict[str, Task] = {}
    keys: dict[int, str] = {}
    out = []
    for i, (item, prefixes) in enumerate(zip(batch, chosen, strict=True)):
        spec = next((p.task for p in reversed(prefixes) if p.task is not None), None)
        task = PLAIN
        if spec is not None:
            key = keys.get(id(spec)) or keys.setdefault(id(spec), json.dumps(dict(spec), sort_keys=True))
            task = by_spec.get(key) or by_spec.setdefault(key, Task.from_spec(spec))
        if isinstance(item, Mapping):
            if unknown := set(item) - KNOWN_KEYS:
                msg = f"request {i}: unknown keys {sorted(map(str, unknown))}; known are {sorted(KNOWN_KEYS)}"
                raise RequestError(msg, index=i)
            with request_error(i):
                task = request_task(task, item)
        out.append(task)
    return out
