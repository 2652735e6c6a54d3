"""Thousands of users' files, one of them broken: one command for all, and runs of single users.

Run ``python benches/system/many_users.py MODEL --e2e FOLDER -o many-users.jsonl``. Each user has 5 to 50 rows of E2E.
All users take the same number of steps, so that the time of a user can be compared between counts. A sample of the
users is also trained one after another, by a command each, and by a call each with the base loaded once.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random

from forty_users import Cost, size

from prefixfast.bench.e2e_rows import read_split
from prefixfast.bench.harness import write_rows

BROKEN = "user0013"
FEWEST_ROWS, MOST_ROWS = 5, 50
OPTIONS = {"prefix_length": 10, "batch_size": 5, "dtype": "float32", "learning_rate": 0.1}
COMMANDS, CALLS = 3, 20  # users that are trained one after another
Record = dict[str, object]


def write_users(folder: Path, e2e: Path, count: int) -> None:
    """Write a file of rows for each user; that of one user ends with a malformed row."""
    rows, rng = read_split(e2e, "train"), Random(0)
    for i in range(count):
        own = [
            json.dumps({key: row[key] for key in ("mr", "ref")})
            for row in rng.sample(rows, rng.randint(FEWEST_ROWS, MOST_ROWS))
        ]
        if f"user{i:04d}" == BROKEN:
            own.append(json.dumps({"mr": "name[The Mill], food[soup]", "ref": 5}))
        (folder / f"user{i:04d}.jsonl").write_text("\n".join(own) + "\n", encoding="utf8")


def flags(steps: int) -> list[str]:
    options = OPTIONS | {"max_steps": steps, "task": "e2e"}
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def one_command(base: str, users: Path, store: Path, steps: int) -> Record:
    """All users in one command. The store must have all of them but the broken one."""
    from prefixfast import PrefixStore

    cost = Cost()
    cost.add([sys.executable, "-m", "prefixfast", "train", base, str(users), "--store", str(store), *flags(steps)], 3)
    names = {file.stem for file in users.iterdir()}
    trained = set(PrefixStore(store))
    if names - trained != {BROKEN}:
        msg = f"expected prefixes of all users but {BROKEN}, missing are {sorted(names - trained)}"
        raise RuntimeError(msg)
    files, nbytes = size(store)
    return {"what": "one command", "users": len(names), "trained": len(trained), "files": files, "bytes": nbytes} | (
        asdict(cost)
    )


def single_commands(base: str, users: Path, store: Path, steps: int) -> Record:
    """The first users, each by a command of its own."""
    cost = Cost()
    for file in sorted(users.iterdir())[:COMMANDS]:
        cost.add(
            [sys.executable, "-m", "prefixfast", "train", base, str(file), "--store", str(store), *flags(steps)], 0
        )
    return {"what": "single commands", "users": COMMANDS} | asdict(cost)


def single_calls(base: str, users: Path, store: Path, steps: int) -> Record:
    """Users after the broken one, each by a call of its own in this process, with the base loaded once."""
    import prefixfast

    options = {name: value for name, value in OPTIONS.items() if name != "dtype"}
    with prefixfast.load(base, dtype=OPTIONS["dtype"]) as model:
        files = [file for file in sorted(users.iterdir()) if file.stem > BROKEN][: CALLS + 1]
        for file in files:
            prefixfast.train(
                model, {file.stem: file}, store=store, task="e2e", max_steps=steps, progress=False, **options
            )
            if file == files[0]:  # the first call warms up
                wall, cpu = time.perf_counter(), time.process_time()
        return {
            "what": "single calls",
            "users": len(files) - 1,
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }


def measure(given: argparse.Namespace) -> Iterator[Record]:
    """Records of each number of users in one command, and of single users."""
    with tempfile.TemporaryDirectory() as folder:
        for count in given.users:
            users = Path(folder, f"users-{count}")
            users.mkdir()
            write_users(users, given.e2e, count)
            yield one_command(given.model, users, Path(folder, f"store-{count}"), given.steps)
        for way in (single_commands, single_calls):
            yield way(given.model, users, Path(folder, way.__name__), given.steps)


def main() -> None:
    """Parse the arguments, measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the base")
    parser.add_argument("--e2e", type=Path, required=True, help="folder with e2e_train.jsonl.gz")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--users", type=int, nargs="+", default=[200, 1000, 2000], help="numbers of users")
    parser.add_argument("--steps", type=int, default=2, help="steps of each user")
    given = parser.parse_args()
    rows = {"rows": f"{FEWEST_ROWS} to {MOST_ROWS}", "broken": 1, "steps": given.steps}
    records: list[Record] = [{"settings": {"base": Path(given.model).name, **rows, **OPTIONS}}]
    for record in measure(given):
        print(json.dumps(record), flush=True)
        records.append(record)
        write_rows(given.output, records)


if __name__ == "__main__":
    main()
