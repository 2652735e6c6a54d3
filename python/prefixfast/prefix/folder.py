"""The folder of a prefix: its files, and the formats that can be read.

A prefix is saved as a PEFT adapter folder whenever PEFT can hold it exactly, with everything else about the prefix in
``prefixfast.json`` beside the adapter. Otherwise ``prefix.safetensors`` takes the adapter's place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from prefixfast.errors import ConfigError, DataError, shown
from prefixfast.io.atomic import replace_folder, write_file
from prefixfast.io.json_lines import json_bytes
from prefixfast.io.tensors import write_tensors
from prefixfast.io.untrusted import read_json, read_tensors
from prefixfast.model.fingerprint import layout_of
from prefixfast.prefix import authors_format, peft_read
from prefixfast.prefix import peft_format as peft
from prefixfast.prefix.names import FIELD_NAMES, UNWRITTEN, PrefixFields, base_error, file_key, no_prefix, written
from prefixfast.prefix.validate import convention_error

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
META, TENSORS, TUNED = "prefixfast.json", "prefix.safetensors", "tuned.safetensors"
PREFIX_FILES = frozenset({META, TENSORS, peft.CONFIG, peft.WEIGHTS})
OWNED = PREFIX_FILES | {TUNED}
VERSIONS = {"prefix": (1, 2), "weights": (1, 2)}  # versions that can be read, by kind
KEYS = {name: file_key(name) for name in FIELD_NAMES}  # keys of prefixfast.json by field name
LOOKED_FOR = (
    f"{META} (a prefixfast prefix) or {peft.CONFIG} with {peft.WEIGHTS} (a PEFT adapter of type "
    f"{' or '.join((*peft.TYPES, *peft_read.EMBEDDING_TYPES))}) or {authors_format.WEIGHTS} with "
    f"{authors_format.CONFIG} (a BART checkpoint of Li & Liang's code)"
)
NULL = type(None)
Kind: TypeAlias = Literal["prefix", "weights"]
TYPES_OF_KEYS: dict[str, tuple[type, ...]] = {
    "pos_start": (int,),
    "window": (str,),
    "digest": (str,),
    "decoding": (dict,),
    "training": (dict,),
    file_key("task"): (dict, NULL),
    "not_peft_because": (str, NULL),
}


@dataclass(frozen=True)
class FolderContent:
    """Content of a folder of any supported format.

    Attributes:
        tensor_file: Path of the file with the tensors.
        kv: Tensors by name.
        fields: Attributes of the prefix other than its tensors.
        digest: Digest that the tensors and conventions must have; None for an adapter of PEFT, which has none.
    """

    tensor_file: Path
    kv: dict[str, Tensor]
    fields: PrefixFields
    digest: str | None


def prefix_files(kv: Mapping[str, Tensor], digest: str, fields: PrefixFields) -> dict[str, bytes]:
    """Files of a saved prefix by name.

    Args:
        kv: Tensors by name.
        digest: Digest of the prefix, by which a reader notices that another program changed the tensors.
        fields: All attributes of the prefix other than its tensors.
    """
    reason = peft.NO_INFIX if fields["position"] == "infix" else None
    reason = reason or peft.peft_incompatibility(kv, fields["pos_start"], fields["window"], fields["base"])
    if reason is None:
        tensor_files = adapter_files(kv, fields, adapter_type(fields))
    else:
        from safetensors.torch import save

        tensor_files = {TENSORS: save({n: t.cpu() for n, t in kv.items()})}
    values: Mapping[str, Any] = fields
    meta = {
        "version": 1 if all(name.startswith("self.") for name in kv) else 2,  # 0.1.0 knows no other sites
        "digest": digest,
        "not_peft_because": reason,
        **{KEYS[name]: value for name, value in written(values).items()},
    }
    return {**tensor_files, META: json_bytes(meta, indent=2, sort_keys=True)}


def adapter_type(fields: PrefixFields) -> peft.PeftType:
    """Type of the PEFT adapter that holds a prefix: CARTRIDGE if leading rows were frozen, else PREFIX_TUNING."""
    return "CARTRIDGE" if "num_frozen_tokens" in fields["training"] else "PREFIX_TUNING"


def adapter_files(kv: Mapping[str, Tensor], fields: PrefixFields, peft_type: peft.PeftType) -> dict[str, bytes]:
    """The two files of a PEFT adapter by name, for a prefix that PEFT can hold."""
    frozen: Any = fields["training"].get("num_frozen_tokens", 0)
    seq2seq = peft.is_seq2seq(fields["base"], fields["training"])
    return peft.adapter_files(kv, fields["base"], peft_type, frozen, seq2seq=seq2seq)


def write_folder(
    folder: Path, files: Mapping[str, bytes | Mapping[str, Tensor]], kind: Kind, *, overwrite: bool = False
) -> None:
    """Replace the prefix or the weights in a folder by these files; other files in the folder stay.

    Args:
        folder: Folder.
        files: Content of each file by its name: bytes, or the tensors of a safetensors file.
        kind: Kind of the content. A folder of the other kind is replaced only with ``overwrite``.
        overwrite: Whether a folder of the other kind is replaced too.

    Raises:
        ConfigError: If the folder holds the other kind or a PEFT adapter of another type, which would be lost.
        OSError: If the files cannot be written. The old content is intact then.
    """
    if held := other_content(folder, kind, overwrite=overwrite):
        msg = f"{folder} holds {held}, which the {kind} would replace; give another folder"
        raise ConfigError(msg)

    def write(target: Path) -> None:
        for name, content in files.items():
            if isinstance(content, bytes):
                write_file(target / name, content)
            else:
                write_tensors(target / name, content)

    replace_folder(folder, write, owned=OWNED)


def other_content(folder: Path, kind: Kind, *, overwrite: bool = False) -> str | None:
    """Description of what a folder holds and a write must not replace, None if nothing is in the way.

    Args:
        folder: Folder, which may not exist.
        kind: Kind of what is written.
        overwrite: Whether the other kind is replaced. An adapter of another program never is.
    """
    try:
        if (folder / META).exists():
            method = read_json(folder / META).get("method")
            held: Kind = "prefix" if method is None else "weights"
            text = "a prefix" if method is None else f"weights of method {shown(method)}"
        else:
            found = read_json(folder / peft.CONFIG).get("peft_type")
            if found not in peft.TYPES:
                return f"a PEFT adapter of type {shown(found)}"
            held, text = "prefix", f"a PEFT adapter of type {found}"
    except DataError:
        return None
    return None if overwrite or held == kind else text


def read_folder(path: Path) -> FolderContent | peft_read.VirtualTokens:
    """Read a folder of any supported format.

    Returns:
        Content of the folder, or the embeddings of an adapter whose keys and values a base model must compute.

    Raises:
        DataError: If the folder holds no prefix, or a file is damaged.
    """
    if not path.is_dir():
        got = "this is a file, give the folder that holds it" if path.is_file() else "no such folder"
        msg = f"{path}: {got}; expected one with {LOOKED_FOR}"
        raise DataError(msg, path=str(path))
    if os.path.lexists(path / META):  # a broken link is an error, not an absent file
        fields, digest = read_meta(path / META)
        if os.path.lexists(path / TENSORS):
            return FolderContent(path / TENSORS, read_tensors(path / TENSORS), fields, digest)
        kv = peft.cut(peft_read.read(path)[0], fields["base"])
        kv = peft.without_spare_layer(kv, fields["base"], fields["training"])
        return FolderContent(path / peft.WEIGHTS, kv, fields, digest)
    if os.path.lexists(path / peft.CONFIG):
        if (virtual := peft_read.read_virtual_tokens(path)) is not None:
            return virtual
        kv, config = peft_read.read(path)
        return FolderContent(path / peft.WEIGHTS, kv, _adapter_fields(kv, config, path / peft.CONFIG), None)
    if authors_format.is_authors(path):
        kv, fields = authors_format.read_authors(path)
        return FolderContent(path / authors_format.WEIGHTS, kv, fields, None)
    found = sorted(p.name for p in path.iterdir())
    shown = ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
    msg = f"{path}: no prefix here: looked for {LOOKED_FOR}, found {shown or 'nothing'}"
    raise DataError(msg, path=str(path))


def read_meta(path: Path) -> tuple[PrefixFields, str]:
    """Read and check ``prefixfast.json``.

    Returns:
        Attributes of the prefix other than its tensors, and its digest.

    Raises:
        DataError: If the file is damaged, of a newer version, or holds keys or values that `prefix_files` never writes.
    """
    return checked_fields(path, read_json(path))


def checked_fields(path: Path, values: dict[str, Any]) -> tuple[PrefixFields, str]:
    """Check the attributes of a prefix in ``prefixfast.json``.

    Args:
        path: Path of the file, for errors.
        values: Attributes by key, with the version.

    Returns:
        Attributes of the prefix other than its tensors, and its digest.

    Raises:
        DataError: If an attribute is missing or wrong, or the version is unknown.
    """
    meta = checked_meta(path, UNWRITTEN | values, TYPES_OF_KEYS, "prefix")
    try:
        layout_of(meta["base"])
    except DataError as e:
        msg = f"{path.name}: {e}"
        raise DataError(msg, path=str(path)) from e
    if error := convention_error(meta["pos_start"], meta["window"], meta["position"]):
        msg = f"{path.name}: {error}"
        raise DataError(msg, path=str(path))
    fields: Any = {name: meta[key] for name, key in KEYS.items()}
    return fields, meta["digest"]


def checked_meta(path: Path, meta: dict[str, Any], types: Mapping[str, tuple[type, ...]], kind: Kind) -> dict[str, Any]:
    """Check what ``prefixfast.json`` of prefixes and of weights have in common.

    Args:
        path: Path of the file, for errors.
        meta: Content of the file.
        types: Types by key, of all keys but ``version``, ``base`` and ``position``. NoneType is null.
        kind: Kind of the folder.

    Returns:
        The content.

    Raises:
        DataError: If the file is of a newer version or of another kind, or a key is missing, unknown or of another
            type.
    """
    error = None
    keys = {"version", "base", *types, *(UNWRITTEN if kind == "prefix" else ())}
    if type(meta.get("version")) is not int or meta["version"] not in VERSIONS[kind]:
        known, got = " or ".join(map(str, VERSIONS[kind])), shown(meta.get("version"))
        error = f"expected version {known}, got {got}; update prefixfast to read newer folders"
    elif "method" in meta and kind == "prefix":
        error = no_prefix(meta["method"])
    elif "method" not in meta and kind == "weights":
        error = "expected trained weights, this folder holds a prefix: read it with Prefix.from_pretrained"
    elif set(meta) != keys:
        error = f"expected the keys {sorted(keys)}, got {sorted(meta)}"
    elif wrong := next((key for key, known in types.items() if type(meta[key]) not in known), None):
        names = " or ".join("null" if t is NULL else t.__name__ for t in types[wrong])
        error = f"{wrong}: expected {names}, got {shown(meta[wrong])}"
    elif type(trained := meta["training"].get("num_trained", 0)) is not int or trained < 0:
        error = f"training.num_trained: expected a number of at least 0, got {shown(trained)}"
    if error := error or base_error(meta["base"]):
        msg = f"{path.name}: {error}"
        raise DataError(msg, path=str(path))
    return meta


def _adapter_fields(kv: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> PrefixFields:
    """Attributes of an imported PEFT adapter, from its configuration."""
    name = peft_read.base_name(config, path)
    training: dict[str, Any] = {"imported_from": "peft"}
    if config["peft_type"] == "CARTRIDGE":
        training["num_frozen_tokens"] = config.get("num_frozen_tokens", 0)
    if (submodules := peft_read.submodules_of(config)) is not None:
        training |= {peft.SUBMODULES: submodules, peft.NUM_LAYERS: config["num_layers"]}
        if submodules == 1:
            logger.warning(
                "%s: the decoder's self-attention alone sees these rows here; PEFT with transformers 5 shows them, and "
                "all tokens of the decoder, to cross-attention too (num_transformer_submodules 1)",
                path.parent,
            )
    return {"pos_start": len(kv["self.0.k"]), "base": {"name": name} if name else None, "training": training}
