"""A checkpoint: tensors as safetensors and everything else as JSON in one folder, which is replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from prefixfast.errors import ConfigError, DataError
from prefixfast.io.atomic import read_settled, recover_folder, replace_folder, write_file
from prefixfast.prefix.peft_format import read_json

STATE, TENSORS = "state.json", "state.safetensors"
VERSION = 1
# Options that change no result: a run may go on with others.
FREE = ("recipe", "token_budget", "gradient_checkpointing", "save_steps", "logging_steps", "report_to")


@dataclass(frozen=True)
class Checkpoint:
    """A run between two steps.

    Attributes:
        identity: What the run is of: base, data, options; see `differences`.
        state: All but tensors: step, finished and failed prefixes, lines of the log.
        tensors: By name; empty once the run is done.
    """

    identity: dict[str, Any]
    state: dict[str, Any]
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Replace the folder's checkpoint by this one; at every moment one of them is whole on disk."""
        files = {
            STATE: json.dumps(
                {"version": VERSION, "identity": self.identity, "state": self.state}, sort_keys=True
            ).encode()
        }
        if self.tensors:
            files[TENSORS] = save({n: t.detach().cpu().contiguous().clone() for n, t in self.tensors.items()})

        def fill(target: Path) -> None:
            for name, data in files.items():
                write_file(target / name, data)

        replace_folder(folder, fill, owned=frozenset((STATE, TENSORS)))

    @classmethod
    def read(cls, folder: Path) -> Checkpoint | None:
        """The folder's checkpoint, None if there is none.

        Raises:
            DataError: If it is damaged.
        """
        recover_folder(folder)
        return read_settled(folder, cls._read) if folder.is_dir() else None

    @classmethod
    def _read(cls, folder: Path) -> Checkpoint:
        found = read_json(folder / STATE)
        if (
            found.get("version") != VERSION
            or not isinstance(found.get("identity"), dict)
            or not isinstance(found.get("state"), dict)
        ):
            msg = f"{folder / STATE}: expected a checkpoint of version {VERSION}, got version {found.get('version')!r}; remove {folder} to start again"
            raise DataError(msg, path=str(folder / STATE))
        try:
            tensors = load((folder / TENSORS).read_bytes()) if (folder / TENSORS).exists() else {}
        except (OSError, SafetensorError) as e:
            msg = f"{folder / TENSORS}: cannot be read: {e}; remove {folder} to start again"
            raise DataError(msg, path=str(folder / TENSORS)) from e
        return cls(found["identity"], found["state"], tensors)

    def check(self, identity: Mapping[str, Any], folder: Path) -> None:
        """Raise `ConfigError` that says which data or options differ, unless this checkpoint is of the run with ``identity``."""
        found = differences(self.identity, json.loads(json.dumps(identity)))
        if found:
            msg = (
                f"resume: {folder} is of another run: {'; '.join(found[:8])}{' ...' if len(found) > 8 else ''}; "
                "give the data and options of that run, another output_dir, or resume=False to start again"
            )
            raise ConfigError(msg)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, in words: digests by name, options by value."""
    found = []
    for part in sorted({*then, *now}):
        old, new = then.get(part), now.get(part)
        if not isinstance(old, dict) or not isinstance(new, dict):
            found += [] if old == new else [f"{part} was {_short(old)}, is {_short(new)}"]
            continue
        for key in sorted(k for k in {*old, *new} if old.get(k) != new.get(k) and not (part == "config" and k in FREE)):
            value = old.get(key, new.get(key))
            plain = key not in old or key not in new or not (isinstance(value, str) and len(value) == 64)
            found.append(
                f"{part}: {key} was {_short(old.get(key))}, is {_short(new.get(key))}"
                if plain
                else f"{part} of {key!r} differs"
            )
    return found


def _short(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60}"
