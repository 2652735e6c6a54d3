"""Checkpoints: tensors as safetensors and all other state as JSON, in one folder that is replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.errors import ConfigError, DataError, shown
from prefixfast.io.atomic import read_stable, recover_folder, replace_folder, write_file
from prefixfast.io.tensors import write_tensors
from prefixfast.io.untrusted import read_json, read_tensors
from prefixfast.store.runs import STATE, TENSORS
from prefixfast.store.tensor_rows import OWNERS, kept_owners, kept_rows
from prefixfast.training.identity import differences

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
SHOWN_DIFFERENCES = 8


@dataclass(frozen=True)
class Checkpoint:
    """State of a group of prefixes between two steps.

    Attributes:
        identity: Identity of the run: base model, data and options.
        state: State other than tensors: names, step, finished and failed prefixes, number of log lines, and the
            prefixes with rows in each tensor that does not have rows of all of them.
        tensors: Tensors by name; empty before the first step.
    """

    identity: dict[str, Any]
    state: dict[str, Any]
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        """Replace the checkpoint in a folder atomically."""
        state = {"version": VERSION, "identity": self.identity, "state": self.state}

        def fill(target: Path) -> None:
            write_file(target / STATE, json.dumps(state, sort_keys=True).encode())
            if self.tensors:
                write_tensors(target / TENSORS, self.tensors)

        replace_folder(folder, fill, owned=frozenset((STATE, TENSORS)))

    @property
    def is_start(self) -> bool:
        """Whether no step was taken; such a checkpoint only tells which run the folder belongs to."""
        return bool(self.state["step"] == 0)

    @classmethod
    def read(cls, folder: Path) -> Checkpoint | None:
        """Read the checkpoint in a folder; None if there is none.

        Raises:
            DataError: If the checkpoint is damaged or of another version.
        """
        recover_folder(folder)
        return read_stable(folder, cls._read) if folder.is_dir() else None

    @classmethod
    def _read(cls, folder: Path) -> Checkpoint:
        found = read_json(folder / STATE)
        identity, state = found.get("identity"), found.get("state")
        if found.get("version") != VERSION or not isinstance(identity, dict) or not isinstance(state, dict):
            got = f"version {shown(found.get('version'))}; remove {folder} to start again"
            msg = f"{folder / STATE}: expected a checkpoint of version {VERSION}, got {got}"
            raise DataError(msg, path=str(folder / STATE))
        try:
            tensors = read_tensors(folder / TENSORS) if (folder / TENSORS).exists() else {}
        except DataError as e:
            msg = f"{folder}: cannot be read: {e}; remove {folder} to start again"
            raise DataError(msg, path=str(folder / TENSORS)) from e
        return cls(identity, state, tensors)

    def only(self, names: Sequence[str], identity: Mapping[str, Any], num_lines: int) -> Checkpoint:
        """State of some of the prefixes.

        Args:
            names: Names of the prefixes, in the order of the result.
            identity: Identity of their group.
            num_lines: Number of log lines of the run that continues.
        """
        held = self.state["names"]
        keep, owners = [held.index(name) for name in names], self.state.get(OWNERS, {})
        kept = kept_rows(self.tensors, len(held), keep, owners)
        tensors = {
            rows.name: self.tensors[n].unflatten(0, (rows.num_prefixes, -1))[rows.keep].flatten(0, 1)
            for n, rows in kept.items()
        }
        of_names = {key: {n: v for n, v in self.state[key].items() if n in names} for key in ("finished", "failed")}
        of_names[OWNERS] = kept_owners(len(held), keep, owners)
        state = self.state | of_names | {"names": list(names), "log_lines": num_lines}
        return Checkpoint(dict(identity), state, tensors)

    def check_identity(self, identity: Mapping[str, Any], folder: Path) -> None:
        """Check that the checkpoint belongs to a run.

        Args:
            identity: Identity of the run.
            folder: Folder of the checkpoint, for the error.

        Raises:
            ConfigError: If data or options differ, with the differences.
        """
        found = differences(self.identity, json.loads(json.dumps(identity)))
        if found:
            shown = "; ".join(found[:SHOWN_DIFFERENCES]) + (" ..." if len(found) > SHOWN_DIFFERENCES else "")
            msg = (
                f"resume: {folder} is of another run: {shown}; "
                "give the data and options of that run, another output_dir, or overwrite=True instead to start again"
            )
            raise ConfigError(msg)
