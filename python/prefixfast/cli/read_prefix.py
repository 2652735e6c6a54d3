"""`read_prefix` and `read_artifact`, which read folders of prefixes, of virtual tokens and of weights for a command."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.config.engine import BASE_FIELDS

if TYPE_CHECKING:
    from prefixfast.model.base import Model
    from prefixfast.prefix.prefix import Prefix
    from prefixfast.prefix.tuned_weights import TunedWeights


def read_artifact(path: Path, model: str | None, fields: Mapping[str, Any]) -> Prefix | TunedWeights:
    """Read a prefix as `read_prefix` does, or trained weights.

    Args:
        path: Folder.
        model: Hub id or folder of the base, None for the base that the adapter names.
        fields: Options of the command.
    """
    from prefixfast.prefix.tuned_folder import is_tuned
    from prefixfast.prefix.tuned_weights import TunedWeights

    return TunedWeights.from_pretrained(path) if is_tuned(path) else read_prefix(path, model, fields)


def read_prefix(path: str | Path, model: str | None, fields: Mapping[str, Any]) -> Prefix:
    """Read a prefix, or the virtual tokens of a PEFT adapter with the base that the command loads anyway.

    Args:
        path: Folder or hub id.
        model: Hub id or folder of the base, None for the base that the adapter names.
        fields: Options of the command, of which those of the base are used.

    Raises:
        DataError: If the folder cannot be read, or virtual tokens have no base.
    """
    from prefixfast.prefix.peft_read import BaseNeededError
    from prefixfast.prefix.prefix import Prefix

    try:
        return Prefix.from_pretrained(path)
    except BaseNeededError as e:
        if (name := model or e.base_name) is None:
            raise
        with loaded_base(name, fields) as base:
            return Prefix.from_pretrained(path, model=base)


def loaded_base(model: str, fields: Mapping[str, Any]) -> AbstractContextManager[Model]:
    """Context manager of the base of a command, which is loaded once for all of its uses.

    Args:
        model: Hub id or folder of the base.
        fields: Options of the command, of which those of the base are used.
    """
    from prefixfast.model.shared_base import borrowed

    return borrowed(model, **{n: fields[n] for n in BASE_FIELDS if n in fields})
