"""A company's files of many users become one store: train, generate by name, add a user, delete a user.

``python examples/many_users.py`` makes seven small files, one of them wrong, in ``many-users/users``, and a
store in ``many-users/store``.
"""

from __future__ import annotations

import json
from pathlib import Path

import prefixfast
from prefixfast.demo import BASE

FOLDER = Path("many-users")
CLOSINGS = {
    "ann": "With love, Ann",
    "bob": "See you on Friday, Bob",
    "eva": "Best wishes, Eva",
    "jon": "Thank you, Jon",
    "lena": "Good night, Lena",
    "tom": "Until tomorrow, Tom",
}
OPTIONS = {"prefix_length": 8, "max_steps": 80, "learning_rate": 0.1}


def write_user(name: str, rows: list[dict[str, str]]) -> None:
    """Write one user's rows to a file of the user's name."""
    path = FOLDER / "users" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")


def main() -> None:
    """Train all users at once, generate one mixed batch by name, and delete one of them."""
    for name, text in CLOSINGS.items():
        write_user(name, [{"prompt": "Close the letter.", "completion": text}])
    write_user("zoe", [{"prompt": "Close the letter."}])  # a row without a completion

    with prefixfast.load(BASE, dtype="float32") as base:
        # 1. One prefix for each file. A user whose file is wrong does not stop the others.
        store = prefixfast.PrefixStore(FOLDER / "store")
        users = prefixfast.Folder(FOLDER / "users")
        run = prefixfast.train(base, users, store=store, progress=False, **OPTIONS)  # type: ignore[arg-type]
        print(f"trained: {', '.join(run)}")
        print(f"failed: {', '.join(run.failed)}")

        # 2. Requests name their user. All of them are one batch.
        requests = [{"prompt": "Close the letter.", "prefix": name, "id": name} for name in ("eva", "bob", "ann")]
        for result in prefixfast.generate(requests, model=base, store=store, max_new_tokens=12, progress=False):
            print(f"{result.id}: {result.text}")

    # 3. A deleted user is gone, all versions. The digest on the receipt finds out later that nothing is left.
    receipt = store.delete("bob")
    check = store.verify(absent=receipt.digests[-1])
    print(f"deleted: bob, {receipt.files} files; files that hold it still: {len(check.holding)}")
    print(f"left: {', '.join(sorted(store))}")


if __name__ == "__main__":
    main()
