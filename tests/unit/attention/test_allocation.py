"""No tensor of rows x P keys is allocated in decode and none of batch x P keys in training: prefixes stay in place."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from parity.packed import Case, packed
from prefixfast import Engine, load
from prefixfast.attention import cpu_decode, decode_ops
from prefixfast.prefix import peft_format
from prefixfast.prefix.prefix import Prefix
from prefixfast_kernels import torch_attn
from prefixfast_kernels.inputs import AttnOptions, DecodeInputs, NeedsGrad, OutputGrad
from prefixfast_kernels.testing.packed_problem import make_problem
from prefixfast_kernels.testing.tables import Request, decode_tables

P, ROWS = 120, 24


class LargestAllocation(TorchDispatchMode):
    """Records the size of the largest tensor that an operator allocates; views of its inputs do not count."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        storages = {t.untyped_storage().data_ptr() for t in _dense_tensors((args, kwargs))}
        for t in _dense_tensors(out):
            if t.is_floating_point() and t.untyped_storage().data_ptr() not in storages:
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


def _dense_tensors(tree):
    """Tensors of nested arguments, without packed weights of mkldnn, which have no storage."""
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and not t.is_mkldnn]


KERNELS = ((torch_attn, "attn_fwd"), (torch_attn, "attn_bwd"), (decode_ops, "decode_fwd"), (cpu_decode, "decode"))


@pytest.fixture
def largest(monkeypatch):
    """Largest allocation of the kernels. A dispatch mode does not reach into a custom operator, so it is set inside."""
    mode = LargestAllocation()

    def watched(kernel):
        def call(*args, **kwargs):
            with mode:
                return kernel(*args, **kwargs)

        return call

    for module, name in KERNELS:
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return mode


def setup(family, dtype=torch.float32):
    base = tiny.make(family).to(dtype)
    tables = [tiny.peft_table(tiny.make(family), P, seed) for seed in (1, 2)]
    return base, [Prefix(peft_format.from_table(t, *tiny.shapes(base)), pos_start=P) for t in tables], tables


def disable_rust(monkeypatch):
    """Run decode attention on the torch backend."""
    monkeypatch.setattr(cpu_decode, "unsupported", lambda *_, **__: ["any call in this test"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["rust", "torch"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decode_allocates_nothing_of_rows_times_prefix(family, backend, dtype, largest, monkeypatch):
    if backend == "torch":
        disable_rust(monkeypatch)
    base, prefixes, _ = setup(family, dtype)
    with Engine(base, max_num_seqs=ROWS, max_model_len=16, kv_cache_memory=2**20) as engine:
        shape = engine.model.layers[0]
        limit = ROWS * P * shape.num_kv_heads * shape.head_dim
        prompts = [[5, 6, 7]] * ROWS
        chosen = [prefixes[i % 2] for i in range(ROWS)]
        engine.generate(prompts, chosen, max_new_tokens=2)  # the first call loads the prefixes
        largest.numel = 0
        with largest:
            engine.generate(prompts, chosen, max_new_tokens=4, min_new_tokens=4)
        assert 0 < largest.numel < limit


def test_decode_in_rust_allocates_only_its_output():
    """No tensor of rows x tokens is allocated either: keys are read in place."""
    rows, tokens = 9, 50
    k, v = torch.randn(2, 600, 2, 16).unbind()
    q, slot_table = torch.randn(rows, 4, 16), torch.randperm(600)[: rows * tokens].view(rows, tokens).int()
    tables = decode_tables([tokens] * rows, [Request(0, ((0, True),))] * rows, [(3, P)])
    with LargestAllocation() as largest:
        cpu_decode.decode(DecodeInputs(q, k, v, slot_table), tables, AttnOptions(0.25))
    assert largest.numel == q.numel()


@pytest.mark.parametrize("decode", [cpu_decode.decode, None], ids=["rust", "torch"])
def test_cross_attention_in_decode_allocates_nothing_of_rows_times_source(decode):
    """The beams of a request read its encoder rows as a block, in place."""
    beams, requests, source = 6, 5, 90
    rows, blocks = beams * requests, [(3, P), *[(200 + i * source, source) for i in range(requests)]]
    k, v = torch.randn(2, 200 + requests * source, 2, 16).unbind()
    q, slot_table = torch.randn(rows, 4, 16), torch.zeros(rows, 4, dtype=torch.int32)
    sees = [Request(0, ((0, True), (1 + i // beams, False))) for i in range(rows)]
    inputs, tables = DecodeInputs(q, k, v, slot_table), decode_tables([0] * rows, sees, blocks)
    with LargestAllocation() as largest:
        if decode is None:
            decode_ops.decode_fwd(inputs, tables, 0, AttnOptions(0.25))
        else:
            decode(inputs, tables, AttnOptions(0.25))
    assert 0 < largest.numel <= q.numel()


@pytest.mark.parametrize("inference", [False, True])
def test_encoder_and_cross_attention_allocate_nothing_of_sequences_times_prefix(inference):
    for keys in (0, 7):
        requests = [Request(5 + i % 2, ((i % 2, True),), keys=keys) for i in range(ROWS)]
        options = AttnOptions(0.25, causal=False)
        with torch.inference_mode(inference):
            p = make_problem(requests, [P, P], (4, 2, 16)).cast(torch.float32)
            with LargestAllocation() as largest:
                o, lse = torch_attn.attn_fwd(p.inputs, p.tables, options)
                torch_attn.attn_bwd(OutputGrad(p.do, o, lse), p.inputs, p.tables, options, NeedsGrad())
        assert 0 < largest.numel < ROWS * P * 2 * 16


def test_an_expansion_inside_a_kernel_is_found(monkeypatch):
    disable_rust(monkeypatch)
    base, prefixes, _ = setup("gpt2")
    plain, mode = decode_ops.decode_fwd, LargestAllocation()

    def expanding(inputs, *rest):
        with mode:
            inputs.k_arena[:P].expand(len(inputs.q), -1, -1, -1).clone()
            return plain(inputs, *rest)

    monkeypatch.setattr(decode_ops, "decode_fwd", expanding)
    with Engine(base, max_num_seqs=ROWS, max_model_len=16, kv_cache_memory=2**20) as engine:
        engine.generate([[5, 6, 7]] * ROWS, prefixes[0], max_new_tokens=3, min_new_tokens=3)
    assert mode.numel >= ROWS * P * 32


def test_an_expanded_prefix_is_found():
    """A cache expanded to the batch, as PEFT makes it, exceeds the limit."""
    base, _, tables = setup("gpt2")
    peft = tiny.with_prefix(base, tables[0])
    ids = torch.full((ROWS, 3), 5)
    with LargestAllocation() as largest, torch.no_grad():
        peft(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert largest.numel >= ROWS * P * 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prefill_allocates_nothing_of_requests_times_prefix(family, dtype, largest):
    base, prefixes, _ = setup(family, dtype)
    with Engine(base, max_num_seqs=ROWS, max_model_len=16, kv_cache_memory=2**20) as engine:
        shape = engine.model.layers[0]
        prompts, chosen = [[5, 6, 7]] * ROWS, [prefixes[i % 2] for i in range(ROWS)]
        engine.generate(prompts[:2], chosen[:2], max_new_tokens=1)  # the first call loads the prefixes
        largest.numel = 0
        with largest:
            engine.generate(prompts, chosen, max_new_tokens=1)
        assert 0 < largest.numel < ROWS * P * shape.num_kv_heads * shape.head_dim


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_training_allocates_nothing_of_batch_times_prefix(family, dtype, largest):
    base, prefixes, tables = setup(family, dtype)
    prompts = [torch.tensor([5, 6, 7, 8])] * ROWS
    with load(base) as model:
        shape = model.layers[0]
        limit = ROWS * P * shape.num_kv_heads * shape.head_dim
        with largest:
            logits, leaves = packed(model, Case(prompts, [i % 2 for i in range(ROWS)], tables), prefixes, grad=True)
            F.cross_entropy(logits, torch.cat(prompts)).backward()
        assert all(t.grad is not None for kv in leaves for t in kv)
        assert 0 < largest.numel < limit
        assert np.isfinite(logits.detach().float().numpy()).all()
