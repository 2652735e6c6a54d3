"""`PrefixStore` in several processes at once: no waits, no missing versions, no mixed-up prefixes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from forked import end, start
from prefixfast import Prefix, PrefixStore
from prefixfast.errors import DataError, UnknownPrefixError
from prefixfast.io.atomic import identity
from prefixfast.store import store as module
from prefixfast.store.workspace import atomic_removal, sweep, workspace

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def make(seed: int, length: int = 3) -> Prefix:
    g = torch.Generator().manual_seed(seed)
    return Prefix({f"self.0.{x}": torch.randn(length, 2, 4, generator=g) for x in "kv"}, pos_start=length)


def clean(root: Path) -> bool:
    return PrefixStore(root, read_only=True).verify().ok and list((root / module.WORK).iterdir()) == []


def until(condition, seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_processes_that_put_one_name_lose_no_version(tmp_path):
    def writer(i: int) -> None:
        store = PrefixStore(tmp_path, keep_versions=100)
        for k in range(6):
            store.put("a", make(10 * i + k))

    children = [start(lambda i=i: writer(i)) for i in range(3)]
    assert [end(pid) for pid in children] == [0, 0, 0]
    versions = PrefixStore(tmp_path).versions("a")
    assert [v.version for v in versions] == list(range(1, 19))
    assert {v.read().digest for v in versions} == {make(10 * i + k).digest for i in range(3) for k in range(6)}
    assert clean(tmp_path)


def test_putting_and_deleting_one_name(tmp_path):
    def writer(i: int) -> None:
        store = PrefixStore(tmp_path)
        for k in range(25):
            assert store.put("a", make(100 * i + k)).name == "a"

    def remover() -> None:
        store, removed = PrefixStore(tmp_path), 0
        while removed < 15:
            with contextlib.suppress(UnknownPrefixError):
                receipt = store.delete("a")
                assert receipt.files
                removed += 1
        store.put("done", make(0))

    children = [start(remover), start(lambda: writer(1)), start(lambda: writer(2))]
    for pid in children[1:]:
        assert end(pid) == 0
    store = PrefixStore(tmp_path)
    while "done" not in store:  # the remover may want more than the writers made
        store.put("a", make(5))
    assert end(children[0]) == 0
    assert clean(tmp_path)


def test_readers_always_read_a_complete_version(tmp_path):
    """The hardest case: a writer that keeps one version only puts while readers read."""
    root, prefixes = tmp_path / "s", [make(i) for i in range(40)]
    PrefixStore(root).put("a", prefixes[0])

    def writer() -> None:
        store = PrefixStore(root, keep_versions=1)
        for i in range(5000):
            store.put("a", prefixes[i % 40])
            if i > 40 and len(list(tmp_path.glob("*.seen"))) == 2:
                break
        store.put("done", prefixes[0])

    def reader() -> None:
        store, seen = PrefixStore(root, read_only=True), set()
        while "done" not in store:
            seen.add(store["a"].digest)
            assert store.info("a").name == "a"
            assert set(store) <= {"a", "done"}
            if len(seen) > 8:
                (tmp_path / f"{os.getpid()}.seen").touch()
        assert seen <= {p.digest for p in prefixes}
        assert len(seen) > 8, "the reader ran beside the writer"

    children = [start(reader), start(writer), start(reader)]
    assert [end(pid) for pid in children] == [0, 0, 0]
    assert clean(root)


def test_readers_during_rollbacks_read_one_of_two_versions(tmp_path):
    store = PrefixStore(tmp_path / "s")
    store.put("a", make(1))
    store.put("a", make(2))

    def switch() -> None:
        writer = PrefixStore(tmp_path / "s")
        for i in range(5000):
            writer.rollback("a")
            writer.rollback("a")
            if i > 10 and (tmp_path / "seen").exists():
                break
        writer.put("done", make(1))

    child = start(switch)
    seen: set[str] = set()
    while "done" not in store:
        seen.add(store["a"].digest)
        if len(seen) > 1:
            (tmp_path / "seen").touch()
    assert end(child) == 0
    assert seen == {make(1).digest, make(2).digest}
    assert store["a"].digest == make(2).digest, "an even number of them"
    assert clean(tmp_path / "s")


def test_a_deleted_and_put_name_never_serves_the_old_prefix(tmp_path):
    """Version numbers start again at 1 after a deletion, so one path can hold different prefixes over time."""
    store = PrefixStore(tmp_path / "s")
    long, short = make(1, 5), make(2, 3)
    before = store.put("a", long)

    def switch() -> None:
        writer = PrefixStore(tmp_path / "s")
        for i in range(5000):
            writer.delete("a")
            writer.put("a", long if i % 2 else short)
            if i > 30 and (tmp_path / "seen").exists():
                break
        writer.put("done", short)

    child, met = start(switch), {"read": 0, "absent": 0}
    while "done" not in store:
        try:
            info = store.info("a")
            assert (info.digest, info.length) in {(long.digest, 5), (short.digest, 3)}
            assert store["a"].digest in {long.digest, short.digest}
            with contextlib.suppress(DataError):  # the entry is out of date, which is an error
                assert info.read().digest == info.digest
            met["read"] += 1
        except UnknownPrefixError:
            met["absent"] += 1
        if min(met.values()) > 3:
            (tmp_path / "seen").touch()
    assert end(child) == 0
    assert min(met.values()) > 3
    store.delete("a")
    store.put("a", short)
    with pytest.raises(DataError, match="differ in"):
        before.read()


def test_a_reader_can_finish_on_its_version_after_a_rollback(tmp_path):
    store = PrefixStore(tmp_path)
    started = store.put("a", make(1))
    store.put("a", make(2))
    store.rollback("a")
    assert not started.folder.exists()
    assert started.read().digest == make(1).digest, "found by its digest"
    store.put("a", make(3))
    store.put("a", make(4))
    with pytest.raises(DataError, match="no such folder"):
        started.read()


@pytest.mark.parametrize(
    ("before", "between", "versions"),
    [
        (2, "put", [2, 3, 4]),
        (2, "delete", [1]),
        (2, "delete and put", [1, 3]),
        (0, "put", [1, 2]),
        (0, "put and delete", [1]),
    ],
)
def test_another_writer_between_choosing_a_number_and_the_rename(tmp_path, monkeypatch, before, between, versions):
    store, other = (PrefixStore(tmp_path, keep_versions=3) for _ in range(2))
    for i in range(before):
        store.put("a", make(i))
    real, turns = Path.rename, []

    def rename(source: Path, target: Path) -> Path:
        if Path(target).name.isdecimal() and len(Path(target).name) == 6 and not turns:
            turns.append(target)
            for step in between.split(" and "):
                {"delete": lambda: other.delete("a"), "put": lambda: other.put("a", make(8))}[step]()
        return real(source, target)

    monkeypatch.setattr(Path, "rename", rename)
    put = store.put("a", make(9))
    assert turns
    assert [v.version for v in store.versions("a")] == versions
    assert put.version == versions[-1]
    assert store["a"].digest == make(9).digest
    assert clean(tmp_path)


def test_a_version_removed_during_listing_is_left_out(tmp_path, monkeypatch):
    store = PrefixStore(tmp_path)
    for i in range(2):
        store.put("a", make(i))
    real, turns = module.read_entry, []

    def read(folder: Path):
        if not turns:
            turns.append(store.put("a", make(2)))
        return real(folder)

    monkeypatch.setattr(module, "read_entry", read)
    assert [v.version for v in store.versions("a")] == [2]
    assert turns[0].version == 3
    assert [v.version for v in store.versions("a")] == [2, 3]


# ---- work in progress ----


def test_sweep_removes_the_work_of_killed_writers_only(tmp_path):
    root = tmp_path / "work"

    def hold(name: str) -> None:
        with workspace(root) as folder:
            (folder / name).write_text("half")
            (tmp_path / f"{name}.ready").touch()
            time.sleep(60)

    pids = {name: start(lambda name=name: hold(name)) for name in ("runs", "killed")}
    until(lambda: all((tmp_path / f"{name}.ready").exists() for name in pids))
    assert sweep(root) == 0
    os.kill(pids["killed"], signal.SIGKILL)
    end(pids["killed"])
    assert sweep(root) == 1
    assert [p.name for p in root.glob("*/*")] == ["runs"]
    os.kill(pids["runs"], signal.SIGKILL)
    end(pids["runs"])
    assert sweep(root) == 1
    assert list(root.iterdir()) == []


def test_sweep_leaves_a_removal_of_a_running_process_alone(tmp_path):
    root, name = tmp_path / "work", tmp_path / "name"
    name.mkdir()
    (name / "file").write_text("x")

    def remove() -> None:
        with atomic_removal(name, root):
            (tmp_path / "ready").touch()
            until(lambda: (tmp_path / "go").exists())

    pid = start(remove)
    until(lambda: (tmp_path / "ready").exists())
    assert not name.exists()
    assert sweep(root) == 0
    assert [p.name for p in root.glob("*/*")] == ["file"]
    (tmp_path / "go").touch()
    assert end(pid) == 0
    assert list(root.iterdir()) == []


def test_a_recreated_folder_has_another_identity(tmp_path):
    """File systems can give a new folder the inode number of a removed one."""
    folder, numbers = tmp_path / "000001", set()
    for _ in range(5):
        folder.mkdir()
        before = identity(folder)
        numbers.add(folder.stat().st_ino)
        time.sleep(0.02)
        folder.rmdir()
        assert identity(folder) is None
        folder.mkdir()
        assert identity(folder) not in (before, None)
        folder.rmdir()
    if len(numbers) == 5:
        pytest.skip("this file system does not reuse inode numbers")


@pytest.mark.parametrize("change", ["put", "delete", "open"])
def test_every_writing_operation_sweeps(tmp_path, change):
    store = PrefixStore(tmp_path)
    store.put("a", make(1))

    def die() -> None:
        with workspace(tmp_path / module.WORK) as folder:
            (folder / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    end(start(die))
    assert len(list((tmp_path / module.WORK).iterdir())) == 1
    PrefixStore(tmp_path, read_only=True)
    assert len(list((tmp_path / module.WORK).iterdir())) == 1, "a reader removes nothing"
    {
        "put": lambda: store.put("b", make(2)),
        "delete": lambda: store.delete("a"),
        "open": lambda: PrefixStore(tmp_path),
    }[change]()
    assert list((tmp_path / module.WORK).iterdir()) == []


def test_a_slow_put_survives_other_writers(tmp_path):
    """A writer stops in the middle, others open, put and delete, then the writer goes on."""

    def slow() -> None:
        store, real = PrefixStore(tmp_path), module.write_file

        def wait(path: Path, data: bytes) -> None:
            (tmp_path / "stopped").touch()
            until(lambda: (tmp_path / "go").exists())
            real(path, data)

        module.write_file = wait
        store.put("a", make(1))

    child = start(slow)
    until(lambda: (tmp_path / "stopped").exists())
    other = PrefixStore(tmp_path)
    other.put("a", make(2))
    other.put("b", make(3))
    other.delete("a")
    assert "a" not in other
    (tmp_path / "go").touch()
    assert end(child) == 0
    assert other["a"].digest == make(1).digest, "the slow put ended after the deletion"
    assert clean(tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "0" * 16, "0123456789abcdef.txt", "0123456789ABCDEF"])
def test_files_of_others_are_never_swept(tmp_path, name):
    root = tmp_path / module.WORK
    root.mkdir()
    (root / name).write_text("a user's")
    PrefixStore(tmp_path).put("a", make(1))
    assert (root / name).read_text() == "a user's"


def test_without_locks_sweep_goes_by_age(tmp_path, monkeypatch):
    """Some network file systems have no locks."""
    monkeypatch.setattr("prefixfast.store.workspace.lock", lambda folder: None)
    long_ago = (time.time() - 3600,) * 2
    with workspace(tmp_path) as folder:
        assert sweep(tmp_path) == 0
        assert folder.exists()
        os.utime(folder, long_ago)
        assert sweep(tmp_path) == 1
        assert not folder.exists()
    (tmp_path / "old").mkdir()
    os.utime(tmp_path / "old", long_ago)
    with atomic_removal(tmp_path / "old", tmp_path) as folder:
        assert sweep(tmp_path) == 0
        assert folder.exists()
    assert list(tmp_path.iterdir()) == []
