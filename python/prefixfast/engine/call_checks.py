"""Checks of the arguments of `generate` and `score`, before torch is imported and any base model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from prefixfast.config import EngineConfig, EngineFields, GenerationParams, unknown_option
from prefixfast.config.fields import GenerationParamsFields
from prefixfast.data.encode import Input
from prefixfast.engine.make_requests import check_batch, check_requests
from prefixfast.engine.request_prefixes import Prefixes
from prefixfast.engine.score_inputs import Targets, check_score_requests, check_targets
from prefixfast.errors import ConfigError, check_choice, check_flag, shown
from prefixfast.model.base_name import check_base_name, different_bases
from prefixfast.prefix.prefix import Prefix
from prefixfast.prefix.tuned_weights import TunedWeights
from prefixfast.store import PrefixStore, StoredPrefix, open_store

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from prefixfast.model.base import Model
    from prefixfast.model.fingerprint import Fingerprint

PREFIX_TYPES: tuple[type, ...] = (Prefix, StoredPrefix)  # which every request can have of its own


@dataclass(frozen=True)
class Call:
    """Arguments of `generate` or `score` that say what a call works on.

    Attributes:
        batch: Requests.
        prefixes: Prefixes of the requests.
        model: Base model, None for the one that the prefixes name.
        store: Store of the prefixes that are given by name, its path, or None.
        header: Further type of a prefix, for a check before prefixes are read. It has the attributes ``base``, ``task``
            and ``decoding``. None accepts prefixes alone.
    """

    batch: Sequence[Input]
    prefixes: Prefixes
    model: str | Path | PreTrainedModel | PeftModel | Model | None
    store: PrefixStore | str | Path | None
    header: type | None = None

    @property
    def types(self) -> tuple[type, ...]:
        """Types of a prefix."""
        return PREFIX_TYPES if self.header is None else (*PREFIX_TYPES, self.header)


@dataclass(frozen=True)
class CheckedCall:
    """Findings of the checks of a call.

    Attributes:
        model: Base model, or its name.
        store: Opened store, None without one.
        own: Fields of `GenerationParams`.
        engine: Fields of `EngineConfig`.
    """

    model: str | Path | PreTrainedModel | PeftModel | Model
    store: PrefixStore | None
    own: GenerationParamsFields
    engine: EngineFields


def check_generate(
    call: Call, params: GenerationParams | None, on_error: str, fields: Mapping[str, object]
) -> CheckedCall:
    """Check the arguments of `generate`.

    Args:
        call: Requests, prefixes, base model and store.
        params: Generation parameters that the caller passed as an object.
        on_error: Handling of a wrong request. With ``"return"`` requests are not checked here, since their errors are
            results.
        fields: Fields of `GenerationParams` and `EngineConfig`.

    Raises:
        RequestError: For a wrong request.
        ConfigError: For arguments that do not fit.
        UnknownPrefixError: For a name that the store does not have.
    """
    own, engine = check_options(fields)
    made = GenerationParams.make(params, **cast("GenerationParamsFields", own))
    check_choice("on_error", on_error, ("raise", "return"))
    opened = open_store(call.store, read_only=True)
    if on_error == "raise":
        assigned, tasks = check_batch(call.batch, call.prefixes, opened, call.types)
        check_requests(call.batch, assigned, tasks, made)
    return _checked(call, opened, own, engine)


def check_options(fields: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Split options into fields of `GenerationParams` and of `EngineConfig`, and check their values.

    Raises:
        ConfigError: If an option is unknown, or has a wrong value.
    """
    own, engine = _split_fields(fields, GenerationParams.names(), "generate")
    GenerationParams.make(**cast("GenerationParamsFields", own))
    EngineConfig.make(**cast("EngineFields", engine))
    return own, engine


def check_score(call: Call, targets: Targets, fields: Mapping[str, object], *, end_token: bool) -> CheckedCall:
    """Check the arguments of `score`.

    Args:
        call: Requests, prefixes, base model and store.
        targets: Target of each request. None takes the targets of the rows.
        fields: Fields of `EngineConfig`.
        end_token: Whether the end token is scored.

    Raises:
        RequestError: For a wrong request or target.
        ConfigError: For arguments that do not fit.
        UnknownPrefixError: For a name that the store does not have.
    """
    _, engine = _split_fields(fields, (), "score")
    EngineConfig.make(**cast("EngineFields", engine))
    check_flag("end_token", end_token)
    opened = open_store(call.store, read_only=True)
    _, tasks = check_batch(call.batch, call.prefixes, opened, call.types)
    check_targets(call.batch, targets)
    check_score_requests(call.batch, tasks, targets)
    return _checked(call, opened, {}, engine)


def _checked(call: Call, store: PrefixStore | None, own: dict[str, object], engine: dict[str, object]) -> CheckedCall:
    """Result of a check, with the base model, which is looked for."""
    model = _base_name(call, store) if call.model is None else call.model
    if isinstance(model, str | Path):
        check_base_name(model)
    return CheckedCall(model, store, cast("GenerationParamsFields", own), cast("EngineFields", engine))


def _split_fields(
    fields: Mapping[str, object], own: tuple[str, ...], function: str
) -> tuple[dict[str, object], dict[str, object]]:
    """Split keyword arguments into those named in ``own`` and fields of `EngineConfig`."""
    known = (*own, *EngineConfig.names())
    for name in fields:
        if name not in known:
            raise ConfigError(unknown_option(name, known, function))
    mine = {name: value for name, value in fields.items() if name in own}
    return mine, {name: value for name, value in fields.items() if name not in own}


def _base_name(call: Call, store: PrefixStore | None) -> str:
    """Name of the one base model that the prefixes were trained on."""
    prefixes: object = call.prefixes
    if prefixes is None and store is not None and isinstance(call.batch, Sequence):
        prefixes = [row["prefix"] for row in call.batch if isinstance(row, Mapping) and row.get("prefix") in store]
    if isinstance(prefixes, Mapping) and not isinstance(prefixes, PrefixStore):
        prefixes = list(prefixes.values())
    flat = {id(p): p for entry in _as_list(prefixes) for p in _as_list(entry)}.values()
    found = [store.info(p) if isinstance(p, str) and store is not None else p for p in flat]
    types = (*call.types, TunedWeights)
    return only_base_name(p.base for p in found if isinstance(p, types))  # type: ignore[attr-defined]


def only_base_name(bases: Iterable[Fingerprint | None]) -> str:
    """Name of the one base model that fingerprints name.

    Args:
        bases: Fingerprints of the base models of prefixes, None for an unknown one.

    Raises:
        ConfigError: If they name no base model, or several.
    """
    names = different_bases(str(base["name"]) for base in bases if base and base.get("name"))
    if len(names) != 1:
        got = " and ".join(map(shown, names)) or "none"
        msg = f"model: expected a base model, or prefixes that name one, got {got}; a command takes it with --model"
        raise ConfigError(msg)
    return names.pop()


def _as_list(entry: object) -> list[object]:
    return list(entry) if isinstance(entry, Sequence) and not isinstance(entry, str) else [entry]
