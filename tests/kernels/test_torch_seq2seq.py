"""The `torch` backend on encoder attention, cross-attention and position bias, against the reference."""

import pytest
import torch

from prefixfast.attention import backends, cpu_decode, ops
from prefixfast_kernels import reference
from prefixfast_kernels.inputs import AttnInputs, AttnOptions, DecodeInputs
from prefixfast_kernels.testing.packed_problem import make_problem
from prefixfast_kernels.testing.tables import Request, decode_tables
from prefixfast_kernels.testing.tolerance import FLOOR, relative_error, relative_errors, within_tolerance
from prefixfast_kernels.torch_decode import decode_fwd

A, B = ((0, True),), ((1, True),)
BLOCKS = {"no": [], "one": [7], "two": [7, 40]}
USES = {"no": [()], "one": [A, ()], "two": [A + B, B, (), B + A]}
LENGTHS = [5, 17, 1, 20, 20, 2]
KEYS = [33, 4, 18, 16, 16, 1]
HEADS = [(4, 2, 64), (6, 2, 80), (3, 3, 6)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def requests_of(prefixes, *, separate=False, many=1):
    uses = USES[prefixes]
    rows = zip(LENGTHS * many, KEYS * many, strict=True)
    return [Request(n, uses[i % len(uses)], keys=m if separate else 0) for i, (n, m) in enumerate(rows)]


def forward(p, tensors, backend, *, causal, square, tables=None, bias=None):
    tables, bias = list(tables or p.tables), p.bias if bias is None else bias
    return ops.attn(*tensors, tables, p.slots, bias, p.scale, 0, 0.0, causal, square, backend, [0] * 4)


def run_with_grads(p, backend, **options):
    leaves = p.leaves()
    o, lse = forward(p, leaves, backend, **options)
    grads = torch.autograd.grad(o, leaves, p.do, allow_unused=True)
    return [o.detach(), lse, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prefixes", BLOCKS)
@pytest.mark.parametrize("max_distance", [0, 9], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("causal", "separate"), [(True, False), (False, False), (False, True)], ids=["self", "enc", "cross"]
)
def test_equals_reference(causal, separate, max_distance, prefixes, dtype, monkeypatch):
    options, turn = {"causal": causal, "square": not separate}, DTYPES.index(dtype)
    for heads, many in ((HEADS[turn], 1), (HEADS[turn - 1], 4)):  # 24 sequences take buckets where they may
        requests = requests_of(prefixes, separate=separate, many=many)
        p = make_problem(requests, BLOCKS[prefixes], heads, max_distance=max_distance).cast(dtype)
        exact = run_with_grads(p.cast(torch.float64), "reference", **options)
        same_dtype = relative_errors(run_with_grads(p, "reference", **options), exact)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "attn", None)
            got = relative_errors(run_with_grads(p, "torch", **options), exact)
            with torch.inference_mode():
                alone = make_problem(requests, BLOCKS[prefixes], heads, max_distance=max_distance).cast(dtype)
                inference = relative_errors(forward(alone, alone.inputs[:5], "torch", **options), exact[:2])
        assert within_tolerance(got, same_dtype, FLOOR[dtype]), (heads, many, got, same_dtype)
        assert within_tolerance(inference, same_dtype[:2], FLOOR[dtype]), (heads, many, inference, same_dtype)


def test_segments_that_share_keys_add_their_gradients():
    requests = [Request(15, A, infix_at=7), Request(4, B), Request(9, B, infix_at=8)]
    p = make_problem(requests, [20, 6], (4, 2, 64), max_distance=5)
    exact = run_with_grads(p, "reference", causal=False, square=True)
    got = run_with_grads(p, "torch", causal=False, square=True)
    assert max(relative_errors(got, exact)) < 1e-12


def test_a_segment_without_keys_gives_zero():
    """Torch's operator divides by the number of keys, which would end the process."""
    p = make_problem(requests_of("no", separate=True), [], (4, 2, 16))
    seg = p.tables.seg.clone()
    seg[3, 3] = 0
    tables, (row, rows) = p.tables._replace(seg=seg), seg[3, :2].tolist()
    leaves = p.leaves()
    o, lse = forward(p, leaves, "torch", causal=False, square=False, tables=tables)
    assert torch.equal(o[row : row + rows], torch.zeros_like(o[row : row + rows]))
    assert bool(lse[row : row + rows].isneginf().all())
    dq, *_ = torch.autograd.grad(o, leaves, p.do, allow_unused=True)
    assert torch.equal(dq[row : row + rows], torch.zeros_like(dq[row : row + rows]))


@pytest.mark.parametrize(
    ("causal", "separate"), [(True, False), (False, False), (False, True)], ids=["self", "enc", "cross"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_alone_gives_the_bits_of_the_batch(causal, separate, dtype):
    lengths, keys = [1, 2, 2, 33, 1, 64, 64, 200, 3] * 2, [2, 1, 1, 40, 1, 64, 64, 130, 300] * 2
    rows = zip(lengths, keys, strict=True)
    requests = [Request(n, [A + B, A, (), B, B][i % 5], keys=m if separate else 0) for i, (n, m) in enumerate(rows)]
    options = {"causal": causal, "square": not separate}
    with torch.inference_mode():
        p = make_problem(requests, [7, 40], (4, 2, 64), max_distance=9).cast(dtype)
        o, lse = forward(p, p.inputs[:5], "torch", **options)
        for request, (row, n, key, m) in zip(requests, p.tables.seg.tolist(), strict=True):
            used = sorted({b for b, _ in request.blocks})
            alone = Request(n, tuple((used.index(b), s) for b, s in request.blocks), keys=request.keys)
            tables = make_problem([alone], [[7, 40][b] for b in used], (4, 2, 64)).tables
            tables = tables._replace(block=p.tables.block[used])
            inputs = [p.q[row : row + n], p.k[key : key + m], p.v[key : key + m], p.prefix_k, p.prefix_v]
            got = forward(p, inputs, "torch", tables=tables, **options)
            assert torch.equal(got[0], o[row : row + n])
            assert torch.equal(got[1], lse[row : row + n])


def with_keys(p, keys):
    """Tables whose segments have other keys, ``[S, 2]``: first key and number of keys."""
    return {"tables": p.tables._replace(seg=torch.cat([p.tables.seg[:, :2], keys], 1))}


ONE_KEY = torch.tensor([0, 1], dtype=torch.int32)
MISTAKES = {
    "bias off by one": lambda p: {"bias": p.bias.roll(1, 1)},
    "bias of another head": lambda p: {"bias": p.bias.roll(1, 0)},
    "bias of a token for the prefix": lambda p: {
        "tables": p.tables._replace(user_pos=torch.zeros_like(p.tables.user_pos))
    },
    "bias reversed": lambda p: {"bias": p.bias.flip(1)},
    "a padded key counts": lambda p: with_keys(p, p.tables.seg[:, 2:] + (torch.arange(7) < 6)[:, None].int() * ONE_KEY),
    "keys of a neighbour": lambda p: with_keys(p, p.tables.seg[:, 2:].roll(1, 0)),
    "causal": lambda _: {"causal": True, "square": True},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_out_of_tolerance(mistake):
    requests = [Request(6 + i, [A, B, A + B][i % 3]) for i in range(6)]
    p = make_problem([*requests, Request(1)], [7, 40], (4, 2, 16), max_distance=50)
    tensors, right = p.leaves(), {"causal": False, "square": True}
    exact, exact_lse = forward(p, tensors, "reference", **right)
    o, lse = forward(p, tensors, "torch", **right)
    assert max(relative_error(o, exact), relative_error(lse, exact_lse)) < 1e-12
    changed = right | MISTAKES[mistake](p)
    bad, _ = forward(p, tensors, "torch", **changed)
    assert not relative_error(bad, exact) < 1e-4
    assert not relative_error(lse / torch.log(torch.tensor(2.0)), exact_lse) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_distance", [0, 6], ids=["plain", "bias"])
@pytest.mark.parametrize("lens", [[9, 1, 14, 3, 7, 2], [0, 0, 0, 0, 0, 0], [4, 0, 3, 0, 0, 1]], ids=str)
def test_decode_equals_reference(lens, max_distance, dtype):
    """Own keys, none (cross-attention, whose keys are blocks that the beams of a request share), and a mixture."""
    requests = [Request(0, b) for b in (A + B, A + B, A, (), B, ((2, True), (1, True)))]
    blocks = [(2, 5), (10, 8), (30, 21)]
    for window in (0, 4):
        for hq, h, d in HEADS[:2] if window else HEADS[1:]:
            g = torch.Generator().manual_seed(1)
            q = torch.randn(len(lens), hq, d, generator=g).to(dtype)
            k, v = (torch.randn(100, h, d, generator=g).to(dtype) for _ in range(2))
            bias = torch.randn(hq, 2 * max_distance + 1, generator=g) if max_distance else None
            slots = torch.full((len(lens), 20), 10**6, dtype=torch.int32)  # entries past a row's end are never read
            for i, n in enumerate(lens):
                slots[i, :n] = 55 + torch.randperm(40, generator=g)[:n]
            tables, options = decode_tables(lens, requests, blocks), AttnOptions(d**-0.5, window)
            inputs = DecodeInputs(q, k, v, slots)
            wide = DecodeInputs(q.double(), k.double(), v.double(), slots)
            exact = [t.nan_to_num(neginf=-99.0) for t in reference.attn_decode(wide, tables, options, bias)]
            got = decode_fwd(inputs, tables, max(lens), options, bias)
            got = relative_errors((t.nan_to_num(neginf=-99.0) for t in got), exact)
            same = reference.attn_decode(inputs, tables, options, bias)
            same = relative_errors((t.nan_to_num(neginf=-99.0) for t in same), exact)
            assert within_tolerance(got, same, FLOOR[dtype]), (hq, h, d, window, got, same)


def test_the_operators_run_on_the_torch_backend(monkeypatch):
    monkeypatch.setattr(cpu_decode, "unsupported", lambda *_, **__: ["any call in this test"])
    k, v = torch.randn(2, 60, 2, 16).unbind()
    q, bias = torch.randn(3, 4, 16), torch.randn(4, 11)
    inputs = DecodeInputs(q, k, v, torch.zeros(3, 4, dtype=torch.int32))
    tables = decode_tables([0] * 3, [Request(0, A)] * 3, [(4, 30)])
    expected = reference.attn_decode(inputs, tables, AttnOptions(0.25), bias)
    monkeypatch.setattr(reference, "attn_decode", None)
    args = (q, k, v, None, None, inputs.slot_table, list(tables), bias, 0, 0.25, 0, 0.0, "auto", 0)
    assert max(relative_errors(ops.attn_decode(*args), expected)) < 1e-5


UNSUPPORTED = {
    "a position bias with a soft cap": {"softcap": 2.0, "biased": True},
    "causal segments whose queries are not their last keys": {"square": False},
    "non-causal attention over keys in the slot table": {"causal": False, "arena": True},
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_an_unsupported_call_runs_on_the_reference_and_is_logged(reason, caplog):
    given = {"softcap": 0.0, "biased": False, "square": True, "causal": True, "arena": False} | UNSUPPORTED[reason]
    p = make_problem([Request(5), Request(3)], [], (2, 2, 16), arena=given["arena"], max_distance=2)
    bias = p.bias if given["biased"] else None
    backends.log_fallback.cache_clear()
    options = (p.scale, 0, given["softcap"], given["causal"], given["square"], "torch", [0] * 4)
    o, _ = ops.attn(p.q, p.k, p.v, None, None, list(p.tables), p.slots, bias, *options)
    inputs = AttnInputs(p.q, p.k, p.v, slots=p.slots)
    expected, _ = reference.attn(inputs, p.tables, AttnOptions(p.scale, 0, given["softcap"], given["causal"]), bias)
    assert torch.allclose(o, expected)
    assert reason in caplog.text
