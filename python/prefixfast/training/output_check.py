"""Checks of the output folder before a run: nothing of an earlier run is lost, and every prefix can be saved."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from prefixfast.errors import ConfigError
from prefixfast.prefix.folder import foreign_adapter
from prefixfast.store.import_export import is_adapter
from prefixfast.training.checkpoint import STATE, TENSORS

LOG, FAILED, CHECKPOINT = "log.jsonl", "failed.jsonl", "checkpoint"
RESERVED_NAMES = ("", ".", "..", LOG, FAILED, CHECKPOINT)
LONGEST_EXTRA = ".{}.xxxxxxxx.tmp"  # name of the folder in which a prefix folder is written
SHOWN = 5  # names in a message

logger = logging.getLogger(__name__)


def check_output_folder(folder: Path, names: Sequence[str], *, is_single: bool, resume: bool, overwrite: bool) -> None:
    """Check everything that would lose a result of this run or of an earlier one.

    Args:
        folder: Output folder, which may not exist.
        names: Names of all prefixes of the run.
        is_single: Whether the folder is the folder of the one prefix, instead of holding a folder for each name.
        resume: Whether the run continues from a checkpoint, if there is one.
        overwrite: Whether the files of an earlier run are replaced.

    Raises:
        ConfigError: If the folder holds an earlier run that would be lost, a name cannot be a folder, or the folder
            cannot be written.
    """
    folder = _resolved(folder)
    if not is_single:
        check_folder_names(names)
    targets = [folder] if is_single else [folder / name for name in names]
    check_writable(folder.parent if is_single else folder, [t.name for t in targets])
    for target in targets:
        if os.path.lexists(target) and not target.is_dir():
            msg = f"output_dir: expected a folder or nothing at {str(target)!r}, got a file; give another output_dir"
            raise ConfigError(msg)
        if kind := foreign_adapter(target):
            holds = f"{str(target)!r} holds a PEFT adapter of type {kind}, which the prefix would replace"
            msg = f"output_dir: {holds}; give another output_dir"
            raise ConfigError(msg)
    if overwrite:
        _warn_kept(folder, targets)
        return
    if found := _earlier(folder, targets, resume=resume):
        advice = (
            "there is no checkpoint to go on from; give --overwrite (overwrite=True) instead of --resume to replace it"
            if resume
            else "give --resume (resume=True) to continue that run, --overwrite (overwrite=True) to replace it"
        )
        msg = f"output_dir: {str(folder)!r} holds {found} of an earlier run; {advice}, or another output_dir"
        raise ConfigError(msg)


def check_folder_names(names: Sequence[str]) -> None:
    """Raise `ConfigError` for the name of a prefix that cannot be a folder of ``output_dir``."""
    for name in names:
        is_temporary = name.startswith(".") and name.endswith((".tmp", ".previous"))
        if name in RESERVED_NAMES or {"/", "\\", "\0"} & set(name) or is_temporary:
            msg = f"prefix name {name!r:.200} cannot be a folder of output_dir; rename it"
            raise ConfigError(msg)


def check_writable(root: Path, names: Sequence[str]) -> None:
    """Check on the file system itself that a folder of each name can be written in ``root``.

    Length, characters, permission and names that the file system does not tell apart differ between systems, so that
    a folder of each name is made and removed beside the place.

    Raises:
        ConfigError: If it cannot, with the name and the reason.
    """
    existing = next((p for p in (root, *root.parents) if os.path.lexists(p)), root)
    if not existing.is_dir():
        msg = f"output_dir: expected a folder or nothing at {str(existing)!r:.300}, got a file; give another output_dir"
        raise ConfigError(msg)
    try:
        probe = Path(tempfile.mkdtemp(dir=existing, prefix=".prefixfast-", suffix=".tmp"))
    except (OSError, ValueError) as e:
        msg = f"output_dir: {str(root)!r:.300} cannot be written: {_reason(e)}; give another output_dir"
        raise ConfigError(msg) from e
    try:
        inner = probe / root.relative_to(existing)
        try:
            inner.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as e:
            msg = f"output_dir: {str(root)!r:.300} cannot be made: {_reason(e)}; give another output_dir"
            raise ConfigError(msg) from e
        for name in (LOG, FAILED, CHECKPOINT):
            (inner / LONGEST_EXTRA.format(name)).mkdir()
        for name in names:
            try:
                (inner / LONGEST_EXTRA.format(name)).mkdir()
            except (OSError, ValueError) as e:
                msg = f"prefix name {name!r:.200} cannot be a folder of {str(root)!r:.300}: {_reason(e)}; rename it"
                raise ConfigError(msg) from e
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _resolved(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, ValueError, RuntimeError) as e:  # NUL, too long, or a loop of links
        msg = f"output_dir: {str(folder)!r:.300} cannot be a folder: {_reason(e)}; give another output_dir"
        raise ConfigError(msg) from e


def _reason(e: Exception) -> str:
    if isinstance(e, FileExistsError):
        return "the file system does not tell it apart from another name of the run"
    return e.strerror if isinstance(e, OSError) and e.strerror else str(e)


def _earlier(folder: Path, targets: Sequence[Path], *, resume: bool) -> str:
    """Description of what a run without ``overwrite`` would lose; empty if nothing."""
    checkpoint = folder / CHECKPOINT
    if resume and any(checkpoint.glob(f"*/{STATE}")):
        return ""  # whose identity is compared with that of this run
    prefixes = [t.name for t in targets if is_adapter(t)]
    found = ["the prefix " + ", ".join(map(repr, prefixes[:SHOWN]))] if prefixes else []
    if not resume:
        found += ["a checkpoint"] if any(checkpoint.glob(f"*/{TENSORS}")) else []
        found += [LOG] if _has_content(folder / LOG) else []
    return ", ".join(found)


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _warn_kept(folder: Path, targets: Sequence[Path]) -> None:
    """Name the prefixes of an earlier run that this run does not replace."""
    inside = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    kept = [p.name for p in (folder, *inside) if p not in targets and is_adapter(p)]
    if kept:
        logger.warning("overwrite: %s keeps %d prefixes that this run does not train: %s", folder, len(kept), kept[:5])


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of an earlier run in an output folder; other files stay."""
    checkpoint = folder / CHECKPOINT
    for group in checkpoint.glob("*"):
        if group.name.isdecimal() or group.name.endswith((".tmp", ".previous")):
            for name in (STATE, TENSORS):
                (group / name).unlink(missing_ok=True)
            _remove_if_empty(group)
    _remove_if_empty(checkpoint)


def remove_unfinished(folder: Path, names: Sequence[str], *, is_single: bool) -> None:
    """Remove the temporary files that a killed run left; files of other programs stay.

    Args:
        folder: Output folder.
        names: Names of the prefixes of the run.
        is_single: Whether the folder is the folder of the one prefix.
    """
    ours = {LOG, FAILED, *(() if is_single else names)}
    places = [(folder, ours), (folder.parent, {folder.name} if is_single else set())]
    numbers = {p.name.partition(".")[0] for p in (folder / CHECKPOINT).glob("[0-9]*")}
    places.append((folder / CHECKPOINT, numbers | {str(i) for i in range(100)}))
    for place, known in places:
        for left in place.glob(".*.tmp"):
            if left.name[1:-4].rpartition(".")[0] in known:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
