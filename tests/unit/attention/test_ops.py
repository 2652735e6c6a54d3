"""The custom operators: registration, tracing by torch.compile, choice of the backend and fallback."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from prefixfast.attention import backends, ops
from prefixfast.attention.backend_support import decode_unsupported, packed_unsupported
from prefixfast.errors import ConfigError
from prefixfast_kernels import tile_selection
from prefixfast_kernels.inputs import AttnInputs, AttnOptions, DecodeInputs
from prefixfast_kernels.testing.packed_cases import CASES
from prefixfast_kernels.testing.packed_problem import make_problem
from prefixfast_kernels.testing.tables import Request
from prefixfast_kernels.testing.tolerance import relative_error
from prefixfast_kernels.tile_selection import NO_TILES, Backend, TileSizes

SIZES = TileSizes(8, 16, 16)
BACKENDS = {"torch": NO_TILES, "triton": SIZES}


def setup(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    requests = [Request(7, ((0, True),)), Request(5, ((1, True),))]
    p = make_problem(requests, [6, 3], (4, 2, 16), sizes=SIZES).cast(torch.float32)
    return p, (list(p.tables), None, None, p.scale, 0, 0.0, True, True, backend, list(BACKENDS[backend]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_registered_properly(backend):
    p, rest = setup(backend)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.attn.custom_op, (*p.leaves(), *rest), test_utils=checks)
    o, lse = ops.attn(p.q, p.k, p.v, p.prefix_k, p.prefix_v, *rest)
    for needs in ([True] * 5, [False, False, False, True, True], [True, True, True, False, False]):
        torch.library.opcheck(
            ops.attn_bwd, (p.do, p.q, p.k, p.v, p.prefix_k, p.prefix_v, o, lse, *rest, needs), test_utils=checks[:2]
        )


def test_kv_write_and_cross_entropy_are_registered_properly():
    arena = torch.zeros(8, 2, 4), torch.zeros(8, 2, 4)
    slots = torch.tensor([1, 5, 2], dtype=torch.int32)
    torch.library.opcheck(
        ops.kv_write.custom_op, (*arena, torch.ones(3, 2, 4), torch.ones(3, 2, 4), slots), test_utils="test_schema"
    )
    args = (
        torch.randn(5, 8, requires_grad=True),
        torch.randn(11, 8),
        None,
        torch.tensor([1, 2, 3, 4, 0]),
        0.0,
        True,
        "torch",
    )
    torch.library.opcheck(
        ops.linear_cross_entropy, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_compile_traces_them_without_graph_breaks(backend):
    p, rest = setup(backend)
    weight, targets = torch.randn(11, 4 * 16), torch.arange(12) % 11

    def loss(q, k, v, pk, pv):
        o, _ = ops.attn(q * 2, k, v, pk, pv, *rest)
        return ops.cross_entropy(o.flatten(1), weight, None, targets, 0.0, "torch").sum()

    runs = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = p.leaves()
        value = function(*leaves)
        runs.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(*runs, strict=True))


def test_the_triton_backend_can_skip_the_gradients_of_q_k_and_v():
    """Layer 0 above a frozen embedding needs the gradient of the prefix only; the gradient is the same."""
    p, rest = setup("triton")
    o, lse = ops.attn(p.q, p.k, p.v, p.prefix_k, p.prefix_v, *rest)
    args = (p.do, p.q, p.k, p.v, p.prefix_k, p.prefix_v, o, lse, *rest)
    everything, some = ops.attn_bwd(*args, [True] * 5), ops.attn_bwd(*args, [False, False, False, True, True])
    assert [t.numel() for t in some[:3]] == [0, 0, 0]
    assert all(torch.equal(a, b) for a, b in zip(everything[3:], some[3:], strict=True))


@pytest.mark.parametrize("change", ["bias with a cap", "float64", "no tiles"])
def test_a_backend_requested_by_name_does_not_fall_back(change):
    p, rest = setup("triton")
    arguments = list(rest)
    if change == "bias with a cap":
        arguments[2], arguments[5] = torch.zeros(4, 5), 1.0
    if change == "no tiles":
        arguments[-1] = [0] * 4
    dtype = torch.float64 if change == "float64" else torch.float32
    tensors = [t.to(dtype) for t in (p.q, p.k, p.v, p.prefix_k, p.prefix_v)]
    with pytest.raises(ConfigError, match="backend 'triton': attn does not support"):
        ops.attn(*tensors, *arguments)


BIASED = {"head_dim": 64, "heads": 2, "window": 0}
NOT_COMPILED = {
    "head dim 96": {"head_dim": 96},
    "head dim 256": {"head_dim": 256},
    "grouped query heads": {"heads": 4},
    "a sliding window": {"window": 9},
}


@pytest.mark.parametrize("reason", [None, "head dim 128", *NOT_COMPILED])
def test_triton_takes_a_position_bias_where_it_is_compiled(reason):
    given = BIASED | ({"head_dim": 128} if reason == "head dim 128" else NOT_COMPILED.get(reason, {}))
    q, k = torch.empty(1, given["heads"], given["head_dim"]), torch.empty(1, 2, given["head_dim"])
    options = AttnOptions(1.0, given["window"])
    for has_bias in (False, True):
        for unsupported in (
            packed_unsupported(AttnInputs(q, k, k), options, SIZES, has_bias=has_bias),
            decode_unsupported(DecodeInputs(q, k, k, k), options, has_work=True, has_bias=has_bias),
        ):
            refused = has_bias and reason in NOT_COMPILED
            assert [reason in text for text in unsupported["triton"]] == [True] * refused


def test_a_report_names_torch_where_triton_does_not_take_a_position_bias():
    backend = ops.choose_backend("triton", torch.device("cpu"), torch.bfloat16, ((1, 96),))
    for has_bias, head_dim, chosen in ((True, 96, "torch"), (False, 96, "triton"), (True, 64, "triton")):
        with FakeTensorMode():  # tensors of a device that need not be there
            found = ops.explain_backends(
                replace(backend, name="auto"), torch.device("cuda"), torch.bfloat16, head_dim, has_bias=has_bias
            )
        assert [found[op].split()[0] for op in ("attn", "attn_decode")] == [chosen] * 2


def test_a_call_unsupported_by_torch_runs_on_the_reference_and_is_logged(caplog):
    case = CASES["infix"]
    p = case.problem(SIZES).cast(torch.float32)
    backends.log_fallback.cache_clear()
    args = (p.q, p.k, p.v, p.prefix_k, p.prefix_v, list(p.tables), None, None, p.scale, 0, 0.0, True, False)
    outs = [ops.attn(*args, backend, [0] * 4)[0] for backend in ("torch", "reference")]
    assert torch.equal(*outs)
    assert "segments whose queries are not their last keys" in caplog.text


def test_backends_are_chosen_by_name_and_device(monkeypatch):
    cpu, shapes = torch.device("cpu"), ((2, 64), (8, 128))
    assert ops.choose_backend("auto", cpu, torch.float32, shapes) == Backend("torch")
    assert ops.choose_backend("reference", cpu, torch.float32, shapes) == Backend("reference")
    chosen = ops.choose_backend("triton", cpu, torch.bfloat16, shapes)  # the interpreter
    assert chosen.name == "triton"
    assert chosen.sizes.tokens * 8 <= 128
    monkeypatch.delenv("TRITON_INTERPRET")
    tile_selection.chip_of.cache_clear()
    with pytest.raises(ConfigError, match="not for cpu"):
        ops.choose_backend("triton", cpu, torch.bfloat16, shapes)
    with pytest.raises(ConfigError, match="expected 'auto' or one of"):
        ops.choose_backend("cuda", cpu, torch.bfloat16, shapes)
    tile_selection.chip_of.cache_clear()
