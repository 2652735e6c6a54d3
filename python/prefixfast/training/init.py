"""Initial values of prefixes: length, positions, and keys and values from a text, a prefix, zeros or random numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from prefixfast.attention.plan import LayerKV
from prefixfast.config import PrefixConfig
from prefixfast.data.encode import encode_examples, vocabulary_error
from prefixfast.data.rows import row_error
from prefixfast.errors import ConfigError, DataError, is_text, shown
from prefixfast.model.base import Model
from prefixfast.model.dry_run import LayerShape
from prefixfast.model.prefix_shape import filled_layers, own_layers
from prefixfast.model.text_kv import text_kv
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.kv import context, kv_by_layer, no_rows
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.examples import TOO_LONG, apply_overflow, too_long
from prefixfast.training.groups import PrefixGroup, PrefixJob
from prefixfast.training.init_options import DIFFERENT_INIT, InitOptions
from prefixfast.training.inputs import error_with_name
from prefixfast.training.method import METHODS

logger = logging.getLogger(__name__)


def resolve_config(model: Model, group: PrefixGroup, options: InitOptions) -> PrefixConfig:
    """Resolve the length, layers and positions of a group's prefixes.

    They are those of the prefixes in ``init``, or the length is the number of tokens of the init text, or they are
    those of the options.

    Raises:
        ConfigError: If options do not fit each other or the base model.
        BaseMismatchError: If a prefix in ``init`` was made for another base model.
    """
    if not METHODS[group.method_config.method].makes_prefix:
        return group.prefix_config
    config = _check_layers(group.prefix_config, model.layers)
    if not METHODS[group.method_config.method].is_trained:  # whose length is that of its text
        return config
    if config.position == "infix" and (reason := model.handle.infix.refusal):
        option = "position" if METHODS[group.method_config.method].position is None else "method"
        msg = f"{option}: this base takes no infix: {reason}; train a prefix with {option}='prefix'"
        raise ConfigError(msg)
    prefixes = {job.name: job.init for job in group.jobs if isinstance(job.init, Prefix)}
    if not prefixes:
        if config.prefix_length == "text":
            config = PrefixConfig.make(config, prefix_length=len(init_text_ids(model, options)))
        return config
    for name, prefix in prefixes.items():
        check_fits(model, prefix, f"init of {shown(name)}")
    if len({filled_layers(p, model.layers) for p in prefixes.values()}) != 1:
        raise ConfigError(DIFFERENT_INIT)
    return _adopt_layers(model, config, next(iter(prefixes.values())), options.explicit)


def initial_kv(
    model: Model, jobs: Sequence[PrefixJob], config: PrefixConfig, options: InitOptions, after: Sequence[Prefix]
) -> list[list[LayerKV] | None]:
    """Initial keys and values by layer of each prefix, None for random ones. Equal ones are one object.

    Args:
        model: Base model.
        jobs: Training of each prefix.
        config: Resolved options of what is learned.
        options: Options of the initial values.
        after: Prefixes that the init text follows.
    """
    by_name: dict[str, list[LayerKV] | None] = {"random": None}
    if any(job.init == "text" for job in jobs):
        ids, length = init_text_ids(model, options), config.length
        if len(ids) != length:
            change = "cut" if len(ids) > length else "repeated"
            logger.debug("init text has %d tokens: %s to the prefix's %d rows", len(ids), change, length)
        by_name["text"] = text_kv(model, ids, length, *context(after, model))
    if any(job.init == "zero" for job in jobs):
        none = no_rows(model.layers, torch.empty(0))
        by_name["zero"] = [
            (k.new_zeros(config.length, *k.shape[1:]), v.new_zeros(config.length, *v.shape[1:])) for k, v in none
        ]
    prefixes = {id(job.init): job.init for job in jobs if isinstance(job.init, Prefix)}
    of_prefix = {i: kv_by_layer(p, model.layers) for i, p in prefixes.items()}
    return [of_prefix[id(job.init)] if isinstance(job.init, Prefix) else by_name[job.init] for job in jobs]


def _check_layers(config: PrefixConfig, shapes: Sequence[LayerShape]) -> PrefixConfig:
    """Check that the layers have keys. All such layers, and the only site, are both written as None."""
    config.sites_of(("self",))
    own, count, layers = own_layers(shapes), len(shapes), config.layers_at("self")
    wrong = [i for i in layers or () if i not in own]
    if not wrong:
        return PrefixConfig.make(config, sites=None, layers=None if layers == own else layers)
    expected = f"numbers from 0 to {count - 1} (this base has {count} layers)"
    if wrong[0] < count:
        expected += (
            f"; layer {wrong[0]} reads the keys of layer {shapes[wrong[0]].source} and sees the rows of that layer"
        )
    msg = f"PrefixConfig.layers: expected {expected}, got {wrong[0]}"
    raise ConfigError(msg)


def text_ids(model: Model, group: PrefixGroup, options: InitOptions) -> list[int]:
    """Token ids of the text of a method without training.

    Args:
        model: Base model.
        group: Group of one name.
        options: Options of the initial values, with the rows of the name.

    Raises:
        ConfigError: If the init text is empty or too long.
        DataError: If a row is malformed or too long, or there are too few rows.
    """
    method, (job, *_) = group.method_config.method, group.jobs
    ids = init_text_ids(model, options) if method == "prompt" else _example_ids(model, group, options)
    if len(ids) >= model.max_positions:
        what = "init_text has" if method == "prompt" else f"the examples of {shown(job.source)} have"
        limit, advice = model.max_positions, METHODS[method].shorten
        msg = f"{what} {len(ids)} tokens, expected fewer than {limit}, the base's number of positions; {advice}"
        raise ConfigError(msg) if method == "prompt" else DataError(msg)
    return ids


def _example_ids(model: Model, group: PrefixGroup, options: InitOptions) -> list[int]:
    """Token ids of the training examples that the seed draws from the rows that the overflow policy leaves."""
    (job, *_), count, task = group.jobs, group.method_config.num_examples, options.task
    rows, limit = options.rows[job.source], min(model.max_positions, group.config.max_length or model.max_positions)
    found: list[list[int]] = []
    for i in np.random.default_rng(job.config.seed).permutation(len(rows)):
        if len(found) == count:
            break
        tokenizer = None if task.is_tokenized(rows[i]) else model.require_tokenizer()
        example = next(iter(encode_examples(tokenizer, model.vocab_size, [rows[i]], task)))
        if (fitted := apply_overflow(example, limit, group.config.overflow)) is not None:
            found.append(fitted.ids.tolist())
        elif group.config.overflow == "error":
            with error_with_name(job.source):
                raise row_error(rows[i], int(i), too_long(example, limit, TOO_LONG))
    if len(found) < count:
        expected = f"at most the {len(found)} rows of {shown(job.source)} that have at most {limit} tokens"
        msg = f"num_examples: expected {expected}, got {count}"
        raise DataError(msg)
    return [token for ids in found for token in ids]


def init_text_ids(model: Model, options: InitOptions) -> list[int]:
    """Token ids of the init text.

    Raises:
        ConfigError: If there is no text, or it has no tokens of the base model.
    """
    text = options.task.init_text if options.init_text is None else options.init_text
    if not isinstance(text, str) or not is_text(text):
        msg = f"init_text: expected a string of Unicode text, got {shown(text)}"
        raise ConfigError(msg)
    (ids,) = model.require_tokenizer().encode([text])
    if not len(ids):
        msg = f"init_text: expected at least one token, got {shown(text)}"
        raise ConfigError(msg)
    if error := vocabulary_error(ids, model.vocab_size):
        msg = f"init_text: {error}"
        raise ConfigError(msg)
    return [int(i) for i in ids]


def _adopt_layers(model: Model, config: PrefixConfig, first: Prefix, explicit: frozenset[str]) -> PrefixConfig:
    """Options with the layers of a prefix in ``init``; other explicit layers are an error."""
    filled = filled_layers(first, model.layers)
    layers = None if filled == own_layers(model.layers) else filled
    if "layers" in explicit and config.layers != layers:
        found, got = (", ".join(map(str, x)) if x else "all" for x in (layers, config.layers))
        msg = f"layers: the prefix in init has {found}, got {got}; leave it out, or choose other initial values"
        raise ConfigError(msg)
    return PrefixConfig.make(config, layers=layers)
