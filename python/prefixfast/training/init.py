"""Initial values of prefixes: lengths, positions, keys and values of a text, a prefix, zeros or random numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from prefixfast.attention.plan import LayerKV
from prefixfast.config import PrefixConfig
from prefixfast.config.sites import BySite, Site, one_or_by_site
from prefixfast.data.encode import encode_examples, vocabulary_error
from prefixfast.data.rows import row_error
from prefixfast.errors import ConfigError, DataError, is_text, named_errors, shown
from prefixfast.model.base import Model
from prefixfast.model.prefix_shape import filled_layers, own_layers
from prefixfast.model.text_kv import seq2seq_text_kv, text_kv
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.kv import context, kv_by_layer, no_rows, site_prefixes
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.examples import TOO_LONG, apply_overflow, too_long
from prefixfast.training.groups import PrefixGroup, PrefixJob
from prefixfast.training.init_options import InitOptions
from prefixfast.training.method import METHODS, Method, check_seq2seq_method

logger = logging.getLogger(__name__)


def resolve_group(model: Model, group: PrefixGroup, options: InitOptions) -> PrefixGroup:
    """A group with the sites, lengths, layers and positions of its prefixes.

    They are those of the prefix in ``init``, or the length is the number of tokens of the init text, or they are those
    of the options.

    Raises:
        ConfigError: If the method or options do not fit each other or the base model.
        BaseMismatchError: If a prefix in ``init`` was made for another base model.
    """
    method = METHODS[group.method_config.method]
    if model.seq2seq is not None:
        check_seq2seq_method(group.method_config.method)
    if not method.makes_prefix:
        return group
    option = "position" if method.position is None else "method"
    found: dict[PrefixConfig, PrefixConfig] = {}
    jobs = []
    for job in group.jobs:
        config = found.get(job.prefix_config)
        if config is None:
            config = found[job.prefix_config] = _resolved(model, job.prefix_config, method, option, options)
        if isinstance(job.init, Prefix) and method.is_trained:
            check_fits(model, job.init, f"init of {shown(job.name)}")
            config = _adopt_layers(model, config, job.init, options.explicit | job.own)
        jobs.append(replace(job, prefix_config=config))
    return replace(group, jobs=tuple(jobs))


def _resolved(model: Model, given: PrefixConfig, method: Method, option: str, options: InitOptions) -> PrefixConfig:
    """Options with sites, layers and a length that the base model has; ``option`` names the place in errors."""
    config = resolve_sites(model, given)
    if not method.is_trained:  # whose length is that of its text
        return config
    _check_position(model, config, option)
    if config.prefix_length == "text":
        config = PrefixConfig.make(config, prefix_length=len(init_text_ids(model, options)))
    return config


def initial_kv(
    model: Model, jobs: Sequence[PrefixJob], config: PrefixConfig, options: InitOptions, after: Sequence[Prefix]
) -> dict[Site, list[list[LayerKV] | None]]:
    """Initial keys and values by layer of each prefix at each site, None for random ones. Equal ones are one object.

    Args:
        model: Base model.
        jobs: Training of each prefix.
        config: Resolved options of what is learned.
        options: Options of the initial values.
        after: Prefixes that the init text follows.
    """
    lengths = config.lengths(model.sites)
    inits = {id(job.init): job.init for job in jobs}
    named = {i: _values(model, init, lengths, options, after) for i, init in inits.items() if init != "random"}
    return {site: [named[id(job.init)][site] if id(job.init) in named else None for job in jobs] for site in lengths}


def _values(
    model: Model, init: Any, lengths: BySite[int], options: InitOptions, after: Sequence[Prefix]
) -> Mapping[Site, list[LayerKV]]:
    """Keys and values by layer of one init, by site."""
    if isinstance(init, Prefix):
        return {site: kv_by_layer(init, model.sites[site], site) for site in lengths}
    if init == "zero":
        none = {site: no_rows(model.sites[site], torch.empty(0)) for site in lengths}
        return {
            site: [(k.new_zeros(n, *k.shape[1:]), v.new_zeros(n, *v.shape[1:])) for k, v in none[site]]
            for site, n in lengths.items()
        }
    ids = init_text_ids(model, options)
    for length in sorted({n for n in lengths.values() if n != len(ids)}):
        change = "cut" if len(ids) > length else "repeated"
        logger.debug("init text has %d tokens: %s to the prefix's %d rows", len(ids), change, length)
    if model.seq2seq is None:
        return {"self": text_kv(model, ids, lengths["self"], *context(after, model))}
    rooms = {
        "enc": model.seq2seq.encoder_positions,
        "self": model.max_positions - max((p.pos_start for p in after), default=0),
        "cross": model.seq2seq.encoder_positions,
    }
    for site, n in lengths.items():
        if n > rooms[site]:
            expected = f"at most {rooms[site]} rows of site {site!r} beside init='text', the positions of a text"
            msg = f"prefix_length: expected {expected}, got {n}; use a shorter prefix, or init='random'"
            raise ConfigError(msg)
    decoder_ids = model.seq2seq.decoder_ids(np.array(ids, np.int32)).tolist()
    return seq2seq_text_kv(model, ids, decoder_ids, lengths, site_prefixes(after, model))


def resolve_sites(model: Model, config: PrefixConfig) -> PrefixConfig:
    """Options whose sites and layers the base model has. All sites, and all layers with keys, are written as None.

    Args:
        model: Base model.
        config: Options of the caller.

    Raises:
        ConfigError: If the base model does not have a site or a layer.
    """
    sites = config.sites_of(model.sites)
    layers = {site: _check_layers(config.layers_at(site), model, site) for site in sites}
    every = {site: own_layers(model.sites[site]) for site in sites}
    return PrefixConfig.make(
        config,
        sites=None if sites == tuple(model.sites) else sites,
        layers=None if layers == every else one_or_by_site(layers),
    )


def _check_layers(given: tuple[int, ...] | None, model: Model, site: Site) -> tuple[int, ...]:
    """Layers of a site, which have keys of their own; None is all of them."""
    shapes = model.sites[site]
    own, count = own_layers(shapes), len(shapes)
    if not (wrong := [i for i in given or () if i not in own]):
        return given or own
    where = "this base" if len(model.sites) == 1 else f"site {site!r} of this base"
    expected = f"numbers from 0 to {count - 1} ({where} has {count} layers)"
    if wrong[0] < count:
        expected += (
            f"; layer {wrong[0]} reads the keys of layer {shapes[wrong[0]].source} and sees the rows of that layer"
        )
    msg = f"PrefixConfig.layers: expected {expected}, got {wrong[0]}"
    raise ConfigError(msg)


def _check_position(model: Model, config: PrefixConfig, option: str) -> None:
    """Raise `ConfigError` for a place or a position that the base model does not have; ``option`` names the place."""
    if config.position == "infix" and (reason := model.handle.infix.refusal):
        msg = f"{option}: this base takes no infix: {reason}; train a prefix with {option}='prefix'"
        raise ConfigError(msg)
    if config.pos_start == "zero" and model.seq2seq is not None and model.seq2seq.has_distances:
        reason = "the positions of this base are distances between tokens, and prefix rows stand right before the text"
        msg = f"pos_start: expected 'after', got 'zero': {reason}"
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
            with named_errors(f"prefix {shown(job.source)}, ", DataError):
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
    # An init text is an instruction, which has no special tokens.
    (ids,) = model.require_tokenizer().encode([text], add_special_tokens=model.seq2seq is None)
    if not len(ids):
        msg = f"init_text: expected at least one token, got {shown(text)}"
        raise ConfigError(msg)
    if error := vocabulary_error(ids, model.vocab_size):
        msg = f"init_text: {error}"
        raise ConfigError(msg)
    return [int(i) for i in ids]


def _filled(prefix: Prefix, model: Model) -> dict[Site, tuple[int, ...]]:
    """Layers with rows of a prefix, by site."""
    return {site: filled_layers(prefix, model.sites[site], site) for site in model.sites if prefix.length_at(site)}


def _adopt_layers(model: Model, config: PrefixConfig, first: Prefix, explicit: frozenset[str]) -> PrefixConfig:
    """Options with the layers of a prefix in ``init``; other explicit layers are an error."""
    adopted = resolve_sites(model, PrefixConfig.make(config, layers=_filled(first, model)))
    if "layers" in explicit and config.layers != adopted.layers:
        found, got = map(_shown_layers, (adopted.layers, config.layers))
        msg = f"layers: the prefix in init has {found}, got {got}; leave it out, or choose other initial values"
        raise ConfigError(msg)
    return adopted


def _shown_layers(layers: tuple[int, ...] | BySite[tuple[int, ...]] | None) -> str:
    """Layers as an error shows them."""
    if isinstance(layers, BySite):
        return "; ".join(f"{site} {_shown_layers(own)}" for site, own in layers.items())
    return "all" if layers is None else ", ".join(map(str, layers))
