"""The folder of trained weights: ``tuned.safetensors`` and ``prefixfast.json``. torch is imported only for tensors.

LoRA is stored as an adapter of PEFT, which PEFT reads, beside ``prefixfast.json``. An adapter that PEFT has saved is
read without that file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.errors import DataError, shown
from prefixfast.io.json_lines import json_bytes
from prefixfast.io.untrusted import read_json, read_tensors
from prefixfast.model.fingerprint import is_seq2seq
from prefixfast.prefix.folder import META, NULL, TUNED, VERSIONS, checked_meta, write_folder
from prefixfast.prefix.lora_format import check_options, lora_files, read_lora, written_options
from prefixfast.prefix.peft_format import CONFIG
from prefixfast.prefix.peft_read import base_name

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("full", "top2", "adapter", "lora")  # whose results are weights
FIELD_NAMES = ("method", "options", "base", "task", "decoding", "training")
IMPORTED = {"imported_from": "peft"}
TYPES_OF_KEYS: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "options": (dict,),
    "task": (dict, NULL),
    "decoding": (dict,),
    "training": (dict,),
    "digest": (str,),
}


def write_tuned(
    folder: Path, tensors: Mapping[str, Tensor], digest: str, fields: Mapping[str, Any], *, overwrite: bool
) -> None:
    """Replace the weights in a folder.

    Args:
        folder: Folder.
        tensors: Tensors by name.
        digest: Digest of the weights, by which a reader notices that another program changed the tensors.
        fields: All attributes of the weights other than the tensors.
        overwrite: Whether a prefix in the folder is replaced too.
    """
    meta = json_bytes({"version": VERSIONS["weights"][-1], "digest": digest, **fields}, indent=2, sort_keys=True)
    if fields["method"] == "lora":
        base = fields["base"]
        adapter = lora_files(tensors, fields["options"], (base or {}).get("name"), is_seq2seq=is_seq2seq(base))
        write_folder(folder, {**adapter, META: meta}, "weights", overwrite=overwrite)
    else:
        write_folder(folder, {TUNED: tensors, META: meta}, "weights", overwrite=overwrite)


def read_tuned(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Read a folder of weights.

    Returns:
        Tensors by name, attributes other than the tensors, and digest, None for an adapter that PEFT has saved.

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
        return found.tensors, fields, None
    own, digest = read_tuned_meta(path / META)
    if own["method"] != "lora":
        return read_tensors(path / TUNED), own, digest
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
    return found.tensors, own, digest


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
        fields, _ = read_tuned_meta(path / META)
        return {name: fields[name] for name in ("base", "task", "decoding", "method")}
    name = base_name(read_json(path / CONFIG), path / CONFIG)
    return {"base": {"name": name} if name else None, "task": None, "decoding": {}, "method": "lora"}


def read_tuned_meta(path: Path) -> tuple[dict[str, Any], str]:
    """Read and check ``prefixfast.json`` of weights.

    Returns:
        Attributes of the weights other than the tensors, and their digest.

    Raises:
        DataError: If the file is damaged, of a newer version, or describes something else.
    """
    meta = checked_meta(path, read_json(path), TYPES_OF_KEYS, "weights")
    return {name: meta[name] for name in FIELD_NAMES}, meta["digest"]
