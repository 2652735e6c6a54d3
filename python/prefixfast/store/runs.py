"""The folders of training runs in a store: log, failures and checkpoints of runs without an output folder.

``.prefixfast-runs/{time}-{random}/`` belongs to one run and is locked by its process. It holds ``run.json`` with the
names that the run trains, ``log.jsonl``, ``failed.jsonl``, and while the run is unfinished ``checkpoint/{group}/``.
This module imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefixfast.errors import DataError
from prefixfast.io.atomic import STALE_SECONDS, recover_folder, replace_file, replace_folder, write_file
from prefixfast.io.json_lines import json_bytes
from prefixfast.io.untrusted import read_json
from prefixfast.store.tensor_rows import OWNERS, kept_owners, select_rows
from prefixfast.store.workspace import lock, new_locked, unlock

RUNS = ".prefixfast-runs"
RUN, LOG, FAILED, CHECKPOINT = "run.json", "log.jsonl", "failed.jsonl", "checkpoint"
STATE, TENSORS = "state.json", "state.safetensors"  # files of a checkpoint
KEPT = 20  # ended runs whose log is kept
# Parts of a checkpoint's identity that are mappings of names.
BY_NAME = ("data", "eval_data", "own config", "own prefix_config", "init")
LOGGED_BY_NAME = ("loss_by_prefix", "eval_loss_by_prefix", "metrics")  # values of log lines that are mappings of names


@dataclass
class Removed:
    """Traces of names that were removed from the folders of runs.

    Attributes:
        files: Number of files that were removed or replaced.
        bytes: Number of bytes by which the files became smaller.
        checkpoints: Number of checkpoints that held one of the names.
        running: Names of folders of running processes that train one of the names and were left alone.
    """

    files: int = 0
    bytes: int = 0
    checkpoints: int = 0
    running: tuple[str, ...] = ()

    def count(self, before: int, after: int) -> None:
        """Count a file that became smaller."""
        self.files += 1
        self.bytes += before - after


class RunFolder:
    """Folder of a run, locked by this process until it is released.

    Args:
        store: Directory of the store.
        names: Names that the run trains.
    """

    def __init__(self, store: Path, names: Iterable[str]) -> None:
        root = store / RUNS
        root.mkdir(exist_ok=True)
        self.path, self._fd = new_locked(root, _new_name)
        about = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "names": list(names)}
        write_file(self.path / RUN, json_bytes(about))

    def release(self) -> None:
        """Give up the lock, so that other processes can continue the run."""
        unlock(self._fd)
        self._fd = None


@contextlib.contextmanager
def ended_run(folder: Path, *, shared: bool = False) -> Iterator[bool]:
    """Context manager that locks the folder of a run whose process has ended.

    Args:
        folder: Folder of the run.
        shared: Whether processes that continue other prefixes of the run can have the folder too.

    Yields:
        Whether the process has ended. Without locks of folders, a process counts as ended when it has written nothing
        for `STALE_SECONDS`.
    """
    try:
        fd = lock(folder, shared=shared)
    except OSError:  # a running process has the lock, or the folder was removed
        yield False
        return
    try:
        yield folder.is_dir() and (fd is not None or _seconds_since_write(folder) > STALE_SECONDS)
    finally:
        unlock(fd)


@contextlib.contextmanager
def one_at_a_time(store: Path) -> Iterator[None]:
    """Context manager that waits until no other process takes over or removes checkpoints of earlier runs.

    Args:
        store: Directory of the store.
    """
    root = store / RUNS
    root.mkdir(exist_ok=True)
    fd = lock(root, wait=True)
    try:
        yield
    finally:
        unlock(fd)


def run_folders(store: Path) -> list[Path]:
    """Folders of all runs of a store, newest first."""
    try:
        return sorted((p for p in (store / RUNS).iterdir() if p.is_dir()), key=lambda p: p.name, reverse=True)
    except OSError:
        return []


def checkpoint_folders(run: Path) -> list[Path]:
    """Folders of the checkpoints of a run that has ended, by group."""
    root = run / CHECKPOINT
    for replaced in root.glob(".*.previous"):  # a process was killed while it replaced the checkpoint
        recover_folder(root / replaced.name[1 : -len(".previous")])
    return sorted((p for p in root.glob("[0-9]*") if p.name.isdecimal()), key=lambda p: int(p.name))


def is_mentioned(store: Path, name: str) -> bool:
    """Whether the folder of a run mentions a name."""
    return any(name in _names(run) for run in run_folders(store))


def remove_names(store: Path, names: Sequence[str]) -> Removed:
    """Remove every trace of names from the folders of runs that have ended: checkpoints, logs, failures.

    Args:
        store: Directory of the store.
        names: Names of prefixes.
    """
    removed = Removed()
    for run in run_folders(store):
        with ended_run(run) as has_ended:
            if has_ended:
                _clean(run, names, removed)
            elif set(names) & set(_names(run)):
                removed.running += (run.name,)
    return removed


def drop_from_checkpoints(run: Path, names: Sequence[str], removed: Removed | None = None) -> None:
    """Remove the rows of names from the checkpoints of a run, and checkpoints that have no name left.

    Args:
        run: Folder of a run that has ended or is of this process.
        names: Names of prefixes.
        removed: Report that counts the changes.
    """
    removed = removed or Removed()
    for folder in checkpoint_folders(run):
        try:
            whole = read_json(folder / STATE)
            held = list(whole["state"]["names"])
        except (DataError, KeyError, TypeError):  # damaged, so that no run can continue from it
            _remove(folder, removed)
            continue
        keep = [i for i, name in enumerate(held) if name not in names]
        if not keep:
            _remove(folder, removed)
        elif len(keep) < len(held):
            _replace_checkpoint(folder, whole, keep, names, removed)
            removed.checkpoints += 1
    for left in (run / CHECKPOINT).glob(".*"):  # a checkpoint that a killed process was writing or had replaced
        _remove(left, removed)


def end_run(store: Path, run: RunFolder, finished: Sequence[str]) -> None:
    """Remove the checkpoints that a finished run makes useless, and the oldest logs.

    Args:
        store: Directory of the store.
        run: Folder of the run.
        finished: Names of the prefixes that the run has put into the store.
    """
    shutil.rmtree(run.path / CHECKPOINT, ignore_errors=True)
    drop_finished(store, finished, running=run.path)


def drop_finished(store: Path, finished: Sequence[str], *, running: Path | None = None) -> None:
    """Remove the checkpoints of finished prefixes from the folders of runs that have ended, and the oldest logs.

    Args:
        store: Directory of the store.
        finished: Names of prefixes that the store holds.
        running: Folder of a run of this process, which is left alone.
    """
    with one_at_a_time(store):
        _drop_finished(store, finished, running)


def _drop_finished(store: Path, finished: Sequence[str], running: Path | None) -> None:
    kept = 0
    for other in run_folders(store):
        if other == running:
            continue
        with ended_run(other) as has_ended:
            if not has_ended:
                continue
            drop_from_checkpoints(other, finished)
            for unfinished in other.glob(".*.tmp"):  # a file that a killed process was writing
                _remove(unfinished, Removed())
            if not checkpoint_folders(other):
                shutil.rmtree(other / CHECKPOINT, ignore_errors=True)
                kept += 1
                if kept >= KEPT:
                    shutil.rmtree(other, ignore_errors=True)


def _clean(run: Path, names: Sequence[str], removed: Removed) -> None:
    """Remove every trace of names from the folder of a run that has ended."""
    mentioned = _names(run)
    if not set(names) & set(mentioned):
        return
    left = [name for name in mentioned if name not in names]
    if not left:
        _remove(run, removed)
        return
    drop_from_checkpoints(run, names, removed)
    _filter_lines(run / FAILED, lambda line: None if line.get("prefix") in names else line, removed)
    _filter_lines(run / LOG, lambda line: _without(line, names), removed)
    _replace(run / RUN, json_bytes({**_read(run / RUN), "names": left}), removed)
    for unfinished in run.glob(".*.tmp"):  # a file that a killed process was writing
        _remove(unfinished, removed)


def _replace_checkpoint(
    folder: Path, whole: dict[str, Any], keep: Sequence[int], names: Sequence[str], removed: Removed
) -> None:
    """Replace a checkpoint by one of fewer prefixes."""
    state, identity = whole["state"], whole["identity"]
    before = sum(p.stat().st_size for p in folder.iterdir())
    held = state["names"]
    for part in (*(identity.get(key) for key in BY_NAME), state.get("finished"), state.get("failed")):
        for name in names:
            if isinstance(part, dict):
                part.pop(name, None)
    owners = state.get(OWNERS, {})
    left = {"names": [held[i] for i in keep], OWNERS: kept_owners(len(held), keep, owners)}
    files = {STATE: json.dumps(whole | {"state": state | left}).encode()}
    if (folder / TENSORS).exists():
        files[TENSORS] = select_rows((folder / TENSORS).read_bytes(), len(held), keep, owners)

    def fill(target: Path) -> None:
        for name, data in files.items():
            write_file(target / name, data)

    replace_folder(folder, fill, owned=frozenset((STATE, TENSORS)))
    removed.files += len(files)
    removed.bytes += before - sum(map(len, files.values()))


def _without(line: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """A log line without the values of names."""
    return {
        key: {n: v for n, v in value.items() if n not in names}
        if key in LOGGED_BY_NAME and isinstance(value, dict)
        else value
        for key, value in line.items()
    }


def _filter_lines(path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None], removed: Removed) -> None:
    """Replace each line of a file of JSON lines by its changed value, or remove it; cut lines are removed."""
    if not path.exists():
        return
    changed: list[bytes] = []
    for raw in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            line = change(json.loads(raw))
            changed += [] if line is None else [json_bytes(line) + b"\n"]
    _replace(path, b"".join(changed), removed)


def _replace(path: Path, data: bytes, removed: Removed) -> None:
    """Replace a file, if its content changes."""
    before = path.read_bytes() if path.exists() else b""
    if data != before:
        replace_file(path, data)
        removed.count(len(before), len(data))


def _remove(path: Path, removed: Removed) -> None:
    """Remove a file, or a folder with its files."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if not file.is_dir():
            removed.checkpoints += file.name == STATE
            removed.count(file.lstat().st_size, 0)
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _names(run: Path) -> list[str]:
    """Names that the folder of a run mentions."""
    states = (_read(folder / STATE).get("state") for folder in (run / CHECKPOINT).glob("*"))
    lists = [_read(run / RUN).get("names"), *(state.get("names") for state in states if isinstance(state, dict))]
    return list(dict.fromkeys(n for names in lists if isinstance(names, list) for n in names if isinstance(n, str)))


def _read(path: Path) -> dict[str, Any]:
    """Content of a JSON file; empty if it is missing or damaged."""
    try:
        return read_json(path)
    except DataError:
        return {}


def _new_name() -> str:
    """Name of a new folder; names sort by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"


def _seconds_since_write(folder: Path) -> float:
    return time.time() - max(p.lstat().st_mtime for p in (folder, *folder.rglob("*")))
