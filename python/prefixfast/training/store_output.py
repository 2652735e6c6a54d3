"""`StoreOutput`, the files of a run that has a store and no output folder: log, failures and checkpoints in the store.

Each run has a folder of its own in the store. A run that resumes continues from the checkpoints that earlier runs have
left there, and leaves out what the store already holds of the same rows and options.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.config.json_types import JSON
from prefixfast.errors import DataError, UnknownPrefixError
from prefixfast.io.atomic import replace_file
from prefixfast.io.untrusted import read_json
from prefixfast.store import PrefixStore
from prefixfast.store.entry import StoredPrefix
from prefixfast.store.runs import (
    LOG,
    STATE,
    RunFolder,
    checkpoint_folders,
    drop_from_checkpoints,
    end_run,
    ended_run,
    one_at_a_time,
    run_folders,
)
from prefixfast.training.checkpoint import VERSION, Checkpoint
from prefixfast.training.identity import IDENTITY, prefix_identities
from prefixfast.training.metrics import stored_metrics
from prefixfast.training.output_dir import OutputDir, read_lines
from prefixfast.training.saved_prefixes import EarlierPrefix

if TYPE_CHECKING:
    from prefixfast.training.group_data import GroupData

logger = logging.getLogger(__name__)


class StoreOutput(OutputDir):
    """Files of a run in its store.

    Args:
        store: Store that gets each finished prefix.
        names: Names of all prefixes of the run.

    Attributes:
        unchanged: Prefixes by name that an earlier run has finished with the same rows and options.
    """

    def __init__(self, store: PrefixStore, names: Sequence[str]) -> None:
        super().__init__(None, store, names, is_single=False)
        self.root = store.path
        self.kept = store
        self._run: RunFolder | None = None
        self._earlier: dict[int, Path] = {}  # checkpoint of an earlier run by the number of the group that continues it
        self._num_parts = 0
        self._locks = contextlib.ExitStack()

    def open(self, *, resume: bool) -> None:
        """Make the folder of the run."""
        self._run = RunFolder(self.root, self.names)
        self.folder = self._run.path
        replace_file(self.folder / LOG, b"")

    def prefix_folder(self, name: str) -> Path | None:
        """No folder, since the store alone holds the prefix."""
        return None

    def parts(self, data: GroupData, *, resume: bool) -> list[GroupData]:
        """Groups that are trained in place of a group: those that continue from checkpoints, and waves of the rest.

        Args:
            data: Group with its rows.
            resume: Whether the run continues earlier ones. Otherwise the result is the waves of the group.
        """
        names = [j.name for j in data.group.jobs]
        found: list[tuple[list[str], Path]] = []
        if resume:
            done = self._done(data)
            for run in run_folders(self.root):
                for own, folder in self._continued(run, data, names, done):
                    found.append((own, folder))
                    names = [n for n in names if n not in own]
            self.unchanged |= {n: done[n] for n in names if n in done}
            names = [n for n in names if n not in done]
            continued = sum(len(own) for own, _ in found)
            logger.info(
                "resume: %d prefixes are in the store with the same rows and options, %d continue from a checkpoint, "
                "%d start at the first step",
                len(data.group.jobs) - continued - len(names),
                continued,
                len(names),
            )
        for _, checkpoint in found:
            self._earlier[self._num_parts] = checkpoint
            self._num_parts += 1
        new = super().parts(data.only(names), resume=resume) if names else []
        self._num_parts += len(new)
        return [*(data.only(own) for own, _ in found), *new]

    def _continued(
        self, run: Path, data: GroupData, names: Sequence[str], done: Collection[str]
    ) -> list[tuple[list[str], Path]]:
        """Names that continue from each checkpoint of a run, whose folder then stays locked."""
        found: list[tuple[list[str], Path]] = []
        with contextlib.ExitStack() as lock:
            if lock.enter_context(ended_run(run, shared=True)):
                for folder in checkpoint_folders(run):
                    taken = {n for own, _ in found for n in own}
                    if usable := _usable(folder, data, {*names} - taken, done):
                        found.append((usable, folder))
            if found:
                self._locks.enter_context(lock.pop_all())
        return found

    def read_checkpoint(self, number: int, identity: Mapping[str, Any]) -> Checkpoint | None:
        """Take over the checkpoint of an earlier run, with the lines of its log."""
        folder, own = self._earlier.get(number), self.checkpoint_folder(number)
        if folder is None or own is None:
            return None
        with one_at_a_time(self.root):
            return self._take_over(folder, own, number, identity)

    def _take_over(self, folder: Path, own: Path, number: int, identity: Mapping[str, Any]) -> Checkpoint | None:
        """Move the prefixes of a group from an earlier checkpoint to its own; None if another process has done so."""
        found, run, names = Checkpoint.read(folder), folder.parent.parent, list(identity["data"])
        if found is None or not {*names} <= {*found.state["names"]}:
            return None
        group: dict[str, JSON] = {"group": number} if number else {}
        earlier = int(folder.name)
        for line in list(read_lines(run / LOG))[: found.state["log_lines"]]:
            if line.get("group", 0) == earlier:
                self.log.append({**line, **group})
        self._replace_log(self.log)
        taken = found.only(names, identity, len(self.log))
        taken.write(own)
        drop_from_checkpoints(run, names)
        return taken

    def read_finished(self, name: str, digest: str) -> StoredPrefix:
        """Find the version of a prefix that an earlier run has put into the store; the newest if it is gone."""
        versions = self.kept.versions(name)
        return next((v for v in reversed(versions) if v.digest == digest), versions[-1])

    def end(self, finished: Sequence[str]) -> None:
        """Remove the checkpoints of the run, and what earlier runs have left of its prefixes."""
        if self._run is not None:
            self._locks.close()
            end_run(self.root, self._run, finished)

    def close(self) -> None:
        """Let other processes continue the run."""
        self._locks.close()
        if self._run is not None:
            self._run.release()

    def _done(self, data: GroupData) -> dict[str, EarlierPrefix]:
        """Prefixes of a group that the store holds with the same rows and options."""
        done = {}
        for name, identity in data.identities.items():
            with contextlib.suppress(DataError, UnknownPrefixError):  # a damaged version is trained again
                stored = self.kept.info(name)
                prefix = stored.read()
                if prefix.training.get(IDENTITY) == identity:
                    done[name] = EarlierPrefix(stored, stored_metrics(prefix))
        return done


def _usable(folder: Path, data: GroupData, wanted: set[str], done: Collection[str]) -> list[str]:
    """Names of the prefixes that can continue from a checkpoint.

    They are all of its prefixes if the group has each of them with the same rows and options, so that the run ends like
    an uninterrupted one to the bit. Otherwise they are those that the store does not hold yet.
    """
    try:
        found = read_json(folder / STATE)
        state, theirs = found["state"], prefix_identities(found["identity"])
        if found["version"] != VERSION or state["step"] == 0:
            return []
        equal = [n for n in state["names"] if n in wanted and theirs[n] == data.identities[n]]
        are_saved = all(n in done for n in state["finished"])
    except (DataError, KeyError, TypeError, AttributeError) as e:
        logger.warning("resume: the checkpoint in %s cannot be used: %s", folder, e)
        return []
    if len(equal) == len(state["names"]) and are_saved:
        return [] if all(n in done for n in equal) else equal
    ended = {*state["finished"], *state["failed"], *done}
    return [n for n in equal if n not in ended]
