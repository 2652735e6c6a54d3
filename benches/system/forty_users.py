"""Forty users' files, two of them broken: one command, and one run for each file.

Run ``python benches/system/forty_users.py -o forty-users.jsonl``. The base is the one in the package and the rows are
made up, unless ``--base`` and ``--e2e`` name others. The runs alternate, and the single commands are split in two
halves between them, so that a slow minute of the machine hits all of them. ``--singles 10`` runs ten of the forty
single commands. CPU seconds count the threads of a process and depend less on other work of the machine than wall
seconds do.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from prefixfast.bench.e2e_rows import read_split
from prefixfast.bench.harness import write_rows
from prefixfast.demo import BASE
from prefixfast.demo.corpus import draw_scene

USERS, ROWS = 40, 5
BROKEN = {"user38": 'mr,ref\n"name[The Mill], food[soup]\n', "user39": ""}
OPTIONS = {"prefix_length": 10, "dtype": "float32"}


@dataclass
class Cost:
    """Cost of processes: wall and CPU seconds, and peak memory in MiB of the largest of them."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mib: float = 0.0

    def add(self, command: list[str], expected: int) -> None:
        """Run a command and add its cost; its exit status must be the expected one."""
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        error = process.stderr.read().decode(errors="replace")
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != expected:
            raise RuntimeError(f"{command}: exit status {process.returncode}\n{error}")
        self.seconds += time.perf_counter() - start
        self.cpu_seconds += used.ru_utime + used.ru_stime
        self.peak_mib = max(self.peak_mib, used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def write_users(folder: Path, e2e: Path | None) -> None:
    """Write the users' files: disjoint rows of E2E, or made-up rows."""
    rows = iter(read_split(e2e, "train")) if e2e else made_up()
    for i in range(USERS):
        name = f"user{i:02d}"
        if name in BROKEN:
            (folder / f"{name}.csv").write_text(BROKEN[name])
            continue
        own = list(itertools.islice(rows, ROWS))
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf8") as f:
            writer = csv.DictWriter(f, own[0], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(own)


def made_up() -> Iterator[dict[str, str]]:
    """Rows of the demo: what is known about an eatery, and its name."""
    rng = Random(0)
    while True:
        scene = draw_scene(rng, "eatery", "train")
        yield {"prompt": f"{scene['cook']} cooks in {scene['town']} at", "completion": f" {scene['name']}."}


def size(folder: Path) -> tuple[int, int]:
    """Number of files and bytes in a folder."""
    files = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    return len(files), sum(files)


def flags() -> list[str]:
    return [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def run_in_python(how: str, base: str, users: Path, store: Path) -> None:
    """Train in this process: all files in one call, or one call for each file with the base loaded once."""
    import prefixfast

    model = prefixfast.load(base, dtype=OPTIONS["dtype"])
    options = {name: value for name, value in OPTIONS.items() if name != "dtype"}
    files = prefixfast.Folder(users)
    if how == "one":
        prefixfast.train(model, files, store=store, progress=False, **options)
        return
    for name, file in files.items():
        try:
            prefixfast.train(model, {name: file}, store=store, progress=False, **options)
        except prefixfast.DataError:
            assert name in BROKEN


def measure(base: str, users: Path, work: Path, singles: int) -> Iterator[list[dict[str, object]]]:
    """Measure all ways in turn, twice; yields the rows of the results so far after each measurement.

    Of the single commands the first ``singles`` are run, half of them in each turn.
    """
    cli, me = [sys.executable, "-m", "prefixfast", "train", base], [sys.executable, __file__, "--base", base]
    files, rows = sorted(users.iterdir()), dict[str, dict[str, object]]()
    for turn in range(2):
        half = files[turn * singles // 2 : (turn + 1) * singles // 2]
        for name in ("one command", "single commands", "one call", "40 calls"):
            cost, store = Cost(), work / f"{name} {turn}"
            if name == "one command":
                cost.add([*cli, str(users), "--store", str(store), *flags()], 3)
            elif name == "single commands":
                for file in half:
                    single = [*cli, str(file), "--store", str(store), *flags()]
                    cost.add(single, 1 if file.stem in BROKEN else 0)
            else:
                how = "one" if name == "one call" else "each"
                cost.add([*me, "--run", how, "--users", str(users), "--store", str(store)], 0)
            count, total = size(store)
            runs = len(half) if name == "single commands" else 1
            rows[store.name] = {"what": name, "turn": turn, "runs": runs, "files": count, "bytes": total} | asdict(cost)
            yield list(rows.values())


def main() -> None:
    """Parse the arguments, measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--base", default=str(BASE))
    parser.add_argument("--e2e", type=Path)
    parser.add_argument("--singles", type=int, default=USERS, help="single commands to run, at most 40")
    parser.add_argument("--run", choices=("one", "each"), help=argparse.SUPPRESS)
    parser.add_argument("--users", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run_in_python(given.run, given.base, given.users, given.store)
        return
    with tempfile.TemporaryDirectory() as folder:
        users, work = Path(folder, "users"), Path(folder, "work")
        users.mkdir()
        work.mkdir()
        write_users(users, given.e2e)
        about = {"base": Path(given.base).name, "users": USERS, "broken": len(BROKEN), "rows": ROWS, **OPTIONS}
        for rows in measure(given.base, users, work, given.singles):
            print(json.dumps(rows[-1]), flush=True)
            if given.output:
                write_rows(given.output, [{"settings": about}, *rows])


if __name__ == "__main__":
    main()
