"""Freed memory is kept while training runs or an engine is open, and given back afterwards."""

import ctypes
import gc
import json
import subprocess
import sys

import pytest

import prefixfast
import tiny
from oracles import ROOT
from prefixfast.model import kept_memory

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)
THRESHOLDS: list[tuple[int, int]] = []
# Of each block of 256 MiB: whether glibc mapped it alone, and MiB of the process that are left once it is freed.
PROGRAM = """
import ctypes, json, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from prefixfast.model.kept_memory import keep_freed_memory

libc, size = ctypes.CDLL(None), 256 * 2**20
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena free fast mapped mapped_bytes a b c d e".split()]

libc.mallinfo2.restype = Counts
if not libc.mallopt(-3, 2**30):  # older versions keep blocks of up to 32 MiB alone
    sys.exit(print("null"))
libc.mallopt(-3, 2**25)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def freed_block():
    before = libc.mallinfo2().mapped
    block = libc.malloc(size)
    is_mapped = libc.mallinfo2().mapped > before
    libc.memset(block, 1, size)
    libc.free(block)
    return is_mapped, (resident() - start) >> 20

start = resident()
found = [freed_block()]
with keep_freed_memory():
    found += [freed_block(), freed_block()]
found.append((None, (resident() - start) >> 20))
print(json.dumps(found))
"""


def keeps() -> bool:
    return THRESHOLDS[-1] == kept_memory.LARGEST_KEPT


@pytest.fixture(autouse=True)
def _watched(monkeypatch):
    """Record the thresholds that are set, without other users."""
    gc.collect()  # engines that earlier tests have left
    set_thresholds = kept_memory._set
    monkeypatch.setattr(kept_memory, "_set", lambda *t: THRESHOLDS.append(t) or set_thresholds(*t))
    monkeypatch.setattr(kept_memory, "_users", 0)
    THRESHOLDS[:] = [kept_memory.DEFAULTS]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_the_c_library_keeps_a_freed_block_and_gives_it_back_at_the_end():
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(ROOT / "python")], capture_output=True, text=True)
    assert not run.returncode, run.stderr
    if (found := json.loads(run.stdout)) is None:
        pytest.skip("this version of glibc maps large blocks alone")
    (alone, left), (first, held), (second, held_again), (_, after) = found
    assert alone
    assert left < 64
    assert not first
    assert not second
    assert 240 < held < 320
    assert 240 < held_again < 320  # the second block takes the memory of the first
    assert after < 64


def test_memory_is_kept_until_the_last_user_ends():
    assert not keeps()
    with kept_memory.keep_freed_memory():
        with kept_memory.keep_freed_memory():
            assert keeps()
        assert keeps()
    assert not keeps()


def test_training_keeps_memory_and_gives_it_back(tokenizer):
    found = []

    class Watch:
        def on_step(self, *_: object) -> None:
            found.append(keeps())

    with prefixfast.load(tiny.make("gpt2"), tokenizer=tokenizer) as base:
        rows = [{"prompt": "a", "completion": "b"}]
        prefixfast.train(base, rows, prefix_length=2, max_steps=1, callbacks=[Watch()], progress=False)
    assert found == [True]
    assert not keeps()


def test_an_engine_keeps_memory_until_it_is_closed_or_gone():
    with prefixfast.load(tiny.make("gpt2")) as base:
        with prefixfast.Engine(base) as engine:
            assert keeps()
        assert not keeps()
        engine.close()
        assert not keeps()
        engine = prefixfast.Engine(base)
        assert keeps()
        del engine
        gc.collect()
        assert not keeps()
