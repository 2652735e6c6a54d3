"""What a run leaves on disk while it goes: prefixes as they finish, the log, what failed. Everything here may be cut at any moment."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prefixfast.io.atomic import recover_folder, replace_file
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import PrefixStore

LOG, FAILED, CHECKPOINT = "log.jsonl", "failed.jsonl", "checkpoint"


class Output:
    """The folder and the store of a run.

    Args:
        folder: Prefixes, log.jsonl, failed.jsonl and checkpoints go there; None: nothing is written.
        store: Where each prefix is put when it finishes, None: nowhere.
        single: The folder is the prefix's own; else it has one folder for each name.
    """

    def __init__(self, folder: Path | None, store: PrefixStore | None, *, single: bool) -> None:
        self.folder, self.store, self.single = folder, store, single
        self.log: list[dict[str, Any]] = []
        self._start = time.perf_counter()

    def open(self, *, resume: bool) -> None:
        """Make the folder; a new run removes what an earlier one left of log, failures and checkpoints, a resumed one reads its log."""
        if self.folder is None:
            return
        if resume:
            recover_folder(self.folder)
            resume = (self.folder / CHECKPOINT).exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        places = (
            (self.folder, ".*.tmp"),
            (self.folder / CHECKPOINT, ".*.tmp"),
            (self.folder.parent, f".{self.folder.name}.*.tmp"),
        )
        for left in (p for folder, pattern in places for p in folder.glob(pattern)):  # of a killed run
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        if not resume:
            shutil.rmtree(self.folder / CHECKPOINT, ignore_errors=True)
            (self.folder / FAILED).unlink(missing_ok=True)
        if not resume or not (self.folder / LOG).exists():
            replace_file(self.folder / LOG, b"")
        self.log = list(_lines(self.folder / LOG))

    def cut_log(self, lines: int | None, group: int) -> None:
        """Keep the first lines only, those that a checkpoint knows; None: those of earlier groups."""
        self.log = (
            self.log[:lines] if lines is not None else [line for line in self.log if line.get("group", group) < group]
        )
        if self.folder is not None:
            replace_file(self.folder / LOG, "".join(json.dumps(line) + "\n" for line in self.log).encode())

    def checkpoint(self, group: int) -> Path | None:
        """The folder of a group's checkpoint."""
        return None if self.folder is None else self.folder / CHECKPOINT / str(group)

    def record(self, **values: Any) -> dict[str, Any]:
        """Add a line to the log."""
        line = {"seconds": round(time.perf_counter() - self._start, 3), **values}
        self.log.append(line)
        if self.folder is not None:
            with (self.folder / LOG).open("a", encoding="utf8") as f:
                f.write(json.dumps(line) + "\n")
        return line

    def place(self, name: str) -> Path | None:
        """The folder of a prefix."""
        return None if self.folder is None else self.folder if self.single else self.folder / name

    def save(self, name: str, prefix: Prefix, *, again: bool) -> None:
        """A finished prefix: to its folder and into the store; ``again``: it may lie there already, since the run was cut after this."""
        if (place := self.place(name)) is not None:
            prefix.save_pretrained(place)
        if self.store is not None and not (
            again and name in self.store and self.store.info(name).digest == prefix.digest
        ):
            self.store.put(name, prefix)

    def write_failed(self, failed: Mapping[str, str]) -> None:
        """All failures so far."""
        if self.folder is not None and failed:
            lines = (json.dumps({"prefix": n, "error": text}, ensure_ascii=False) + "\n" for n, text in failed.items())
            replace_file(self.folder / FAILED, "".join(lines).encode())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log; the last one may have been cut while it was written."""
    with contextlib.suppress(json.JSONDecodeError):
        for line in path.read_text(encoding="utf8", errors="replace").splitlines():
            yield json.loads(line)
