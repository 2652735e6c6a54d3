"""Replacement of files and folders: after an exception or a kill, the old or the new version is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from oracles import ROOT
from prefixfast import Prefix
from prefixfast.io.atomic import recover_folder, replace_file, replace_folder, write_file

OWNED = frozenset({"a", "b"})


def put(target: Path, text: str) -> None:
    replace_folder(target, lambda p: write_file(p / "a", text.encode()), owned=OWNED)


def entries(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def fail(*_: object) -> None:
    msg = "disk full"
    raise OSError(msg)


def test_replace_file_creates_folder_and_file(tmp_path):
    replace_file(tmp_path / "x" / "y", b"1")
    replace_file(tmp_path / "x" / "y", b"2")
    assert (tmp_path / "x" / "y").read_bytes() == b"2"
    assert entries(tmp_path) == ["x", "x/y"]


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
def test_replace_file_that_fails_leaves_the_old_file(tmp_path, monkeypatch, where):
    replace_file(tmp_path / "y", b"old")
    monkeypatch.setattr(where, fail)
    with pytest.raises(OSError, match="disk full"):
        replace_file(tmp_path / "y", b"new")
    assert (tmp_path / "y").read_bytes() == b"old"
    assert entries(tmp_path) == ["y"]


def test_replace_folder_removes_owned_files_and_keeps_the_rest(tmp_path):
    put(tmp_path / "t", "old")
    (tmp_path / "t" / "b").write_text("of an older version", encoding="utf8")
    (tmp_path / "t" / "other").write_text("kept", encoding="utf8")
    put(tmp_path / "t", "new")
    assert entries(tmp_path) == ["t", "t/a", "t/other"]
    assert (tmp_path / "t" / "a").read_text(encoding="utf8") == "new"


@pytest.mark.parametrize("old", [True, False], ids=["replaced", "new"])
def test_an_exception_in_write_leaves_the_old_version(tmp_path, old):
    if old:
        put(tmp_path / "t", "old")
    before = entries(tmp_path)

    def write(p: Path) -> None:
        write_file(p / "a", b"half")
        fail()

    with pytest.raises(OSError, match="disk full"):
        replace_folder(tmp_path / "t", write, owned=OWNED)
    assert entries(tmp_path) == before
    assert not old or (tmp_path / "t" / "a").read_text(encoding="utf8") == "old"


class Renames:
    """`Path.rename` that works ``good`` times and then raises ``bad`` times."""

    def __init__(self, good: int, bad: int) -> None:
        self.good, self.bad, self.real = good, bad, Path.rename

    def __call__(self, source: Path, target: Path) -> Path:
        self.good -= 1
        if self.good < 0 and self.bad > 0:
            self.bad -= 1
            fail()
        return self.real(source, target)


def patched(monkeypatch: pytest.MonkeyPatch, good: int, bad: int) -> None:
    renames = Renames(good, bad)
    monkeypatch.setattr(Path, "rename", lambda source, target: renames(source, target))


def test_a_failing_second_rename_restores_the_old_version(tmp_path, monkeypatch):
    put(tmp_path / "t", "old")
    patched(monkeypatch, good=1, bad=1)
    with pytest.raises(OSError, match="disk full"):
        put(tmp_path / "t", "new")
    assert entries(tmp_path) == ["t", "t/a"]
    assert (tmp_path / "t" / "a").read_text(encoding="utf8") == "old"


def test_the_next_read_repairs_a_crash_between_the_renames(tmp_path, monkeypatch, make_prefix):
    make_prefix(1).save_pretrained(tmp_path / "p")
    with monkeypatch.context() as m:
        patched(m, good=1, bad=2)  # both the second rename and the recovery fail, as in a killed process
        with pytest.raises(OSError, match="disk full"):
            make_prefix(2).save_pretrained(tmp_path / "p")
    assert not (tmp_path / "p").exists(), "the crash was not simulated"
    assert Prefix.from_pretrained(tmp_path / "p").digest == make_prefix(1).digest
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_the_next_save_repairs_a_crash_between_the_renames(tmp_path, monkeypatch, make_prefix):
    make_prefix(1).save_pretrained(tmp_path / "p")
    with monkeypatch.context() as m:
        patched(m, good=1, bad=2)
        with pytest.raises(OSError, match="disk full"):
            make_prefix(2).save_pretrained(tmp_path / "p")
    make_prefix(3).save_pretrained(tmp_path / "p")
    assert Prefix.from_pretrained(tmp_path / "p").digest == make_prefix(3).digest
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_the_next_save_removes_a_backup_left_by_a_crash_after_the_renames(tmp_path):
    put(tmp_path / "t", "new")
    (tmp_path / ".t.previous").mkdir()
    recover_folder(tmp_path / "t")
    assert (tmp_path / "t" / "a").exists(), "a complete version is not replaced by a backup"
    put(tmp_path / "t", "newer")
    assert entries(tmp_path) == ["t", "t/a"]


def test_saves_leave_no_temporary_files(tmp_path, make_prefix):
    for seed in range(3):
        make_prefix(seed).save_pretrained(tmp_path / "p")
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_a_relative_path_is_taken_from_the_working_folder(tmp_path, monkeypatch, make_prefix):
    monkeypatch.chdir(tmp_path)
    make_prefix().save_pretrained("p")
    assert Prefix.from_pretrained("p").digest == make_prefix().digest


def test_a_file_at_the_target_is_an_error_and_stays(tmp_path):
    (tmp_path / "t").write_text("a user's file", encoding="utf8")
    with pytest.raises(OSError):  # noqa: PT011 - the operating system's words
        put(tmp_path / "t", "new")
    assert (tmp_path / "t").read_text(encoding="utf8") == "a user's file"


def test_saving_through_a_link_works_more_than_once(tmp_path, make_prefix):
    (tmp_path / "v1").mkdir()
    (tmp_path / "latest").symlink_to("v1")
    for seed in (1, 2):
        make_prefix(seed).save_pretrained(tmp_path / "latest")
    assert Prefix.from_pretrained(tmp_path / "latest").digest == make_prefix(2).digest


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from prefixfast import Prefix

# Every step of a save that touches the disk raises one of these audit events. A forked child is killed at each step.
STEPS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.utime", "shutil.rmtree"}
target = Path(sys.argv[1])
def make(seed, start):
    g = torch.Generator().manual_seed(seed)
    return Prefix({f"self.{i}.{x}": torch.randn(4, 4, 8, generator=g) for i in range(3) for x in "kv"}, pos_start=start)
old, new = make(1, 4), make(2, 0)  # only the old one is saved as an adapter, so the files differ
met = {old.digest: 0, new.digest: 0}
left = step = 0
while True:
    old.save_pretrained(target)
    (target / "notes.txt").write_text("the user's")
    pid = os.fork()
    if pid == 0:
        seen = 0
        def kill(event, _):
            global seen
            seen += event in STEPS
            if event in STEPS and seen > step:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(kill)
        new.save_pretrained(target)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    whole = not os.WIFSIGNALED(status)
    assert status in (0, signal.SIGKILL), status
    left += any(p.name.endswith((".tmp", ".previous")) for p in target.parent.iterdir())
    met[Prefix.from_pretrained(target).digest] += 1
    assert (target / "notes.txt").read_text() == "the user's", step
    if whole:
        break
    step += 1
print(*met.values(), left)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_process_killed_at_any_step_of_a_save_leaves_a_complete_prefix(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "p")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    old, new, left = map(int, run.stdout.split())
    assert old > 5, "no kill before the replacement"
    assert new > 1, "no kill after the replacement"
    assert left > 5, "no kill during the writes"
