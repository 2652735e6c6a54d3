"""Freed memory is kept while training runs or an engine is open, and given back afterwards."""

import ctypes
import gc
import sys

import pytest

import prefixfast
import tiny
from prefixfast.model import kept_memory

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc"
)
THRESHOLDS: list[tuple[int, int]] = []


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
