"""Where prefixes start: lengths and positions first, then keys and values of words, of given prefixes, zeros, or random numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from prefixfast.attention.plan import LayerKV
from prefixfast.config import PrefixConfig
from prefixfast.data.tasks import Task
from prefixfast.errors import ConfigError
from prefixfast.model.base import Model
from prefixfast.model.text_kv import text_kv
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.kv import context, kv_by_layer
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.groups import Member

logger = logging.getLogger(__name__)
WORDS = ("text", "random", "zero")


def settle(
    model: Model,
    members: Sequence[Member],
    config: PrefixConfig,
    explicit: frozenset[str],
    task: Task,
    init_text: str | None,
) -> PrefixConfig:
    """The config with its length, layers and positions settled: those of given prefixes, or of the words.

    Raises:
        ConfigError: For options that do not fit.
        BaseMismatchError: For a prefix of another base.
    """
    for m in members:
        if not isinstance(m.init, Prefix) and m.init not in WORDS:
            msg = f"init: expected 'text', 'random', 'zero', a Prefix or a mapping of them, got {m.init!r:.80}"
            raise ConfigError(msg)
    if init_text is not None and not any(m.init == "text" for m in members):
        msg = f"init_text: expected only with init='text', got init={members[0].init!r:.40}"
        raise ConfigError(msg)
    config = _in_layers(config, len(model.layers))
    given = {m.name: m.init for m in members if isinstance(m.init, Prefix)}
    if not given:
        if config.prefix_length == "text":
            config = PrefixConfig.make(config, prefix_length=len(_words(model, task, init_text)))
        return config
    for name, prefix in given.items():
        check_fits(model, prefix, f"init of {name!r}")
    if len({(p.length, p.layers, p.pos_start, p.window) for p in given.values()}) != 1:
        msg = "init: expected prefixes of one length, pos_start and window, in the same layers; train the others in a run of their own"
        raise ConfigError(msg)
    return _conventions(model, config, next(iter(given.values())), explicit)


def starting_points(
    model: Model,
    members: Sequence[Member],
    config: PrefixConfig,
    task: Task,
    init_text: str | None,
    after: Sequence[Prefix],
) -> list[Any]:
    """Keys and values by layer that each prefix starts from, None: random; equal starts are one object."""
    kinds: dict[str, list[LayerKV] | None] = {"random": None}
    if any(m.init == "text" for m in members):
        ids, length = _words(model, task, init_text), config.length
        if len(ids) != length:
            logger.info(
                "init text has %d tokens: %s to the prefix's %d rows",
                len(ids),
                "cut" if len(ids) > length else "repeated",
                length,
            )
        kinds["text"] = text_kv(model, ids, length, *context(after, model))
    if any(m.init == "zero" for m in members):
        kinds["zero"] = [(torch.zeros(config.length, s.num_kv_heads, s.head_dim),) * 2 for s in model.layers]
    prefixes = {id(m.init): m.init for m in members if isinstance(m.init, Prefix)}
    given = {i: kv_by_layer(p, model.layers) for i, p in prefixes.items()}
    return [given[id(m.init)] if isinstance(m.init, Prefix) else kinds[m.init] for m in members]


def _in_layers(config: PrefixConfig, count: int) -> PrefixConfig:
    """The config with its layers checked; all of the base's layers, and its only site, are said as None."""
    if config.layers is None or config.layers[-1] < count:
        return PrefixConfig.make(
            config, sites=None, layers=None if config.layers == tuple(range(count)) else config.layers
        )
    msg = f"PrefixConfig.layers: expected numbers from 0 to {count - 1} (this base has {count} layers), got {config.layers[-1]}"
    raise ConfigError(msg)


def _words(model: Model, task: Task, init_text: str | None) -> list[int]:
    words = init_text or task.init_text
    (ids,) = model.require_tokenizer().encode([words])
    if not len(ids):
        msg = f"init_text: expected at least one token, got {words!r}"
        raise ConfigError(msg)
    return [int(i) for i in ids]


def _conventions(model: Model, config: PrefixConfig, first: Prefix, explicit: frozenset[str]) -> PrefixConfig:
    """Length, layers and positions are those of the given prefixes; options that say otherwise are errors."""
    if first.pos_start not in (0, first.length):
        msg = f"init: expected prefixes whose text starts at 0 or after the prefix, got pos_start {first.pos_start} of {first.length} rows"
        raise ConfigError(msg)
    layers = None if len(first.layers) == len(model.layers) else first.layers
    kept: dict[str, Any] = {
        "prefix_length": first.length,
        "layers": layers,
        "pos_start": "after" if first.pos_start else "zero",
    }
    for name in explicit & set(kept):
        if getattr(config, name) != kept[name]:
            msg = f"{name}: the given init has {kept[name]!r}, got {getattr(config, name)!r}; leave it out"
            raise ConfigError(msg)
    if "frozen_rows" not in explicit and (frozen := first.training.get("num_frozen_tokens", 0)):
        logger.info(
            "the first %d rows of the given prefixes stay as they are (num_frozen_tokens); frozen_rows=0 trains them too",
            frozen,
        )
        kept["frozen_rows"] = frozen
    return PrefixConfig.make(config, **kept)
