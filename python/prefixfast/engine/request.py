"""What goes into the engine and what comes out, and the checks between a user's batch and both."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefixfast.config import GenerationParams
from prefixfast.data.formats import CHAT_KEYS, INPUT_KEYS, TARGET_KEYS
from prefixfast.data.tasks import PLAIN, Task, request_task
from prefixfast.errors import ConfigError, DataError, RequestError
from prefixfast.model import Model
from prefixfast.prefix import Prefix
from prefixfast.store import PrefixStore, StoredPrefix
from prefixfast.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
Input = str | list[int] | Mapping[str, Any]
BUILT_IN = GenerationParams(max_new_tokens=256, min_new_tokens=0, num_beams=1, length_penalty=1.0, early_stopping=False)
MOST_NEW_TOKENS, MOST_BEAMS = 4096, 64  # caps for values that come from files
KNOWN_KEYS = frozenset({"input_ids", "prefix", "id", "params", "labels", *INPUT_KEYS, *TARGET_KEYS, *CHAT_KEYS})


@dataclass(frozen=True)
class Generation:
    """One request's result; ``str(generation)`` is its text.

    Attributes:
        index: Place in the batch.
        id: The request's ``id``, if it had one.
        text: Without special tokens.
        token_ids: Generated tokens, the end token included.
        finish_reason: ``"stop"`` (end token), ``"length"``, ``"cancelled"`` or ``"deadline"``.
        score: Beam search's length-normalized log-probability (natural log); None for greedy.
        prefix_digest: Digests of the request's prefixes, joined by "+"; None without one.
        usage: ``prompt_tokens``, ``completion_tokens``, ``prefix_rows``.
    """

    index: int
    id: Any
    text: str
    token_ids: list[int]
    finish_reason: str
    score: float | None
    prefix_digest: str | None
    usage: dict[str, int]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        index: Place in the batch.
        id: As the user gave it.
        ids: Prompt tokens, int32.
        prefixes: Left to right.
        params: Resolved, nothing is None.
        task: How the text is cleaned.
        tenant: Who asks; None: whoever uses the first prefix.
        priority: Higher goes first.
        deadline: When it is dropped, in seconds of `time.monotonic`; None for never.
        shared: Leading prompt tokens that the last prefix stands for.
    """

    index: int
    id: Any
    ids: NDArray[np.int32]
    prefixes: tuple[Prefix | StoredPrefix, ...]
    params: GenerationParams
    task: Task
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None
    shared: int = 0


def make_requests(
    model: Model, batch: Sequence[Input], prefixes: Any, call: GenerationParams, max_model_len: int, store: PrefixStore | None = None
) -> list[Request]:
    """Check a whole batch before any work.

    Args:
        model: The base.
        batch: Prompts: strings, lists of token ids, or rows without their target.
        prefixes: None, one prefix for all, one entry a request (each None, a prefix, or a sequence that composes), or a mapping for rows with a ``prefix`` key.
        call: Parameters of this call.
        max_model_len: Longest prompt plus generation in tokens.
        store: Where a prefix that is given by name lies.

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
    chosen = _assign(batch, prefixes, store)
    for prefix in {id(p): p for ps in chosen for p in ps}.values():
        model.check_prefix(prefix)
    tasks = _tasks(batch, chosen)
    ids = _encode(model, batch, tasks)
    inherited = _base_defaults(model)
    requests = []
    for i, (item, own, ps, task) in enumerate(zip(batch, ids, chosen, tasks, strict=True)):
        limit = min(max_model_len, model.max_positions - max((p.pos_start for p in ps), default=0))
        params = _params(item, i, ps, call, inherited, len(own), limit)
        requests.append(Request(i, item.get("id") if isinstance(item, Mapping) else None, own, ps, params, task))
    return requests


Chosen = tuple[Prefix | StoredPrefix, ...]


def _assign(batch: Sequence[Input], prefixes: Any, store: PrefixStore | None) -> list[Chosen]:
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
        spec = next((p.linearizer for p in reversed(prefixes) if p.linearizer is not None), None)
        task = PLAIN
        if spec is not None:
            key = keys.get(id(spec)) or keys.setdefault(id(spec), json.dumps(dict(spec), sort_keys=True))
            task = by_spec.get(key) or by_spec.setdefault(key, Task.from_spec(spec))
        if isinstance(item, Mapping):
            if unknown := set(item) - KNOWN_KEYS:
                msg = f"request {i}: unknown keys {sorted(map(str, unknown))}; known are {sorted(KNOWN_KEYS)}"
                raise RequestError(msg, index=i)
            with _request_error(i):
                task = request_task(task, item)
        out.append(task)
    return out


def _encode(model: Model, batch: Sequence[Input], tasks: list[Task]) -> list[NDArray[np.int32]]:
    """Token ids of every prompt; rows of one task are linearized together."""
    texts = {i: item for i, item in enumerate(batch) if isinstance(item, str)}
    chats: dict[int, str] = {}  # the chat template has written their special tokens
    rows_of: dict[int, list[int]] = {}
    for i, (item, task) in enumerate(zip(batch, tasks, strict=True)):
        if isinstance(item, Mapping) and "input_ids" not in item:
            rows_of.setdefault(id(task), []).append(i)
    for rows in rows_of.values():
        task = tasks[rows[0]]
        for i, text in zip(rows, _prompts(task, batch, rows, model.need_tokenizer()), strict=True):
            item = batch[i]
            (chats if isinstance(item, Mapping) and task.is_chat(item) else texts)[i] = text
    out: dict[int, NDArray[np.int32]] = {}
    for group in (texts, chats):
        if group:
            out |= zip(group, model.need_tokenizer().encode(list(group.values()), add_special_tokens=group is texts), strict=True)
    for i, item in enumerate(batch):
        if i not in out:
            out[i] = _given_ids(item["input_ids"] if isinstance(item, Mapping) else item, i, model.vocab_size)
        if not len(out[i]):
            msg = f"request {i}: the prompt has no tokens"
            raise RequestError(msg, index=i)
    return [out[i] for i in range(len(batch))]


def _prompts(task: Task, batch: Sequence[Any], rows: list[int], tokenizer: Tokenizer) -> list[str]:
    try:
        return task.prompts([batch[i] for i in rows], tokenizer.eos, tokenizer.chat)
    except (DataError, ConfigError):
        for i in rows:  # which one was it?
            with _request_error(i):
                task.prompts([batch[i]], tokenizer.eos, tokenizer.chat)
        raise


@contextlib.contextmanager
def _request_error(index: int) -> Iterator[None]:
    """Errors of one row as errors of its request."""
    try:
        yield
    except (DataError, ConfigError) as e:
        msg = f"request {index}: {str(e).removeprefix('row 0: ')}"
        raise RequestError(msg, index=index) from e


def _given_ids(item: Any, index: int, vocab_size: int) -> NDArray[np.int32]:
    try:
        ids = np.asarray(item) if isinstance(item, list | np.ndarray) else None
    except ValueError:  # ragged
        ids = None
    if ids is None or ids.ndim != 1 or (len(ids) and (ids.dtype.kind != "i" or ids.min() < 0 or ids.max() >= vocab_size)):
        msg = f"request {index}: expected a string, a list of token ids from 0 to {vocab_size - 1}, or a row, got {item!r:.80}"
        raise RequestError(msg, index=index)
    return ids.astype(np.int32)


# Fields of a generation_config that change greedy or beam results and are not honoured yet, with their neutral values.
NEUTRAL = {
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "min_length": (None, 0),
    "do_sample": (None, False),
    "num_beam_groups": (None, 1),
    "sequence_bias": (None,),
}


def warn_about_defaults(model: Model) -> None:
    """Name what the base's generation_config asks for and this engine does not do."""
    config = getattr(model.hf, "generation_config", None)
    unheeded = {n: v for n, neutral in NEUTRAL.items() if (v := getattr(config, n, None)) not in neutral}
    if unheeded:
        logger.warning("not honoured from the base's generation_config: %s", ", ".join(f"{n}={v!r:.40}" for n, v in unheeded.items()))


def _base_defaults(model: Model) -> GenerationParams:
    """What the base's generation_config says, within caps."""
    config = getattr(model.hf, "generation_config", None)
    found = {n: getattr(config, n, None) for n in GenerationParams.names()}
    return _capped(GenerationParams(**{k: v for k, v in found.items() if v is not None}))


def _capped(p: GenerationParams) -> GenerationParams:
    return GenerationParams.make(
        p,
        max_new_tokens=None if p.max_new_tokens is None else min(p.max_new_tokens, MOST_NEW_TOKENS),
        num_beams=None if p.num_beams is None else min(p.num_beams, MOST_BEAMS),
    )


def _params(item: Input, index: int, prefixes: Chosen, call: GenerationParams, inherited: GenerationParams, prompt: int, limit: int) -> GenerationParams:
    """Call > request > prefix > base > built-in; a length that nobody asked for here is cut to what fits."""
    with _request_error(index):
        asked = call.over(GenerationParams.make(item.get("params") if isinstance(item, Mapping) else None))
        loaded = inherited
        for prefix in prefixes:
            loaded = _capped(GenerationParams.make(dict(prefix.decoding))).over(loaded)
    params = asked.over(loaded).over(BUILT_IN)
    room = limit - prompt
    if room < 1 or (asked.max_new_tokens or 0) > room:
        new = asked.max_new_tokens or "at least 1"
        msg = f"request {index}: {prompt} prompt tokens and {new} new ones exceed the limit of {limit}; shorten the prompt or lower max_new_tokens"
        raise RequestError(msg, index=index)
    assert params.max_new_tokens is not None
    most = min(params.max_new_tokens, room)
    return GenerationParams.make(params, max_new_tokens=most, min_new_tokens=min(params.min_new_tokens or 0, most))
