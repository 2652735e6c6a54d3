"""Freed memory is kept while training runs or an engine is open, and given back afterwards."""

import ctypes
import gc
import resource
import sys

import pytest
import torch

import prefixfast
import tiny
from prefixfast.model import kept_memory

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)
PAGES = (100 << 20) // resource.getpagesize()


def faults() -> int:
    """Page faults of allocations of 100 MiB that are freed at once, after a first one."""
    for _ in range(2):
        torch.zeros(25 << 20).add_(1.0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(25 << 20).add_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def keeps() -> bool:
    return faults() < PAGES // 10


@pytest.fixture(autouse=True)
def _no_other_users(monkeypatch):
    gc.collect()  # engines that earlier tests have left
    monkeypatch.setattr(kept_memory, "_users", 0)
    kept_memory.hold()
    kept_memory.release()


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
