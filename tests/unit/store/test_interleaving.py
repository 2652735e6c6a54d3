"""An operation of a store, with a change by another process at each of its steps: no timing is involved."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from forked import interrupted_at
from prefixfast import PrefixStore
from prefixfast.errors import ConfigError, UnknownPrefixError
from prefixfast.io import atomic
from prefixfast.store import workspace as locks
from prefixfast.store.import_export import export
from prefixfast.store.store import WORK
from stored import prefix

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
FIRST, SECOND, MINE, THEIRS = (prefix(i) for i in range(4))


def delete(store: PrefixStore) -> None:
    with contextlib.suppress(UnknownPrefixError):
        store.delete("a")


def put(store: PrefixStore) -> None:
    store.put("a", THEIRS)


# What another process does in between, and whether the name is certain to exist afterwards.
CHANGES: dict[str, tuple[Callable[[PrefixStore], object], bool]] = {
    "delete": (delete, False),
    "put": (put, True),
    "put three": (lambda s: [s.put("a", p) for p in (FIRST, SECOND, THEIRS)], True),
    "delete and put": (lambda s: (delete(s), put(s)), True),
    "put and delete": (lambda s: (put(s), delete(s)), False),
    "sweep": (lambda s: PrefixStore(s.path), True),
}


def put_mine(store: PrefixStore, _: bool) -> None:
    assert store.put("a", MINE).digest == MINE.digest


def delete_all(store: PrefixStore, stays: bool) -> None:
    with contextlib.suppress(UnknownPrefixError):
        receipt = store.delete("a")
        assert receipt.files == 4 * len(receipt.digests) > 0


def read(store: PrefixStore, stays: bool) -> None:
    got = store.get("a")
    assert got is not None or not stays


def read_by_entry(store: PrefixStore, stays: bool) -> None:
    with contextlib.suppress(UnknownPrefixError):
        assert store.info("a").name == "a"
        stays = False
    assert not stays


def list_versions(store: PrefixStore, stays: bool) -> None:
    with contextlib.suppress(UnknownPrefixError):
        assert store.versions("a")
        stays = False
    assert not stays


def roll_back(store: PrefixStore, stays: bool) -> None:
    with contextlib.suppress(UnknownPrefixError, ConfigError):  # there is one version only after a deletion
        store.rollback("a")


def list_all(store: PrefixStore, stays: bool) -> None:
    assert all(not hasattr(found, "why") for found in store.scan())
    assert set(store) <= {"a", "b"}


def verify(store: PrefixStore, stays: bool) -> None:
    check = store.verify(absent="0" * 64)
    assert check.ok, check


def export_all(store: PrefixStore, stays: bool) -> None:
    done = {one.name: one for one in store.export_dir(store.path.parent / "exported")}
    assert done["b"].ok
    assert "a" not in done or done["a"].ok or not stays


OPERATIONS = (put_mine, delete_all, read, read_by_entry, list_versions, roll_back, list_all, verify, export_all)


@pytest.mark.parametrize("stride", [23, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_change_in_the_middle_of_an_operation(tmp_path, operation, change, stride):
    other, stays = CHANGES[change]
    stays = stays and change != "delete and put"  # the name is absent for a moment
    before = PrefixStore(tmp_path / "before")
    for name, given in (("b", FIRST), ("a", FIRST), ("a", SECOND)):
        before.put(name, given)
    step = list(CHANGES).index(change)  # so that the cases meet different steps
    while True:
        root = shutil.copytree(before.path, tmp_path / "s" / "store").parent
        mine, theirs = PrefixStore(root / "store"), PrefixStore(root / "store")
        met = interrupted_at(step, lambda mine=mine: operation(mine, stays), lambda theirs=theirs: other(theirs))
        assert PrefixStore(mine.path).verify().ok
        assert list((mine.path / WORK).iterdir()) == []
        assert all(list(p.iterdir()) for p in mine.path.glob("??/*")), "every name has a version"
        if operation is not delete_all and CHANGES[change][1]:
            assert "a" in mine, step
        if operation is put_mine and "delete" not in change:
            assert MINE.digest in {v.digest for v in mine.versions("a")} or change == "put three"
        shutil.rmtree(root)
        if not met:
            break
        step += stride


# ---- single steps ----


def test_the_name_is_deleted_between_the_rename_and_the_sync(tmp_path, monkeypatch):
    store, other = PrefixStore(tmp_path), PrefixStore(tmp_path)
    store.put("a", FIRST)
    real, turns, receipts = os.open, [], []

    def opened(path, *arguments, **how):
        if len(Path(path).name) == 64 and not turns and (Path(path) / "000002").exists():
            turns.append(path)
            receipts.append(other.delete("a").digests)
        return real(path, *arguments, **how)

    monkeypatch.setattr(os, "open", opened)
    assert store.put("a", MINE).version == 2
    assert receipts == [(FIRST.digest, MINE.digest)]
    assert "a" not in store


def test_dropping_old_versions_never_drops_those_of_a_name_that_was_put_again(tmp_path, monkeypatch):
    """The numbers of a name start again after its deletion, so that a path can lead to a new version."""
    store, other = PrefixStore(tmp_path, keep_versions=1), PrefixStore(tmp_path)
    store.put("a", FIRST)
    real, turns = os.rename, []

    def rename(source, target, **how):
        if how and not turns:
            turns.append(source)
            other.delete("a")
            other.put("a", THEIRS)
        return real(source, target, **how)

    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "supports_dir_fd", os.supports_dir_fd | {rename})
    store.put("a", MINE)
    assert turns == ["000001"]
    assert [v.digest for v in store.versions("a")] == [THEIRS.digest]


def test_a_removal_locks_the_folder_that_it_moves(tmp_path, monkeypatch):
    """A lock of a folder that was removed and made again would let `sweep` into the removal."""
    store, other = PrefixStore(tmp_path), PrefixStore(tmp_path)
    store.put("a", FIRST)
    real, turns = locks.fcntl.flock, []

    def flock(fd, how):
        if not turns:
            turns.append(fd)
            other.delete("a")
            other.put("a", THEIRS)
        return real(fd, how)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with locks.atomic_removal(store.info("a").folder.parent, tmp_path / WORK) as gone:
        assert turns
        assert locks.sweep(tmp_path / WORK) == 0
        assert gone.exists()
    assert not gone.exists()


def test_a_version_that_arrives_during_the_removal_is_removed_too(tmp_path, monkeypatch):
    (tmp_path / "name" / "000001").mkdir(parents=True)
    real, turns = os.rmdir, []

    def rmdir(path, **how):
        if not turns and str(path).endswith("000001"):
            turns.append(path)
            (gone / "000002").mkdir()
        return real(path, **how)

    with locks.atomic_removal(tmp_path / "name", tmp_path / "work") as gone:
        monkeypatch.setattr(os, "rmdir", rmdir)
    assert turns
    assert not gone.exists()


def test_a_folder_that_another_process_removes_before_the_sync_is_no_error(tmp_path, monkeypatch):
    real = Path.replace

    def replace(source: Path, target: Path) -> Path:
        done = real(source, target)
        shutil.rmtree(target.parent)
        return done

    monkeypatch.setattr(Path, "replace", replace)
    atomic.replace_file(tmp_path / "folder" / "file", b"x")
    assert not (tmp_path / "folder").exists()


def test_a_users_file_that_is_removed_while_a_folder_is_replaced_is_left_out(tmp_path, monkeypatch):
    target = tmp_path / "p"
    prefix(1).save_pretrained(target)
    (target / "notes.txt").write_text("x")
    (target / "more").mkdir()
    (target / "stays.txt").write_text("y")
    real_file, real_folder = shutil.copy2, shutil.copytree

    def gone_file(source, *arguments, **how):
        if Path(source).name == "notes.txt":
            Path(source).unlink()
        return real_file(source, *arguments, **how)

    def gone_folder(source, *arguments, **how):
        shutil.rmtree(source)
        return real_folder(source, *arguments, **how)

    monkeypatch.setattr(shutil, "copy2", gone_file)
    monkeypatch.setattr(shutil, "copytree", gone_folder)
    prefix(2).save_pretrained(target)
    assert {p.name for p in target.iterdir()} & {"notes.txt", "more", "stays.txt"} == {"stays.txt"}


def test_two_exports_of_one_name_at_once(tmp_path, monkeypatch):
    prefixes, real, turns = {"a": MINE}, os.path.lexists, []

    def lexists(path):
        found = real(path)
        if not turns:
            turns.append(path)
            assert export(prefixes, "a", tmp_path).ok
        return found

    monkeypatch.setattr(os.path, "lexists", lexists)
    assert export(prefixes, "a", tmp_path).ok
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
