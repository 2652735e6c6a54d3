"""`ScoreRequest`, a checked request of `score`, whose prompts and targets are encoded as in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from prefixfast.config import GenerationParams
from prefixfast.config.engine import BaseMismatch
from prefixfast.config.json_types import JSON
from prefixfast.data.encode import (
    Example,
    Input,
    Ints,
    check_examples,
    check_prompts,
    decoder_of,
    encode_examples,
    encode_labels,
    encode_prompts,
    encode_target,
    labelled_example,
    num_trailing,
    request_error,
    special_ids,
    vocabulary_error,
)
from prefixfast.data.encode.seq2seq import pad_error
from prefixfast.data.rows import Row, row_error
from prefixfast.data.task import Task
from prefixfast.engine.make_requests import prefixes_and_tasks, request_value, text_positions
from prefixfast.engine.request_prefixes import Prefixes, attended, weights_of
from prefixfast.engine.sampling_params import UNSET, ParamSources, given_params
from prefixfast.engine.seq2seq_prompts import encoder_prompt
from prefixfast.errors import ConfigError, PrefixFastError, RequestError, check_flag, shown
from prefixfast.prefix.compatibility import base_mismatch
from prefixfast.prefix.prefix import Prefix
from prefixfast.prefix.tuned_weights import TunedWeights
from prefixfast.store import PrefixStore, StoredPrefix

if TYPE_CHECKING:
    from prefixfast.model.base import Model

Targets = Sequence[str | Sequence[int]] | None
T = TypeVar("T")


@dataclass(frozen=True)
class ScoreRequest:
    """A checked request of `score`.

    Attributes:
        index: Place of the request in the batch, from 0.
        id: Value of the request's ``id`` key, None without one.
        prefixes: Prefixes from left to right.
        examples: Token ids and targets, at least one; a row with several references has one for each.
        base_mismatch: Difference between the base model and those of the prefixes, None without one.
        weights: Trained weights of all requests of the call, None for those of the base model.
    """

    index: int
    id: JSON
    prefixes: tuple[Prefix | StoredPrefix, ...]
    examples: list[Example]
    base_mismatch: BaseMismatch | None = None
    weights: TunedWeights | None = None


def make_score_requests(
    model: Model,
    batch: Sequence[Input],
    prefixes: Prefixes,
    targets: Targets,
    *,
    end_token: bool,
    store: PrefixStore | None = None,
) -> list[ScoreRequest]:
    """Check a whole batch.

    Args:
        model: Base model.
        batch: Requests as the caller gave them.
        prefixes: Prefixes of the batch, as for `make_requests`.
        targets: Target of each request, text or token ids. None takes the targets of the rows.
        end_token: Whether the end token follows each target, as in training.
        store: Store of the prefixes that are given by name.

    Raises:
        ConfigError: For arguments that do not fit each other.
        RequestError: For a wrong request, or one without a target.
        UnknownPrefixError: For a name that the store does not have.
        BaseMismatchError: For a prefix of another base model.
    """
    check_flag("end_token", end_token)
    assigned, tasks = prefixes_and_tasks(model, batch, prefixes, store)
    check_targets(batch, targets)
    if targets is None:
        examples = _row_examples(model, batch, tasks, end_token=end_token)
    else:
        examples = _given_examples(model, batch, tasks, targets, end_token=end_token)
    made = []
    for i, (item, own) in enumerate(zip(batch, assigned, strict=True)):
        if any(p.position == "infix" for p in attended(own)) and not all(e.has_one_target for e in examples[i]):
            got = "an infix stands before the one target of a row, this row has targets in several places"
            msg = f"request {i}: {got}; score its last turn"
            raise RequestError(msg, index=i)
        # The last target is predicted, but takes no position.
        room = text_positions(model, own) + 1
        if (longest := max(len(e.ids) for e in examples[i])) > room:
            left = f"the base model has {room - 1} positions left for text"
            msg = f"request {i}: expected at most {room} tokens of prompt and target, got {longest}; {left}"
            raise RequestError(msg, index=i)
        if model.seq2seq is not None:
            _, loaded = given_params(ParamSources(UNSET, None, [p.decoding for p in own], UNSET), i)
            examples[i] = [_with_encoder_prompt(model, e, loaded, i) for e in examples[i]]
        own_id = request_value(item, tasks[i], "id")
        mismatch = base_mismatch(model, own)
        made.append(ScoreRequest(i, own_id, attended(own), examples[i], mismatch, weights_of(own)))
    return made


def _with_encoder_prompt(model: Model, example: Example, params: GenerationParams, index: int) -> Example:
    """The example with the text that the encoder reads, which a prefix's ``max_source_length`` cuts."""
    assert example.encoder_ids is not None
    return example._replace(encoder_ids=encoder_prompt(model, example.encoder_ids, params, index))


def _given_examples(
    model: Model, batch: Sequence[Input], tasks: Sequence[Task], targets: Sequence[Any], *, end_token: bool
) -> dict[int, list[Example]]:
    """Examples of prompts with a target that the caller gives, by request."""
    if decoder_of(model) is not None:
        return _labelled_examples(model, batch, tasks, targets, end_token=end_token)
    end = model.require_tokenizer().eos_id if end_token else None
    found = {}
    for i, (prompt, target) in enumerate(zip(encode_prompts(model, batch, tasks), targets, strict=True)):
        ids = encode_target(model, target, i)
        ids = ids if end is None else np.append(ids, np.int32(end))
        error = vocabulary_error(ids, model.vocab_size)
        if error or not len(ids):
            msg = f"request {i}: target: {error or f'expected at least one token, got {shown(target)}'}"
            raise RequestError(msg, index=i)
        whole = np.concatenate([prompt, ids])
        found[i] = [Example(whole, np.arange(len(prompt), len(whole)), 0)]
    return found


def _labelled_examples(
    model: Model, batch: Sequence[Input], tasks: Sequence[Task], targets: Sequence[Any], *, end_token: bool
) -> dict[int, list[Example]]:
    """Examples of sources with labels that the caller gives, by request.

    Token ids are labels as Hugging Face models take them.
    """
    decoder, found = decoder_of(model), {}
    assert decoder is not None
    for i, (source, target) in enumerate(zip(encode_prompts(model, batch, tasks), targets, strict=True)):
        ids = encode_target(model, target, i)
        error = vocabulary_error(ids, decoder.vocab_size)
        if not error and len(ids):
            example = _labelled_example(model, source, target, ids, i, end_token=end_token)
            found[i], error = [example], pad_error(decoder, example.ids[:-1])
        if error or not len(ids):
            msg = f"request {i}: target: {error or f'expected at least one token, got {shown(target)}'}"
            raise RequestError(msg, index=i)
    return found


def _labelled_example(model: Model, source: Ints, target: Any, ids: Ints, index: int, *, end_token: bool) -> Example:
    """Example of a source and a target, whose own tokens are ``ids``."""
    decoder = decoder_of(model)
    assert decoder is not None
    if isinstance(target, str):
        (whole,) = encode_labels(model.require_tokenizer(), [target])
        example = labelled_example(decoder, source, whole, index)
        return example if end_token else without_end(example, special_ids(model))
    end = model.require_tokenizer().eos_id if end_token else None
    return labelled_example(decoder, source, ids if end is None else np.append(ids, np.int32(end)), index)


def without_end(example: Example, special: frozenset[int]) -> Example:
    """An example of an encoder-decoder base without the special tokens that end its labels.

    The start token can be one of them, so that the labels are encoded with them first.

    Args:
        example: Example of a text.
        special: Ids of the special tokens.

    Raises:
        DataError: If the labels have no other tokens.
    """
    length = len(example.ids) - num_trailing(example.ids[1:], special)
    targets = example.targets[example.targets < length]
    if not len(targets):
        raise row_error({}, example.row, "the target has no tokens but special ones")
    return example._replace(ids=example.ids[:length], targets=targets)


def check_targets(batch: Sequence[Input], targets: Targets) -> None:
    """Raise `ConfigError` if targets are given, but not one for each request."""
    if targets is not None and (
        isinstance(targets, str) or not isinstance(targets, Sequence) or len(targets) != len(batch)
    ):
        got = str(len(targets)) if isinstance(targets, list | tuple) else shown(targets)
        msg = f"targets: expected one entry for each of the {len(batch)} requests, got {got}"
        raise ConfigError(msg)


def check_score_requests(batch: Sequence[Input], tasks: Sequence[Task], targets: Targets) -> None:
    """Check prompts and targets as far as no base model is needed.

    Args:
        batch: Requests as the caller gave them.
        tasks: Task of each request.
        targets: Target of each request. None takes the targets of the rows.

    Raises:
        RequestError: For a wrong request, or one without a target.
    """
    if targets is not None:
        check_prompts(batch, tasks)
        return
    for _ in _by_task(batch, tasks, lambda rows, task, _: check_examples(rows, task)):
        pass


def _row_examples(
    model: Model, batch: Sequence[Input], tasks: Sequence[Task], *, end_token: bool
) -> dict[int, list[Example]]:
    """Examples of rows with their own targets, by request."""

    def read(rows: list[Row], task: Task, tokenized: bool) -> list[Example]:
        tokenizer, decoder = None if tokenized else model.require_tokenizer(), decoder_of(model)
        append_eos = end_token or decoder is not None
        found = list(encode_examples(tokenizer, model.vocab_size, rows, task, append_eos=append_eos, decoder=decoder))
        keeps_end = end_token or decoder is None or tokenized
        return found if keeps_end else [without_end(e, special_ids(model)) for e in found]

    found: dict[int, list[Example]] = {i: [] for i in range(len(batch))}
    for places, encoded in _by_task(batch, tasks, read):
        for example in encoded:
            found[places[example.row]].append(example)
    return found


def _by_task(
    batch: Sequence[Input], tasks: Sequence[Task], read: Callable[[list[Row], Task, bool], T]
) -> Iterator[tuple[list[int], T]]:
    """Numbers of the rows of one task and what ``read`` makes of them, for each task.

    Args:
        batch: Requests, which must be rows.
        tasks: Task of each request.
        read: Function of rows, their task, and whether they hold token ids.
    """
    groups: dict[tuple[int, bool], list[int]] = {}
    for i, (item, task) in enumerate(zip(batch, tasks, strict=True)):
        if not isinstance(item, Mapping):
            msg = f"request {i}: expected a row with a target, or targets=[...], got {shown(item)}"
            raise RequestError(msg, index=i)
        groups.setdefault((id(task), task.is_tokenized(item)), []).append(i)
    for (_, tokenized), places in groups.items():

        def work(places: list[int], tokenized: bool = tokenized) -> T:
            rows: list[Any] = [batch[i] for i in places]
            return read(rows, tasks[places[0]], tokenized)

        try:
            yield places, work(places)
        except PrefixFastError:  # each row is tried alone to find the wrong one
            for i in places:
                with request_error(i):
                    work([i])
            raise
