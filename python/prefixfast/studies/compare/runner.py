"""Carries out the runs of a comparison one after the other, each in a process of its own, and keeps their results."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixfast.errors import ConfigError, DataError, shown
from prefixfast.io.atomic import replace_file
from prefixfast.io.json_lines import json_line
from prefixfast.store.workspace import lock, unlock
from prefixfast.studies.compare.rows import StudyRows
from prefixfast.studies.compare.run import RESULT
from prefixfast.studies.compare.study import Study, StudyRun
from prefixfast.studies.compare.variants import Variant

KEYS = {"identity", "shared", "label", "seed", "metrics", "quality", "costs"}  # of each result
WAIT_SECONDS = 0.2  # between two attempts to lock the folder
STDERR = 2  # file descriptor
RESULTS, FAILED, RUNS = "results.jsonl", "failed.jsonl", "runs"  # in the output folder


def make_runs(study: Study, rows: StudyRows, variants: Sequence[Variant], seeds: Sequence[int]) -> list[StudyRun]:
    """Runs of a comparison, those of the first seed first.

    Args:
        study: Settings of the comparison.
        rows: Rows of the comparison.
        variants: Compared methods.
        seeds: Seeds of each method.
    """
    data = rows.digest()
    shared = study.identity(data)
    return [StudyRun(study, shared, data, variant, seed) for seed in seeds for variant in variants]


@dataclass(frozen=True)
class Runner:
    """Carries out runs and writes their results into a folder.

    Attributes:
        output: Output folder.
        report: Function that gets a line of text about each run.
        progress: Whether runs report their progress, None for `train`'s default.
    """

    output: Path
    report: Callable[[str], None]
    progress: bool | None = None

    def run(self, runs: Sequence[StudyRun]) -> dict[str, str]:
        """Carry out the runs that the results file does not hold.

        Args:
            runs: Runs.

        Returns:
            Error message of each failed run by its label.

        Raises:
            KeyboardInterrupt: If the user interrupts. The current run has then written its checkpoint.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        with self._locked() as held:
            return self._run(runs, held)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[tuple[int, ...]]:
        """Descriptors of the folder's lock, for which this call waits if another one works in the folder.

        The processes of the runs get them too, so that a run whose parent was killed keeps others from its files
        while it writes its checkpoint.
        """
        is_reported = False
        while True:
            try:
                fd = lock(self.output)
                break
            except BlockingIOError:
                if not is_reported:
                    self.report(f"waiting for another run in {self.output}")
                is_reported = True
                time.sleep(WAIT_SECONDS)
        try:
            yield () if fd is None else (fd,)
        finally:
            unlock(fd)

    def _run(self, runs: Sequence[StudyRun], held: tuple[int, ...]) -> dict[str, str]:
        failed: dict[str, str] = {}
        for number, run in enumerate(runs, 1):
            where = f"run {number} of {len(runs)}, {run.label}"
            lines = read_results(self.output)
            if any(line["identity"] == run.identity for line in lines):
                self.report(f"{where}: finished before")
                continue
            self.report(where)
            result = self._run_one(run, held)
            if "error" in result:
                error = result["error"]
                self.report(f"{where} failed" + (f": {error}" if error not in failed.values() else ", as before"))
                failed[run.label] = error
            else:
                replace_file(self.output / RESULTS, b"".join(map(json_line, [*lines, result])))
            failed_lines = (json_line({"run": name, "error": text}) for name, text in failed.items())
            replace_file(self.output / FAILED, b"".join(failed_lines))
        if not failed:
            (self.output / FAILED).unlink(missing_ok=True)
        return failed

    def _run_one(self, run: StudyRun, held: tuple[int, ...]) -> dict[str, Any]:
        """Result of one run, or its error."""
        folder = self.output / RUNS / run.folder_name
        code = self._wait_for(run, folder, held)
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        path = folder / RESULT
        if code or not path.exists():
            why = f"was ended by signal {-code}, which the system also sends when memory runs out" if code < 0 else ""
            return {"error": f"its process {why or f'ended with status {code}'}"}
        result: dict[str, Any] = json.loads(path.read_bytes())
        return result

    def _wait_for(self, run: StudyRun, folder: Path, held: tuple[int, ...]) -> int:
        """Exit status of the process of a run."""
        command = [sys.executable, "-m", "prefixfast.studies.compare.run"]
        settings = {"run": run.to_json(), "folder": str(folder), "progress": self.progress}
        # A session of its own, so that Ctrl-C reaches the process once, by the end of its standard input.
        how: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": STDERR, "start_new_session": True, "pass_fds": held}
        with subprocess.Popen(command, **how) as process:
            assert process.stdin is not None
            try:
                process.stdin.write(json_line(settings))
                process.stdin.flush()
                return process.wait()
            except BrokenPipeError:  # it ended before it read
                return process.wait()
            finally:
                process.stdin.close()
                process.wait()


def read_results(output: Path) -> list[dict[str, Any]]:
    """Lines of the results file of a folder, none if there is no such file.

    Args:
        output: Output folder.

    Raises:
        ConfigError: If the folder is a file.
        DataError: If a line is no result of a run.
    """
    path = output / RESULTS
    if output.exists() and not output.is_dir():
        msg = f"-o: expected a folder or a path that does not exist, got the file {shown(str(output))}"
        raise ConfigError(msg)
    return list(_lines(path)) if path.exists() else []


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not set(found) >= KEYS:
            msg = f"{path}:{number}: expected a result of `prefixfast compare`; name another folder with -o"
            raise DataError(msg, path=str(path), line=number)
        yield found
