"""What lies in a prefix's folder: which files are written, and which of the supported formats a folder holds.

On disk a prefix is a PEFT adapter folder whenever PEFT can hold it exactly, with our data beside it in ``prefixfast.json``; else ``prefix.safetensors``
takes the adapter's place. This module knows tensors and fields; `prefixfast.prefix.prefix` makes them a `Prefix`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from prefixfast.errors import DataError
from prefixfast.io.atomic import replace_folder, write_file
from prefixfast.io.untrusted import read_json, read_tensors
from prefixfast.model.fingerprint import num_layers
from prefixfast.prefix import peft_format as peft

META, TENSORS = "prefixfast.json", "prefix.safetensors"
OWNED = frozenset({META, TENSORS, peft.CONFIG, peft.WEIGHTS})
SITES = ("self", "enc", "cross")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VERSION, MOST_POSITIONS = 1, 2**31 - 1
FIELDS = ("pos_start", "window", "base", "task", "decoding", "training")
OLD_KEYS = {"task": "linearizer"}  # version 0.1.0 reads and writes the task under this key
KEYS = tuple(OLD_KEYS.get(name, name) for name in FIELDS)
LOOKED_FOR = (
    f"{META} (a prefix of ours) or {peft.CONFIG} with {peft.WEIGHTS} (a PEFT adapter of type {' or '.join(peft.TYPES)})"
)
KINDS = {"pos_start": int, "window": str, "digest": str, "decoding": dict, "training": dict}
OPTIONAL_KINDS = {"base": dict, "linearizer": dict, "not_peft_because": str}
BASE_KINDS = {"name": str, "config": dict, "tokenizer": str, "weights": str}


def own_files(kv: Mapping[str, Tensor], digest: str, fields: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a saved prefix by name.

    Args:
        kv: Its tensors.
        digest: Its digest, by which a reader knows that another program changed the tensors.
        fields: `FIELDS` by name.
    """
    why_not = peft.reason_against(kv, fields["pos_start"], fields["window"], num_layers(fields["base"]))
    out = _own_tensors(kv) if why_not else adapter_files(kv, fields, kind_of(fields))
    meta = {
        "version": VERSION,
        "digest": digest,
        "not_peft_because": why_not,
        **{OLD_KEYS.get(name, name): value for name, value in fields.items()},
    }
    return {**out, META: json.dumps(meta, indent=2, sort_keys=True, ensure_ascii=False).encode()}


def layers_of(names: Iterable[str]) -> tuple[int, ...]:
    """The layers of site ``self`` among names of tensors, ascending."""
    return tuple(sorted({int(name.split(".")[1]) for name in names if name.startswith("self.")}))


def _own_tensors(kv: Mapping[str, Tensor]) -> dict[str, bytes]:
    return {TENSORS: save({n: t.detach().cpu().contiguous().clone() for n, t in kv.items()})}


def kind_of(fields: Mapping[str, Any]) -> peft.PeftType:
    """The adapter that a prefix is: CARTRIDGE where leading rows were frozen, as PEFT says it."""
    return "CARTRIDGE" if "num_frozen_tokens" in fields["training"] else "PREFIX_TUNING"


def adapter_files(kv: Mapping[str, Tensor], fields: Mapping[str, Any], kind: peft.PeftType) -> dict[str, bytes]:
    """The two files of a PEFT adapter for a prefix that PEFT can hold."""
    return peft.files(kv, (fields["base"] or {}).get("name"), kind, fields["training"].get("num_frozen_tokens", 0))


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make ``folder`` hold these files in place of any prefix in it; other files stay.

    Raises:
        OSError: If the disk refuses; what was there before is intact.
    """

    def write(target: Path) -> None:
        for name, data in files.items():
            write_file(target / name, data)

    replace_folder(folder, write, owned=OWNED)


def read_folder(path: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any], str | None]:
    """What a folder of any supported format holds.

    Returns:
        The file of the tensors, the tensors, the fields, and the digest that they must have (None: nobody says).

    Raises:
        DataError: If it is no such folder, or damaged.
    """
    if not path.is_dir():
        got = "this is a file, give the folder that holds it" if path.is_file() else "no such folder"
        msg = f"{path}: {got}; expected one with {LOOKED_FOR}"
        raise DataError(msg, path=str(path))
    if (path / META).exists():
        fields = read_meta(path / META)
        digest = fields.pop("digest")
        if (path / TENSORS).exists():
            return path / TENSORS, read_tensors(path / TENSORS), fields, digest
        return path / peft.WEIGHTS, peft.read(path)[0], fields, digest
    if (path / peft.CONFIG).exists():
        kv, config = peft.read(path)
        return path / peft.WEIGHTS, kv, adapter_fields(kv, config, path / peft.CONFIG), None
    found = sorted(p.name for p in path.iterdir())
    shown = ", ".join(found[:10]) + (f" and {len(found) - 10} more" if len(found) > 10 else "")
    msg = f"{path}: no prefix here: looked for {LOOKED_FOR}, found {shown or 'nothing'}"
    raise DataError(msg, path=str(path))


def adapter_fields(kv: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of an imported adapter: what its configuration says."""
    name = config.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        msg = f"{path.name}: base_model_name_or_path: expected a name or null, got {name!r:.80}"
        raise DataError(msg, path=str(path))
    training: dict[str, Any] = {"imported_from": "peft"}
    if config["peft_type"] == "CARTRIDGE":
        training["num_frozen_tokens"] = config.get("num_frozen_tokens", 0)
    return {"pos_start": len(kv["self.0.k"]), "base": {"name": name} if name else None, "training": training}


def wrong_conventions(pos_start: Any, window: Any) -> str | None:
    """What is wrong with these, None if nothing is."""
    if type(pos_start) is int and 0 <= pos_start <= MOST_POSITIONS and window in ("slide", "always"):
        return None
    return f"expected pos_start >= 0 and window 'slide' or 'always', got {pos_start!r:.80} and {window!r:.80}; positions end at {MOST_POSITIONS}"


def read_meta(path: Path) -> dict[str, Any]:
    """Our description of a prefix, checked: `FIELDS` and the digest.

    Raises:
        DataError: For anything that we would not have written.
    """
    meta = read_json(path)
    expected = {"version", "digest", "not_peft_because", *KEYS}
    if type(meta.get("version")) is not int or meta["version"] != VERSION:
        msg = f"{path.name}: expected version {VERSION}, got {meta.get('version')!r}; update prefixfast to read newer folders"
        raise DataError(msg, path=str(path))
    if set(meta) != expected:
        msg = f"{path.name}: expected the keys {sorted(expected)}, got {sorted(meta)}"
        raise DataError(msg, path=str(path))
    for key, kind in KINDS.items():
        if type(meta[key]) is not kind:
            msg = f"{path.name}: {key}: expected {kind.__name__}, got {meta[key]!r:.80}"
            raise DataError(msg, path=str(path))
    optional = {k: (meta[k], kind) for k, kind in OPTIONAL_KINDS.items()}
    if isinstance(meta["base"], dict):
        optional |= {f"base.{k}": (meta["base"].get(k), kind) for k, kind in BASE_KINDS.items()}
    for key, (value, kind) in optional.items():
        if value is not None and not isinstance(value, kind):
            msg = f"{path.name}: {key}: expected {kind.__name__} or null, got {value!r:.80}"
            raise DataError(msg, path=str(path))
    if wrong := wrong_conventions(meta["pos_start"], meta["window"]):
        msg = f"{path.name}: {wrong}"
        raise DataError(msg, path=str(path))
    trained = meta["training"].get("num_trained", 0)
    if type(trained) is not int or trained < 0:
        msg = f"{path.name}: training.num_trained: expected a number of at least 0, got {trained!r:.80}"
        raise DataError(msg, path=str(path))
    return {"digest": meta["digest"], **{name: meta[key] for name, key in zip(FIELDS, KEYS, strict=True)}}


def check(kv: Mapping[str, Tensor], pos_start: int, window: str) -> None:
    """Raise `DataError` for tensors or conventions that no prefix has."""
    if not kv:
        msg = "a prefix needs at least one layer's keys and values"
        raise DataError(msg)
    for name, t in kv.items():
        parts = name.split(".")
        if len(parts) != 3 or parts[0] not in SITES or not _is_number(parts[1]) or parts[2] not in ("k", "v"):
            msg = f"tensor name: expected {{{'|'.join(SITES)}}}.{{layer}}.{{k|v}}, got {name!r:.200}"
            raise DataError(msg)
        other = kv.get(f"{parts[0]}.{parts[1]}.{'v' if parts[2] == 'k' else 'k'}")
        if t.ndim != 3 or t.dtype not in DTYPES or other is None or other.shape != t.shape or 0 in t.shape:
            partner = None if other is None else list(other.shape)
            msg = f"{name}: expected a float [P, H, D] with a partner of the same shape, got {t.dtype} {list(t.shape)} and {partner}"
            raise DataError(msg)
        if not bool(t.isfinite().all()):
            msg = f"{name}: expected finite numbers, got NaN or infinity"
            raise DataError(msg)
    if wrong := wrong_conventions(pos_start, window):
        raise DataError(wrong)


def _is_number(text: str) -> bool:
    """Whether a text is a layer's number as we write it: no sign, no leading zero, no digits of other scripts."""
    return text.isdecimal() and len(text) <= 6 and str(int(text)) == text
