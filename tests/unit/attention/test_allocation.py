"""The prefix is never gathered or expanded: no tensor of rows x P keys in decode, none of batch x P keys in training."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from parity.packed import Case, packed
from prefixfast import Engine, load
from prefixfast.attention import cpu_decode as attend
from prefixfast.attention import ops
from prefixfast.prefix import peft_format as layout
from prefixfast.prefix.prefix import Prefix
from prefixfast_kernels import torch_attn
from prefixfast_kernels.testing.tables import Request, decode_tables
from prefixfast_kernels.torch_sdpa_lse import Options

P, ROWS = 120, 24


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operator allocates (views of its inputs do not count)."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [
            t
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor) and not t.is_mkldnn
        ]  # those are packed weights
        storages = {t.untyped_storage().data_ptr() for t in given}
        for t in torch.utils._pytree.tree_leaves(out):
            if (
                isinstance(t, torch.Tensor)
                and t.is_floating_point()
                and not t.is_mkldnn
                and t.untyped_storage().data_ptr() not in storages
            ):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


KERNELS = ((torch_attn, "attn_fwd"), (torch_attn, "attn_bwd"), (ops, "decode_fwd"), (attend, "decode"))


@pytest.fixture
def seen(monkeypatch):
    """What the kernels allocate: a mode does not reach into a custom operator, so it is entered inside."""
    largest = Largest()

    def watched(kernel):
        def call(*args, **kwargs):
            with largest:
                return kernel(*args, **kwargs)

        return call

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return largest


def setup(family):
    base = tiny.make(family)
    tables = [tiny.peft_table(tiny.make(family), P, seed) for seed in (1, 2)]
    return base, [Prefix(layout.from_table(t, *tiny.shapes(base)), pos_start=P) for t in tables], tables


def decode_in_torch(monkeypatch):
    monkeypatch.setattr(attend, "cannot", lambda *_: {"anything (a test)": True})


@pytest.mark.parametrize("backend", ["attend", "torch"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decode_allocates_nothing_of_rows_times_prefix(family, backend, seen, monkeypatch):
    if backend == "torch":
        decode_in_torch(monkeypatch)
    base, prefixes, _ = setup(family)
    with Engine(base, max_num_seqs=ROWS, max_model_len=16, kv_cache_memory=2**20) as engine:
        shape = engine.model.layers[0]
        limit = ROWS * P * shape.num_kv_heads * shape.head_dim
        prompts = [[5, 6, 7]] * ROWS
        chosen = [prefixes[i % 2] for i in range(ROWS)]
        engine.generate(prompts, chosen, max_new_tokens=2)  # loads the prefixes
        seen.numel = 0
        with seen:
            engine.generate(prompts, chosen, max_new_tokens=4, min_new_tokens=4)
        assert 0 < seen.numel < limit


def test_decode_in_rust_allocates_its_output_alone():
    """Nothing of rows x tokens either: keys are read where they lie."""
    rows, tokens = 9, 50
    k, v = torch.randn(2, 600, 2, 16).unbind()
    q, table = torch.randn(rows, 4, 16), torch.randperm(600)[: rows * tokens].view(rows, tokens).int()
    tables = decode_tables([tokens] * rows, [Request(0, ((0, True),))] * rows, [(3, P)])
    with Largest() as seen:
        attend.decode(q, k, v, k, v, table, tables, Options(0.25, 0, 0.0))
    assert seen.numel == q.numel()


def test_the_check_sees_an_expansion_inside_a_kernel(seen, monkeypatch):
    decode_in_torch(monkeypatch)
    base, prefixes, _ = setup("gpt2")
    honest = ops.decode_fwd.__closure__  # the watched kernel
    assert honest is not None

    def expanding(q, k_arena, *rest):
        k_arena[:P].expand(len(q), -1, -1, -1).clone()
        return kernel(q, k_arena, *rest)

    kernel = next(c.cell_contents for c in honest if callable(c.cell_contents) and c.cell_contents is not seen)
    monkeypatch.setattr(
        ops, "decode_fwd", lambda *args: (seen.__enter__(), expanding(*args), seen.__exit__(None, None, None))[1]
    )
    with Engine(base, max_num_seqs=ROWS, max_model_len=16, kv_cache_memory=2**20) as engine:
        engine.generate([[5, 6, 7]] * ROWS, prefixes[0], max_new_tokens=3, min_new_tokens=3)
    assert seen.numel >= ROWS * P * 32


def test_the_check_sees_an_expanded_prefix():
    """Transformers' own way, a cache expanded to the batch, is over the limit."""
    base, _, tables = setup("gpt2")
    peft = tiny.with_prefix(base, tables[0])
    ids = torch.full((ROWS, 3), 5)
    with Largest() as seen, torch.no_grad():
        peft(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert seen.numel >= ROWS * P * 32


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_allocates_nothing_of_batch_times_prefix(family, seen):
    base, prefixes, tables = setup(family)
    prompts = [torch.tensor([5, 6, 7, 8])] * ROWS
    with load(base) as model:
        shape = model.layers[0]
        limit = ROWS * P * shape.num_kv_heads * shape.head_dim
        with seen:
            logits, leaves = packed(model, Case(prompts, [i % 2 for i in range(ROWS)], tables), prefixes, grad=True)
            F.cross_entropy(logits, torch.cat(prompts)).backward()
        assert all(t.grad is not None for kv in leaves for t in kv)
        assert 0 < seen.numel < limit
        assert np.isfinite(logits.detach().numpy()).all()
