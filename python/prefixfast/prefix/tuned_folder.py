"""The folder of trained weights: ``tuned.safetensors`` and ``prefixfast.json``. torch is imported only for tensors.

LoRA is stored as an adapter of PEFT, which PEFT reads, beside ``prefixfast.json``. An adapter that PEFT has saved is
read without that file. The prefix of LoRA that was trained with one is ``prefix.safetensors``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefixfast.errors import DataError, shown
from prefixfast.io.json_lines import json_bytes
from prefixfast.io.untrusted import read_json, read_tensors
from prefixfast.model.fingerprint import is_seq2seq
from prefixfast.prefix.folder import (
    KEYS,
    META,
    NULL,
    TENSORS,
    TUNED,
    FolderContent,
    checked_fields,
    checked_meta,
    write_folder,
)
from prefixfast.prefix.lora_format import check_options, lora_files, read_lora, written_options
from prefixfast.prefix.names import written
from prefixfast.prefix.peft_format import CONFIG
from prefixfast.prefix.peft_read import base_name
from prefixfast.prefix.tensors import shared_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.prefix.record import PrefixData

METHODS = ("full", "top2", "adapter", "lora")  # whose results are weights
PREFIX = "prefix"  # key of ``prefixfast.json`` with the attributes of the prefix of LoRA
FIELD_NAMES = ("method", "options", "base", "task", "decoding", "training")
IMPORTED = {"imported_from": "peft"}
TYPES_OF_KEYS: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "options": (dict,),
    "task": (dict, NULL),
    "decoding": (dict,),
    "training": (dict,),
    "digest": (str,),
    PREFIX: (dict, NULL),
}


class TunedContent(NamedTuple):
    """Content of a folder of weights.

    Attributes:
        tensors: Tensors by name.
        fields: Attributes other than the tensors and the prefix.
        digest: Digest of the weights, None for an adapter that PEFT has saved.
        prefix: Content of the prefix of LoRA, None without one.
    """

    tensors: dict[str, Tensor]
    fields: dict[str, Any]
    digest: str | None
    prefix: FolderContent | None = None


def write_tuned(
    folder: Path,
    tensors: Mapping[str, Tensor],
    digest: str,
    fields: Mapping[str, Any],
    *,
    prefix: PrefixData | None,
    overwrite: bool,
) -> None:
    """Replace the weights in a folder.

    Args:
        folder: Folder.
        tensors: Tensors by name.
        digest: Digest of the weights, by which a reader notices that another program changed the tensors.
        fields: All attributes of the weights other than the tensors and the prefix.
        prefix: Prefix of LoRA, None without one.
        overwrite: Whether a prefix in the folder is replaced too.
    """
    values: dict[str, Any] = {"version": 1 if prefix is None else 2, "digest": digest, **fields}
    if prefix is not None:
        own: Mapping[str, Any] = prefix.fields
        values[PREFIX] = {"digest": prefix.digest, **{KEYS[name]: value for name, value in written(own).items()}}
    meta = json_bytes(values, indent=2, sort_keys=True)
    if fields["method"] == "lora":
        base = fields["base"]
        adapter = lora_files(tensors, fields["options"], (base or {}).get("name"), is_seq2seq=is_seq2seq(base))
        rows = {} if prefix is None else {TENSORS: shared_tensors(prefix.kv)}
        write_folder(folder, {**adapter, **rows, META: meta}, "weights", overwrite=overwrite)
    else:
        write_folder(folder, {TUNED: tensors, META: meta}, "weights", overwrite=overwrite)


def read_tuned(path: Path) -> TunedContent:
    """Read a folder of weights.

    Raises:
        DataError: If the folder is damaged or holds something else.
    """
    if not path.is_dir():
        got = "this is a file, give the folder that holds it" if path.is_file() else "no such folder"
        msg = f"{path}: {got}; expected one with {META} and {TUNED}, or a LoRA adapter of PEFT"
        raise DataError(msg, path=str(path))
    if not os.path.lexists(path / META) and os.path.lexists(path / CONFIG):
        found = read_lora(path)
        base = {"name": found.base_name} if found.base_name else None
        fields = {"method": "lora", "options": found.fields, "base": base, "training": IMPORTED}
        return TunedContent(found.tensors, fields, None)
    own, digest, of_prefix = read_tuned_meta(path / META)
    if own["method"] != "lora":
        return TunedContent(read_tensors(path / TUNED), own, digest)
    found = read_lora(path)
    try:
        check_options(own["options"])
    except DataError as e:
        msg = f"{META}: {e}"
        raise DataError(msg, path=str(path / META)) from e
    if written_options(own["options"]) != found.written:
        got = f"{shown(found.written)} and {shown(own['options'])}"
        msg = (
            f"{CONFIG} and {META} have different options, {got}: another program changed the folder; delete {META} to "
            "read it as a PEFT adapter"
        )
        raise DataError(msg, path=str(path / CONFIG))
    prefix = None
    if of_prefix is not None:
        values, prefix_digest = checked_fields(path / META, {"version": 2, "not_peft_because": None, **of_prefix})
        prefix = FolderContent(path / TENSORS, read_tensors(path / TENSORS), values, prefix_digest)
    return TunedContent(found.tensors, own, digest, prefix)


def is_tuned(path: Path) -> bool:
    """Whether a folder holds trained weights, also LoRA that PEFT has saved, and not a prefix."""
    if os.path.lexists(path / META):
        return "method" in read_json(path / META)
    return os.path.lexists(path / CONFIG) and read_json(path / CONFIG).get("peft_type") == "LORA"


def read_tuned_header(path: Path) -> dict[str, Any]:
    """Attributes ``base``, ``task``, ``decoding`` and ``method`` of the weights in a folder, without the tensors.

    Raises:
        DataError: If the folder is damaged.
    """
    if os.path.lexists(path / META):
        fields, _, _ = read_tuned_meta(path / META)
        return {name: fields[name] for name in ("base", "task", "decoding", "method")}
    name = base_name(read_json(path / CONFIG), path / CONFIG)
    return {"base": {"name": name} if name else None, "task": None, "decoding": {}, "method": "lora"}


def read_tuned_meta(path: Path) -> tuple[dict[str, Any], str, dict[str, Any] | None]:
    """Read and check ``prefixfast.json`` of weights.

    Returns:
        Attributes of the weights other than the tensors, their digest, and the attributes of their prefix or None.

    Raises:
        DataError: If the file is damaged, of a newer version, or describes something else.
    """
    found = read_json(path)
    unwritten = {PREFIX: None} if found.get("version") == 1 else {}
    meta = checked_meta(path, unwritten | found, TYPES_OF_KEYS, "weights")
    return {name: meta[name] for name in FIELD_NAMES}, meta["digest"], meta[PREFIX]
