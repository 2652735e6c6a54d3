"""`PrefixHeader`, what the folder of a prefix says about it beside its tensors. It imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.config.json_types import JSON
from prefixfast.errors import DataError
from prefixfast.io.atomic import read_stable
from prefixfast.io.untrusted import read_json
from prefixfast.prefix import folder as files
from prefixfast.prefix import peft_format as peft
from prefixfast.prefix.authors_format import base_of, is_authors
from prefixfast.prefix.hub import find_folder
from prefixfast.prefix.names import no_prefix
from prefixfast.prefix.tuned_folder import is_tuned, read_tuned_header

if TYPE_CHECKING:
    from prefixfast.model.fingerprint import Fingerprint

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}  # by their names in the format


@dataclass(frozen=True)
class PrefixHeader:
    """Attributes of a saved prefix, or of a PEFT adapter, that checks of a call need.

    Attributes:
        folder: Folder of the prefix.
        base: Fingerprint of the base model, None if unknown.
        task: Task that turns rows into prompts, None for plain prompts.
        decoding: Default `GenerationParams` of the prefix.
        method: Method of trained weights, None for a prefix.
    """

    folder: Path
    base: Fingerprint | None = None
    task: Mapping[str, JSON] | None = None
    decoding: Mapping[str, JSON] | None = None
    method: str | None = None


def read_header(path: str | os.PathLike[str]) -> PrefixHeader:
    """Read the header of a prefix or of trained weights.

    Args:
        path: Folder of a prefix or of a PEFT adapter, or a hub id, whose files are downloaded.

    Raises:
        DataError: If the folder is missing or damaged, or holds something else.
        ConfigError: If the hub cannot be reached.
    """
    return read_stable(find_folder(path, None, local_files_only=False), _read)


def check_is_prefix(header: PrefixHeader) -> None:
    """Raise `DataError` for the header of trained weights where only a prefix can be used."""
    if header.method is not None:
        msg = f"{header.folder}: {no_prefix(header.method)}"
        raise DataError(msg, path=str(header.folder))


def _read(folder: Path) -> PrefixHeader:
    if is_tuned(folder):
        return PrefixHeader(folder, **read_tuned_header(folder))
    if os.path.lexists(folder / files.META):
        fields, _ = files.read_meta(folder / files.META)
        if any(os.path.lexists(folder / name) for name in (files.TENSORS, peft.WEIGHTS)):
            return PrefixHeader(folder, fields.get("base"), fields.get("task"), fields.get("decoding"))
    elif os.path.lexists(folder / peft.CONFIG) and os.path.lexists(folder / peft.WEIGHTS):
        config: dict[str, Any] = read_json(folder / peft.CONFIG)
        name = config.get("base_model_name_or_path")
        if config.get("peft_type") in peft.TYPES and isinstance(name, str | None):
            return PrefixHeader(folder, {"name": name} if name else None)
    elif is_authors(folder):
        base = base_of(folder)
        return PrefixHeader(folder, {"name": base} if base else None)
    # The folder is wrong, or holds embeddings of virtual tokens: its reader knows the error, and their base.
    content: Any = files.read_folder(folder)
    name = getattr(content, "base_name", None)
    return PrefixHeader(folder, {"name": name} if name else None)


def stored_training(folder: Path) -> Mapping[str, JSON]:
    """Settings and metrics of the training of a saved prefix.

    Args:
        folder: Folder of the prefix.

    Raises:
        DataError: If the folder is damaged.
    """
    return files.read_meta(folder / files.META)[0].get("training", {})


def stored_dtypes(folder: Path) -> list[str]:
    """Names of the dtypes of a saved prefix, from the header of its tensor file.

    Args:
        folder: Folder of the prefix.

    Raises:
        DataError: If the tensor file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = next((p for name in (files.TENSORS, peft.WEIGHTS) if (p := folder / name).exists()), folder / peft.WEIGHTS)
    try:
        with safe_open(path, framework="numpy") as tensors:
            return sorted({DTYPES.get(kind := tensors.get_slice(n).get_dtype(), kind) for n in tensors.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        msg = f"{path.name}: expected a safetensors file, this one is missing, damaged or something else: {e}"
        raise DataError(msg, path=str(path)) from e
