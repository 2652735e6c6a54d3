"""The files of a run: prefixes, log, failures and checkpoints, which stay readable if the run is killed at any time."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.config.json_types import JSON
from prefixfast.errors import DataError
from prefixfast.io.atomic import recover_folder, replace_file
from prefixfast.io.json_lines import json_line
from prefixfast.prefix.prefix import Prefix
from prefixfast.prefix.tuned_folder import is_tuned
from prefixfast.prefix.tuned_weights import TunedWeights
from prefixfast.store import PrefixStore
from prefixfast.store.entry import StoredPrefix
from prefixfast.store.runs import CHECKPOINT, FAILED, LOG, STATE, TENSORS
from prefixfast.training.checkpoint import Checkpoint
from prefixfast.training.output_check import PROBE
from prefixfast.training.saved_prefixes import EarlierPrefix

if TYPE_CHECKING:
    from prefixfast.training.group_data import GroupData

logger = logging.getLogger(__name__)


class OutputDir:
    """The output folder and the store of a run.

    Args:
        folder: Folder for prefixes, ``log.jsonl``, ``failed.jsonl`` and checkpoints; None writes nothing.
        store: Store that gets each finished prefix; None for no store.
        names: Names of all prefixes of the run.
        is_single: Whether the folder is the folder of the one prefix, instead of holding a folder for each name.

    Attributes:
        log: Lines of the log.
        unchanged: Prefixes by name that are not trained, since the store holds them with the same rows and options.
    """

    def __init__(
        self, folder: Path | None, store: PrefixStore | None, names: Sequence[str] = (), *, is_single: bool
    ) -> None:
        self.folder, self.store, self.names, self.is_single = folder, store, names, is_single
        self.log: list[dict[str, JSON]] = []
        self.unchanged: dict[str, EarlierPrefix] = {}
        self._start = time.perf_counter()

    def open(self, *, resume: bool) -> None:
        """Create the folder.

        Args:
            resume: Whether the log of an earlier run is read. Otherwise the earlier log, failures and checkpoints are
                removed; earlier prefixes stay until new ones are saved.
        """
        if self.folder is None:
            return
        if resume:
            recover_folder(self.folder)
            resume = (self.folder / CHECKPOINT).exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(self.folder, self.names, is_single=self.is_single)
        if not resume:
            _remove_checkpoints(self.folder)
            (self.folder / FAILED).unlink(missing_ok=True)
        if not resume or not (self.folder / LOG).exists():
            replace_file(self.folder / LOG, b"")
        self.log = list(read_lines(self.folder / LOG))

    def parts(self, data: GroupData, *, resume: bool) -> list[GroupData]:
        """Groups that are trained one after the other in place of a group: here its waves."""
        from prefixfast.training.waves import waves  # imports torch, which a refused call needs not wait for

        return waves(data)

    def read_checkpoint(self, number: int, identity: Mapping[str, Any]) -> Checkpoint | None:
        """Read the checkpoint from which a group continues, and keep the lines of the log up to it.

        Args:
            number: Number of the group.
            identity: Identity of the group.

        Returns:
            Checkpoint, None if the group starts at the first step.

        Raises:
            ConfigError: If the checkpoint is of another run.
            DataError: If the checkpoint is damaged.
        """
        folder = self.checkpoint_folder(number)
        found = None if folder is None else Checkpoint.read(folder)
        if folder is None or found is None:
            logger.info("resume: there is no checkpoint in %s, starting at the first step", folder)
        else:
            found.check_identity(identity, folder)
            if not found.is_start:
                return found
        self.drop_group_from_log(number)
        return None

    def read_finished(self, name: str, digest: str) -> Prefix | TunedWeights | StoredPrefix:
        """Read a prefix that an earlier run finished, or find its version in the store.

        Args:
            name: Name of the prefix.
            digest: Digest of the prefix.

        Raises:
            DataError: If the folder is damaged or holds another prefix.
        """
        folder = self.prefix_folder(name)
        assert folder is not None
        prefix = TunedWeights.from_pretrained(folder) if is_tuned(folder) else Prefix.from_pretrained(folder)
        if prefix.digest != digest:
            msg = (
                f"{folder}: expected the prefix that this run finished; another one lies there: give overwrite=True "
                "instead of resume=True to start again and replace it"
            )
            raise DataError(msg, path=str(folder))
        return prefix

    def truncate_log(self, num_lines: int) -> None:
        """Keep the first lines of the log only.

        Args:
            num_lines: Number of lines at the time of a checkpoint.
        """
        self._replace_log(self.log[:num_lines])

    def drop_group_from_log(self, group: int) -> None:
        """Remove the lines of a group and of later groups from the log; lines without a group belong to the first."""

        def is_earlier(line: dict[str, Any]) -> bool:
            return "metrics" not in line and bool(line.get("group", 0) < group)

        self._replace_log([line for line in self.log if is_earlier(line)])

    def _replace_log(self, lines: list[dict[str, JSON]]) -> None:
        self.log = lines
        if self.folder is not None:
            replace_file(self.folder / LOG, b"".join(map(json_line, lines)))

    def write_log(self, **values: JSON) -> dict[str, JSON]:
        """Add a line to the log.

        Args:
            values: Values of the line; ``seconds`` since the start of the run are added.

        Returns:
            The line.
        """
        line: dict[str, JSON] = {"seconds": round(time.perf_counter() - self._start, 3), **values}
        self.log.append(line)
        if self.folder is not None:
            with (self.folder / LOG).open("ab") as f:
                f.write(json_line(line))
        return line

    def checkpoint_folder(self, group: int) -> Path | None:
        """Folder of a group's checkpoint, None without an output folder."""
        return None if self.folder is None else self.folder / CHECKPOINT / str(group)

    def prefix_folder(self, name: str) -> Path | None:
        """Folder of a prefix, None without an output folder."""
        return None if self.folder is None else self.folder if self.is_single else self.folder / name

    def save_prefix(self, name: str, prefix: Prefix | TunedWeights, *, resumed: bool) -> StoredPrefix | None:
        """Save a finished prefix to its folder and put it into the store.

        Args:
            name: Name of the prefix.
            prefix: Trained prefix, or weights, which have no store.
            resumed: Whether the run was resumed, so that the store may hold the prefix already and no second version is
                put.

        Returns:
            Version in the store, None without a store.
        """
        if (folder := self.prefix_folder(name)) is not None:
            prefix.save_pretrained(folder, overwrite=True)  # the folder is checked before the run begins
        if self.store is None or not isinstance(prefix, Prefix):
            return None
        if resumed and name in self.store and (found := self.store.info(name)).digest == prefix.digest:
            return found
        return self.store.put(name, prefix)

    def end(self, finished: Sequence[str]) -> None:
        """Remove what only an unfinished run needs; here nothing.

        Args:
            finished: Names of the prefixes that the run has saved.
        """

    def close(self) -> None:
        """Let other processes use the files; here nothing."""

    def write_failed(self, failed: Mapping[str, str]) -> None:
        """Replace ``failed.jsonl``.

        Args:
            failed: Error message of each failed prefix so far.
        """
        if self.folder is not None and failed:
            lines = (json_line({"prefix": name, "error": text}) for name, text in failed.items())
            replace_file(self.folder / FAILED, b"".join(lines))


def read_lines(path: Path) -> Iterator[dict[str, JSON]]:
    """Lines of a log, without a last line that was cut while it was written."""
    with contextlib.suppress(ValueError):
        for line in path.read_bytes().splitlines():  # those of a string would also end at U+2028 in a name
            yield json.loads(line)


def _remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of an earlier run in an output folder; other files stay."""
    checkpoint = folder / CHECKPOINT
    for group in checkpoint.glob("*"):
        if group.name.isdecimal() or group.name.endswith((".tmp", ".previous")):
            for name in (STATE, TENSORS):
                (group / name).unlink(missing_ok=True)
            _remove_if_empty(group)
    _remove_if_empty(checkpoint)


def _remove_unfinished(folder: Path, names: Sequence[str], *, is_single: bool) -> None:
    """Remove the temporary files that a killed run left; files of other programs stay.

    Args:
        folder: Output folder.
        names: Names of the prefixes of the run.
        is_single: Whether the folder is the folder of the one prefix.
    """
    ours = {LOG, FAILED, PROBE, *(() if is_single else names)}
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
