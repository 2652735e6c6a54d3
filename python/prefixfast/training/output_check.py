"""Checks of the output folder before a run: nothing of an earlier run is lost, and every prefix can be saved."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from prefixfast.errors import ConfigError, shown
from prefixfast.prefix.folder import other_content
from prefixfast.store.import_export import is_adapter
from prefixfast.store.runs import CHECKPOINT, FAILED, LOG, STATE, TENSORS

RESERVED_NAMES = ("", ".", "..", LOG, FAILED, CHECKPOINT)
LONGEST_EXTRA = ".{}.xxxxxxxx.tmp"  # name of the folder in which a prefix folder is written
PROBE = "prefixfast-probe"  # start of the name of the folder that a check makes and removes
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
            raise ConfigError(_got_file(target))
        if held := other_content(target, "prefix", overwrite=True):
            msg = f"output_dir: {shown(str(target))} holds {held}, which would be lost; give another output_dir"
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
        msg = f"output_dir: {shown(str(folder))} holds {found} of an earlier run; {advice}, or another output_dir"
        raise ConfigError(msg)


def check_folder_names(names: Sequence[str]) -> None:
    """Raise `ConfigError` for the name of a prefix that cannot be a folder of ``output_dir``."""
    for name in names:
        is_temporary = name.startswith(".") and name.endswith((".tmp", ".previous"))
        if name in RESERVED_NAMES or {"/", "\\", "\0"} & set(name) or is_temporary:
            msg = f"prefix name {shown(name)} cannot be a folder of output_dir; rename it"
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
        raise ConfigError(_got_file(existing))
    try:
        probe = Path(tempfile.mkdtemp(dir=existing, prefix=f".{PROBE}.", suffix=".tmp"))
    except (OSError, ValueError) as e:
        msg = f"output_dir: {shown(str(root))} cannot be written: {_reason(e)}; give another output_dir"
        raise ConfigError(msg) from e
    try:
        inner = probe / root.relative_to(existing)
        try:
            inner.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as e:
            msg = f"output_dir: {shown(str(root))} cannot be made: {_reason(e)}; give another output_dir"
            raise ConfigError(msg) from e
        for name in (LOG, FAILED, CHECKPOINT):
            (inner / LONGEST_EXTRA.format(name)).mkdir()
        for name in names:
            try:
                (inner / LONGEST_EXTRA.format(name)).mkdir()
            except (OSError, ValueError) as e:
                msg = f"prefix name {shown(name)} cannot be a folder of {shown(str(root))}: {_reason(e)}; rename it"
                raise ConfigError(msg) from e
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _resolved(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, ValueError, RuntimeError) as e:  # NUL, too long, or a loop of links
        msg = f"output_dir: {shown(str(folder))} cannot be a folder: {_reason(e)}; give another output_dir"
        raise ConfigError(msg) from e


def _got_file(path: Path) -> str:
    return f"output_dir: expected a folder or nothing at {shown(str(path))}, got a file; give another output_dir"


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
    found = ["the prefix " + ", ".join(map(shown, prefixes[:SHOWN]))] if prefixes else []
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
        names = ", ".join(map(shown, kept[:SHOWN]))
        logger.warning("overwrite: %s keeps %d prefixes that this run does not train: %s", folder, len(kept), names)
