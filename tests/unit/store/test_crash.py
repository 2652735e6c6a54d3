"""`PrefixStore` whose writer is killed or meets a full disk: the old or the new version is there, and nothing else."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forked import end, killed_at, start
from prefixfast import Prefix, PrefixStore
from prefixfast.store.store import WORK

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def make(seed: int, *, pos_start: int = 3) -> Prefix:
    g = torch.Generator().manual_seed(seed)
    return Prefix(
        {f"self.{i}.{x}": torch.randn(3, 2, 4, generator=g) for i in range(2) for x in "kv"}, pos_start=pos_start
    )


OLD, MIDDLE, NEW = make(1), make(2), make(3, pos_start=0)  # NEW is not a PEFT adapter, so it has other files
Operation = Callable[[PrefixStore], object]


def put(store: PrefixStore) -> object:
    return store.put("a", NEW)


# Versions in the store, operation, and digests that a reader may find afterwards.
CASES: dict[str, tuple[list[Prefix], Operation, set[str | None]]] = {
    "put the first": ([], put, {None, NEW.digest}),
    "put the next": ([OLD], put, {OLD.digest, NEW.digest}),
    "put and drop the oldest": ([OLD, MIDDLE], put, {MIDDLE.digest, NEW.digest}),
    "roll back": ([OLD, MIDDLE], lambda s: s.rollback("a"), {MIDDLE.digest, OLD.digest}),
    "delete": ([OLD, MIDDLE], lambda s: s.delete("a"), {MIDDLE.digest, None}),
}


def files(root: Path) -> list[Path]:
    return [p.relative_to(root) for p in root.rglob("*") if not p.is_dir()]


def stray(root: Path) -> list[Path]:
    """Files that are not part of a version."""
    return [p for p in files(root) if not (len(p.parts) == 4 and len(p.parts[1]) == 64 and p.parts[2].isdecimal())]


def found(root: Path) -> str | None:
    """Check the whole store; returns the digest of the name ``a``, None if there is no such name."""
    store = PrefixStore(root)
    check = store.verify()
    assert check.ok, check
    assert stray(root) == []
    assert list((root / WORK).iterdir()) == []
    assert all(list(p.iterdir()) for p in root.glob("??/*")), "every name has a version"
    assert len(store) == len(list(store))
    assert check.versions == len(list(root.glob("*/*/*/entry.json"))) == len(list(root.glob("??/*/*")))
    assert list(store) == (["b", "a"] if "a" in store else ["b"]), "another name is not touched"
    got = store.get("a")
    return None if got is None else got.digest


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Operation, set[str | None], str]:
    prefixes, operation, allowed = CASES[request.param]
    store = PrefixStore(tmp_path / "before")
    store.put("b", OLD)
    for prefix in prefixes:
        store.put("a", prefix)
    return tmp_path / "before", operation, allowed, request.param


@pytest.mark.parametrize("stride", [3, pytest.param(1, marks=pytest.mark.long)])
def test_killed_at_the_steps_of_a_change(case, tmp_path, stride):
    """All five operations together have 172 steps; by default the process is killed at every third of them."""
    before, operation, allowed, _ = case
    met: dict[str | None, int] = dict.fromkeys(allowed, 0)
    step = left = 0
    while True:
        root = tmp_path / "store"
        shutil.copytree(before, root)
        killed = killed_at(step, lambda root=root: operation(PrefixStore(root)))
        left += bool(list((root / WORK).iterdir()))
        met[found(root)] += 1
        shutil.rmtree(root)
        if not killed:
            break
        step += stride
    assert step > 25
    assert all(met.values()), "kills fell before and after the change"
    assert left > 5 / stride, "kills fell into the work"


def test_killed_while_sweeping_the_files_of_a_killed_writer(tmp_path):
    root = tmp_path / "before"
    PrefixStore(root).put("b", OLD)
    assert killed_at(12, lambda: put(PrefixStore(root)))
    assert stray(root)
    step, killed = 0, True
    while killed:
        store = shutil.copytree(root, tmp_path / f"store{step}")
        killed = killed_at(step, lambda store=store: PrefixStore(store))
        assert found(store) is None
        step += 2
    assert step > 5


def test_killed_in_the_middle_of_a_write(case, tmp_path):
    """A limit on file sizes kills the writer after that many bytes."""
    before, operation, allowed, what = case
    if what == "delete":
        pytest.skip("a deletion writes nothing")
    sizes = sorted({0, 1, 50, *(p.stat().st_size - 1 for p in before.rglob("*.safetensors"))})
    for size in sizes:
        root = tmp_path / f"store{size}"
        shutil.copytree(before, root)

        def torn(root: Path = root, size: int = size) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            operation(PrefixStore(root))

        assert end(start(torn)) & 0x7F == signal.SIGXFSZ
        assert found(root) in allowed


@pytest.mark.parametrize("count", [10, pytest.param(200, marks=pytest.mark.long)])
def test_killed_at_random_times(tmp_path, count):
    rng = random.Random(7)
    root = tmp_path / "store"
    PrefixStore(root).put("b", OLD)

    def forever() -> None:
        store, names = PrefixStore(root), ("a", "c")
        for i in range(10**6):
            store.put(names[i % 2], make(i))
            if i % 5 == 4:
                store.delete("c")

    for _ in range(count):
        pid = start(forever)
        time.sleep(rng.uniform(0.002, 0.06))
        os.kill(pid, signal.SIGKILL)
        assert end(pid) == signal.SIGKILL
        store = PrefixStore(root)
        assert store.verify().ok
        assert stray(root) == []


# ---- a full disk ----


def full_at(step: int, event_names: tuple[str, ...]) -> Callable[[str, tuple], None]:
    """An audit hook that refuses to create files from one step on; removals still work."""
    seen = 0

    def refuse(event: str, arguments: tuple) -> None:
        nonlocal seen
        makes = event in event_names or (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        )
        seen += bool(makes)
        if makes and seen > step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return refuse


@pytest.mark.parametrize("events", [(), ("os.mkdir", "os.rename")], ids=["files", "folders"])
def test_a_full_disk_keeps_the_last_good_version(case, tmp_path, events):
    before, operation, _, what = case
    if what == "delete" and events:
        pytest.skip("a deletion creates no folder, but calls mkdir for one that exists")
    last = PrefixStore(before, read_only=True).get("a")
    for step in range(100):
        root = tmp_path / f"store{step}"
        shutil.copytree(before, root)

        def full(root: Path = root, step: int = step) -> None:
            store = PrefixStore(root)
            sys.addaudithook(full_at(step, events))
            try:
                operation(store)
            except OSError as e:
                assert e.errno == errno.ENOSPC, e  # noqa: PT017 - in a child
                os._exit(7)

        status = end(start(full))
        assert status in (0, 7 << 8)
        assert stray(root) == [], "no half-written file is left, even before the next open"
        assert list((root / WORK).iterdir()) == []
        got = found(root)
        if status == 0:
            break
        assert got == (None if last is None else last.digest), step
    assert step == 0 if what == "delete" else 2 <= step < 60, "a deletion creates no file, so it works on a full disk"


def test_a_limit_on_file_sizes_is_an_error_that_changes_nothing(tmp_path):
    root = tmp_path / "store"
    store = PrefixStore(root)
    store.put("a", OLD)
    before = {p: (root / p).read_bytes() for p in files(root)}
    sizes = sorted(len(data) for data in before.values())

    def limited(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            store.put("a", NEW)
        except OSError as e:
            assert e.errno == errno.EFBIG  # noqa: PT017 - in a child
            os._exit(7)

    for size in (0, 1, 100, sizes[0], sizes[-1] - 100):
        assert end(start(lambda size=size: limited(size))) == 7 << 8
        assert {p: (root / p).read_bytes() for p in files(root)} == before


@pytest.mark.parametrize("case", ["put and drop the oldest", "roll back"], indirect=True)
def test_a_sync_that_fails_leaves_a_whole_store(case, monkeypatch, tmp_path):
    before, operation, allowed, _ = case
    real = os.fsync
    for step in range(100):
        root = tmp_path / f"store{step}"
        shutil.copytree(before, root)
        calls = iter(range(1000))

        def fsync(fd: int, calls=calls, step: int = step) -> None:
            if next(calls) == step:
                raise OSError(errno.EIO, "Input/output error")
            real(fd)

        store = PrefixStore(root)
        with monkeypatch.context() as m:
            m.setattr(os, "fsync", fsync)
            try:
                operation(store)
            except OSError:
                whole = False
            else:
                whole = True
        assert stray(root) == []
        assert found(root) in allowed
        if whole:
            break
    assert 5 < step < 60


@pytest.mark.parametrize("name", ["a", "new"])
def test_everything_is_synced_before_it_is_renamed_into_place(tmp_path, monkeypatch, name):
    """After a power cut, a name never leads to data that is not on the disk."""
    store = PrefixStore(tmp_path)
    store.put("a", OLD)
    synced: set[str] = set()
    real_sync, real_rename = os.fsync, os.rename

    def fsync(fd: int) -> None:
        real_sync(fd)
        synced.add(str(Path(f"/proc/self/fd/{fd}").readlink().name))

    unsynced = {}

    def rename(self: Path, target: Path) -> Path:
        if Path(target).name.isdecimal():
            unsynced.update({p.name: p.name in synced for p in (self, *self.iterdir())})
            synced.clear()
        if len(Path(target).name) == 64:
            unsynced["the name"] = self.name in synced
            synced.clear()
        real_rename(self, target)
        return Path(target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    put = store.put(name, NEW)
    assert len(unsynced) > 3
    assert ("the name" in unsynced) == (name == "new")
    assert [n for n, good in unsynced.items() if not good] == []
    assert put.folder.parent.name in synced, "the rename itself"
