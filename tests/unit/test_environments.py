"""Environments: without Triton, without torch, in a notebook's running event loop, interrupted calls."""

import _thread
import asyncio
import contextlib
import os
import signal
import subprocess
import sys

import pytest

import prefixfast
from oracles import ROOT
from prefixfast import Engine, PrefixStore, generate, train

ENV = {**os.environ, "PYTHONPATH": f"{ROOT / 'python'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}

WITHOUT_TRITON = """
import sys

class Hidden:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        return None if name.split(".")[0] == "triton" else self.finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hidden(f) for f in sys.meta_path]
import prefixfast, tiny, torch

torch.set_num_threads(1)
base = prefixfast.load(tiny.make("gpt2"))
rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}] * 4
prefix = prefixfast.train(base, rows, init="random", prefix_length=3, max_steps=2, batch_size=2, progress=False)
one = prefixfast.generate([[5, 6]], prefix, model=base, max_new_tokens=3)[0]
assert len(one.token_ids) == 3 or one.finish_reason == "stop"
assert prefixfast.score([[5, 6]], prefix, targets=[[7]], model=base)[0].logprob < 0
with prefixfast.HFCache(base, prefix) as cache:
    base.hf.generate(input_ids=torch.tensor([[5, 6]]), past_key_values=cache, max_new_tokens=2)
try:
    prefixfast.load(tiny.make("gpt2"), backend="triton")
except prefixfast.ConfigError as e:
    assert "triton" in str(e)
else:
    raise SystemExit("expected that the triton backend is refused")
assert not any(m == "triton" or m.startswith("triton.") for m in sys.modules)
print("fine")
"""


def python(code, **how):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=ENV,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        **how,
    )


def test_everything_but_the_triton_kernels_works_without_triton():
    run = python(WITHOUT_TRITON)
    assert (run.returncode, run.stdout.strip()) == (0, "fine"), run.stderr[-2000:]


def test_importing_the_package_imports_no_torch():
    heavy = "{'torch', 'transformers', 'numpy'}"
    run = python(f"import sys, prefixfast; prefixfast.ConfigError; print(*({heavy} & set(sys.modules)))")
    assert (run.returncode, run.stdout.strip()) == (0, ""), run.stderr


def test_listing_a_store_imports_no_torch(tmp_path, make_prefix):
    PrefixStore(tmp_path).put("ann", make_prefix())
    run = python(
        "import sys\n"
        "from prefixfast.store import PrefixStore\n"
        f"store = PrefixStore({str(tmp_path)!r})\n"
        "info = store.info('ann')\n"
        "assert list(store) == ['ann'] and info.layers and info.length\n"
        "assert store.versions('ann') and list(store.scan())\n"
        "assert not {'torch', 'transformers', 'safetensors.torch'} & set(sys.modules)\n"
        "print(store['ann'].digest == info.digest, 'torch' in sys.modules)"
    )
    assert run.stdout.strip() == "True True", run.stderr


@pytest.mark.long  # measures time
def test_the_package_is_imported_in_a_third_of_a_second():
    code = "import time; t = time.perf_counter(); import prefixfast; print(time.perf_counter() - t)"
    assert min(float(python(code).stdout) for _ in range(3)) < 0.3


def test_the_package_has_the_names_of_all_and_no_others():
    assert all(getattr(prefixfast, name) is not None for name in prefixfast.__all__)
    assert set(prefixfast.__all__) <= set(dir(prefixfast))
    with pytest.raises(AttributeError, match="module 'prefixfast' has no attribute 'tune'"):
        prefixfast.tune  # noqa: B018


def test_blocking_calls_work_inside_a_running_event_loop(base, make_prefix):
    """A notebook runs cells in a running event loop."""
    prefix = make_prefix()
    expected = [g.token_ids for g in generate(["ab", "cd"], prefix, model=base, max_new_tokens=4)]

    async def cell():
        assert [g.token_ids for g in generate(["ab", "cd"], prefix, model=base, max_new_tokens=4)] == expected
        rows = [{"prompt": "ab", "completion": "cd"}] * 2
        assert train(base, rows, prefix_length=2, max_steps=1, progress=False).length == 2
        with Engine(base, max_num_seqs=4, max_model_len=64) as engine:
            assert [g.token_ids for g in engine.generate(["ab", "cd"], prefix, max_new_tokens=4)] == expected
            assert (await engine.agenerate("ab", prefix, max_new_tokens=4)).token_ids == expected[0]
            assert [g.token_ids for g in engine.generate(["ab", "cd"], prefix, max_new_tokens=4)] == expected
            assert engine.submit("ab", prefix, max_new_tokens=4).result(60).token_ids == expected[0]
            assert (
                "".join(engine.stream("ab", prefix, max_new_tokens=4))
                == engine.generate(["ab"], prefix, max_new_tokens=4)[0].text
            )

    asyncio.run(cell())


@pytest.mark.parametrize("threaded", [False, True])
def test_an_interrupted_call_leaves_a_usable_engine(base, make_prefix, threaded):
    """A notebook's stop button raises KeyboardInterrupt in the main thread."""
    prefix = make_prefix()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes can ignore the signal
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, before)
        engine = stack.enter_context(Engine(base, max_num_seqs=2, max_model_len=160))
        expected = engine.generate(["ab"], prefix, max_new_tokens=5)[0].token_ids
        if threaded:
            engine.submit("x", max_new_tokens=1).result(60)
        real, calls = engine.loop.step, []

        def slow():
            calls.append(1)
            if len(calls) == 5:
                _thread.interrupt_main()
            return real()

        engine.loop.step = slow
        with pytest.raises(KeyboardInterrupt):
            engine.generate(["ab"] * 8, prefix, max_new_tokens=150, min_new_tokens=150)
        engine.loop.step = real
        assert engine.generate(["ab"], prefix, max_new_tokens=5)[0].token_ids == expected
