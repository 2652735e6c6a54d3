"""`Prefix`: a learned block of keys and values with everything that says how to use it, in memory and on disk.

Shape letters: P prefix rows, H kv heads, D head dim.
On disk a prefix is a PEFT adapter folder whenever PEFT can hold it exactly, with our data beside it in ``prefixfast.json``; else ``prefix.safetensors``
takes the adapter's place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from prefixfast.errors import DataError
from prefixfast.files import read_settled, replace_folder, write_file
from prefixfast.interchange import peft

META, TENSORS = "prefixfast.json", "prefix.safetensors"
OWNED = frozenset({META, TENSORS, peft.CONFIG, peft.WEIGHTS})
VERSION = 1
SITES = ("self", "enc", "cross")


@dataclass(frozen=True, eq=False)
class Prefix:
    """A learned prefix. Immutable; compare prefixes by their `digest`.

    Attributes:
        kv: ``{site}.{layer}.k`` and ``.v`` of ``[P, H, D]`` each; keys are stored after RoPE. Layers may differ in P, H and D or be absent.
        pos_start: Position of the first token after the prefix: P as PEFT has it, or 0.
        window: ``"slide"``: sliding windows hide old prefix rows, as in PEFT; ``"always"``: they never do.
        base: Fingerprint of the base model, None if unknown (an imported PEFT adapter).
        linearizer: How rows become prompts: ``{"task": name}`` and its settings; None for plain prompts.
        decoding: Default `GenerationParams` of this prefix.
        training: How it came about: settings, steps, final losses.
    """

    kv: Mapping[str, Tensor]
    pos_start: int
    window: Literal["slide", "always"] = "slide"
    base: Mapping[str, Any] | None = None
    linearizer: Mapping[str, Any] | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self.kv, self.pos_start, self.window)

    @property
    def length(self) -> int:
        """P, of the longest layer."""
        return max(len(t) for t in self.kv.values())

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Of each tensor: P, H, D."""
        return {name: (len(t), t.shape[1], t.shape[2]) for name, t in self.kv.items()}

    @property
    def num_stored(self) -> int:
        """Numbers stored (the paper's 0.1 %; training with an MLP has many more, see ``training["num_trained"]``)."""
        return sum(t.numel() for t in self.kv.values())

    @property
    def num_trained(self) -> int:
        """Numbers that training adjusted."""
        return int(self.training.get("num_trained", self.num_stored))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.kv.values())

    @property
    def num_layers(self) -> int:
        """Layers of site ``self``."""
        return 1 + max((int(n.split(".")[1]) for n in self.kv if n.startswith("self.")), default=-1)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of tensors and conventions: with equal digests, equal prompts and equal parameters give equal text."""
        sha = hashlib.sha256(json.dumps([self.pos_start, self.window]).encode())
        for name, t in sorted(self.kv.items()):
            sha.update(json.dumps([name, list(t.shape), str(t.dtype)]).encode())
            sha.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the prefix as a folder; an existing prefix there is replaced atomically, other files in it stay.

        Raises:
            OSError: If the disk refuses; what was there before is intact.
        """
        why_not = peft.reason_against(self.kv, self.pos_start, self.window)
        files = (
            {TENSORS: save({n: t.detach().cpu().contiguous().clone() for n, t in self.kv.items()})}
            if why_not
            else peft.files(self.kv, (self.base or {}).get("name"))
        )
        fields = {n: getattr(self, n) for n in ("pos_start", "window", "base", "linearizer", "decoding", "training")}
        meta = {"version": VERSION, "digest": self.digest, "not_peft_because": why_not, **fields}
        files[META] = json.dumps(meta, indent=2, sort_keys=True, ensure_ascii=False).encode()

        def write(target: Path) -> None:
            for name, data in files.items():
                write_file(target / name, data)

        replace_folder(Path(folder), write, owned=OWNED)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Prefix:
        """Read a folder written by `save_pretrained` or by PEFT (decoder-only PREFIX_TUNING).

        Raises:
            DataError: If the folder is missing, damaged, or something else; says which file.
        """
        return read_settled(Path(folder), cls._read)

    @classmethod
    def _read(cls, path: Path) -> Prefix:
        if not path.is_dir():
            msg = f"{path}: no such folder; expected a prefix or PEFT adapter folder"
            raise DataError(msg, path=str(path))
        if not (path / META).exists():
            kv, config = peft.read(path)
            name = config.get("base_model_name_or_path")
            told = {"pos_start": len(kv["self.0.k"]), "base": {"name": name} if name else None, "training": {"imported_from": "peft"}}
            return cls._from_file(path / peft.WEIGHTS, kv, told)
        fields = _read_meta(path / META)
        digest = fields.pop("digest")
        own = path / TENSORS
        prefix = cls._from_file(own, peft.read_tensors(own), fields) if own.exists() else cls._from_file(path / peft.WEIGHTS, peft.read(path)[0], fields)
        if prefix.digest != digest:
            msg = f"the tensors are not those that {META} describes: another program changed the folder; delete {META} to read it as a PEFT adapter"
            raise DataError(msg, path=str(path / META))
        return prefix

    @classmethod
    def _from_file(cls, file: Path, kv: dict[str, Tensor], fields: dict[str, Any]) -> Prefix:
        try:
            return cls(kv, **fields)
        except DataError as e:
            msg = f"{file.name}: {e}"
            raise DataError(msg, path=str(file)) from e


def _read_meta(path: Path) -> dict[str, Any]:
    meta = peft.read_json(path)
    expected = {"version", "digest", "not_peft_because", "pos_start", "window", "base", "linearizer", "decoding", "training"}
    if meta.get("version") != VERSION:
        msg = f"{path.name}: expected version {VERSION}, got {meta.get('version')!r}; update prefixfast to read newer folders"
        raise DataError(msg, path=str(path))
    if set(meta) != expected:
        msg = f"{path.name}: expected the keys {sorted(expected)}, got {sorted(meta)}"
        raise DataError(msg, path=str(path))
    for key in ("version", "not_peft_because"):
        del meta[key]
    kinds = {"pos_start": int, "window": str, "digest": str, "decoding": dict, "training": dict}
    for key, kind in kinds.items():
        if type(meta[key]) is not kind:
            msg = f"{path.name}: {key}: expected {kind.__name__}, got {meta[key]!r}"
            raise DataError(msg, path=str(path))
    if meta["pos_start"] < 0 or meta["window"] not in ("slide", "always"):
        msg = f"{path.name}: expected pos_start >= 0 and window 'slide' or 'always', got {meta['pos_start']!r} and {meta['window']!r}"
        raise DataError(msg, path=str(path))
    for key in ("base", "linearizer"):
        if meta[key] is not None and not isinstance(meta[key], dict):
            msg = f"{path.name}: {key}: expected an object or null, got {meta[key]!r}"
            raise DataError(msg, path=str(path))
    return meta


def _check(kv: Mapping[str, Tensor], pos_start: int, window: str) -> None:
    if not kv:
        msg = "a prefix needs at least one layer's keys and values"
        raise DataError(msg)
    for name, t in kv.items():
        parts = name.split(".")
        if len(parts) != 3 or parts[0] not in SITES or not parts[1].isdecimal() or parts[2] not in ("k", "v"):
            msg = f"tensor name: expected {{{'|'.join(SITES)}}}.{{layer}}.{{k|v}}, got {name!r}"
            raise DataError(msg)
        other = kv.get(f"{parts[0]}.{parts[1]}.{'v' if parts[2] == 'k' else 'k'}")
        if t.ndim != 3 or not t.is_floating_point() or other is None or other.shape != t.shape or 0 in t.shape:
            partner = None if other is None else list(other.shape)
            msg = f"{name}: expected a float [P, H, D] with a partner of the same shape, got {t.dtype} {list(t.shape)} and {partner}"
            raise DataError(msg)
        if not bool(t.isfinite().all()):
            msg = f"{name}: expected finite numbers, got NaN or infinity"
            raise DataError(msg)
    if pos_start < 0 or window not in ("slide", "always"):
        msg = f"expected pos_start >= 0 and window 'slide' or 'always', got {pos_start!r} and {window!r}"
        raise DataError(msg)
