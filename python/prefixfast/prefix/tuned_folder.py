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
from prefixfast.prefix.folder import META, TUNED, write_folder
from prefixfast.prefix.lora_format import lora_files, read_lora
from prefixfast.prefix.names import base_error
from prefixfast.prefix.peft_format import CONFIG
from prefixfast.prefix.peft_read import base_name

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("full", "top2", "adapter", "lora")  # whose results are weights
FIELD_NAMES = ("method", "options", "base", "task", "decoding", "training")
IMPORTED = {"imported_from": "peft"}
VERSION = 1
KINDS: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "options": (dict,),
    "base": (dict, type(None)),
    "task": (dict, type(None)),
    "decoding": (dict,),
    "training": (dict,),
    "digest": (str,),
}


def write_tuned(folder: Path, tensors: Mapping[str, Tensor], digest: str, fields: Mapping[str, Any]) -> None:
    """Replace the weights in a folder.

    Args:
        folder: Folder.
        tensors: Tensors by name.
        digest: Digest of the weights, by which a reader notices that another program changed the tensors.
        fields: All attributes of the weights other than the tensors.
    """
    from safetensors.torch import save

    meta = {"version": VERSION, "digest": digest, **fields}
    if fields["method"] == "lora":
        own = lora_files(tensors, fields["options"], (fields["base"] or {}).get("name"))
    else:
        own = {TUNED: save({n: t.cpu() for n, t in tensors.items()})}
    write_folder(folder, {**own, META: json_bytes(meta, indent=2, sort_keys=True)})


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
        tensors, options, name = read_lora(path)
        base = {"name": name} if name else None
        return tensors, {"method": "lora", "options": options, "base": base, "training": IMPORTED}, None
    fields, digest = read_tuned_meta(path / META)
    tensors = read_lora(path).tensors if fields["method"] == "lora" else read_tensors(path / TUNED)
    return tensors, fields, digest


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
    meta = read_json(path)
    if meta.get("version") != VERSION or type(meta["version"]) is not int:
        got = shown(meta.get("version"))
        msg = f"{path.name}: expected version {VERSION}, got {got}; update prefixfast to read newer folders"
        raise DataError(msg, path=str(path))
    if "method" not in meta:
        msg = f"{path.name}: expected trained weights, this folder holds a prefix: read it with Prefix.from_pretrained"
        raise DataError(msg, path=str(path))
    if set(meta) != {"version", *KINDS}:
        msg = f"{path.name}: expected the keys {sorted(('version', *KINDS))}, got {sorted(meta)}"
        raise DataError(msg, path=str(path))
    for key, kinds in KINDS.items():
        if type(meta[key]) not in kinds:
            msg = f"{path.name}: {key}: expected {kinds[0].__name__}, got {shown(meta[key])}"
            raise DataError(msg, path=str(path))
    trained = meta["training"].get("num_trained", 0)
    if type(trained) is not int or trained < 0:
        msg = f"{path.name}: training.num_trained: expected a number of at least 0, got {shown(trained)}"
        raise DataError(msg, path=str(path))
    if error := base_error(meta["base"]):
        msg = f"{path.name}: {error}"
        raise DataError(msg, path=str(path))
    return {name: meta[name] for name in FIELD_NAMES}, meta["digest"]
