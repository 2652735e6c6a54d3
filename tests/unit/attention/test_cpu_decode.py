"""Decode attention in Rust against the reference in fp64.

The tests cover all shapes, dtypes and instruction sets, wrong tables that must change the result, and invalid tables
that must be refused.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixfast import _rust
from prefixfast.attention import backends, cpu_decode, decode_ops, ops
from prefixfast.errors import ConfigError
from prefixfast_kernels import reference
from prefixfast_kernels.inputs import AttnOptions, DecodeInputs
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.testing.tables import Request, decode_tables
from prefixfast_kernels.testing.tolerance import FLOOR, relative_error, relative_errors, within_tolerance

PATHS = _rust.attend_paths()


@dataclass(frozen=True)
class Step:
    """A decode step in fp64. Prefix rows lie in the arena, so the arena can also serve as the separate prefix."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slot_table: torch.Tensor
    tables: DecodeTables
    options: AttnOptions
    bias: torch.Tensor | None = None

    def inputs(self, dtype=torch.float32, arena=None, prefix=None):
        """Inputs rounded to the dtypes of queries, arena and prefix; the last two default to that of the queries."""
        k, v, pk, pv = (t.to(d or dtype) for d in (arena, prefix) for t in (self.k, self.v))
        return DecodeInputs(self.q.to(dtype), k, v, self.slot_table, pk, pv)


def widen(inputs):
    """The same inputs in fp64."""
    return DecodeInputs(*(t.double() if t.is_floating_point() else t for t in inputs))


def make(lens, requests, block_lengths, *, heads, window=0, softcap=0.0, max_distance=0, seed=0):
    hq, h, d = heads
    g = torch.Generator().manual_seed(seed)
    blocks, row = [], 2
    for length in block_lengths:
        blocks.append((row, length))
        row += length + 3
    q = torch.randn(len(lens), hq, d, generator=g, dtype=torch.float64)
    k, v = (torch.randn(row + sum(lens) + 5, h, d, generator=g, dtype=torch.float64) for _ in range(2))
    slots = (row + torch.randperm(sum(lens), generator=g)).int().split(lens)
    # Entries past a row's end are never read.
    table = torch.full((len(lens) + 2, max(lens) + 3), 10**6, dtype=torch.int32)
    rows = torch.randperm(len(lens) + 2, generator=g)[: len(lens)].int()
    for r, own in zip(rows.tolist(), slots, strict=True):
        table[r, : len(own)] = own
    tables = decode_tables(lens, requests, blocks)._replace(row=rows)
    bias = torch.randn(hq, 2 * max_distance + 1, generator=g) if max_distance else None
    return Step(q, k, v, table, tables, AttnOptions(d**-0.5, window, softcap), bias)


def run_rust(step, inputs=None, **kwargs):
    inputs = step.inputs() if inputs is None else inputs
    return cpu_decode.decode(inputs, step.tables, step.options, step.bias, **kwargs)


def run_reference(step, inputs=None):
    """Outputs of the specification, in fp64 unless ``inputs`` are given."""
    inputs = step.inputs(torch.float64) if inputs is None else inputs
    return reference.attn_decode(inputs, step.tables, step.options, step.bias)


def errors(step, *dtypes, path=None, tables=None):
    """Errors of (o, lse) against fp64 on the same rounded numbers: of Rust, and of the reference in the same dtype."""
    inputs = step.inputs(*dtypes)
    exact = run_reference(step, widen(inputs))
    got = cpu_decode.decode(inputs, step.tables if tables is None else tables, step.options, step.bias, path=path)
    assert got[0].dtype == inputs.q.dtype
    assert got[1].dtype == torch.float32
    return relative_errors(got, exact), relative_errors(run_reference(step, inputs), exact)


A, B = ((0, True),), ((1, True),)
RAGGED = [9, 1, 70, 3, 64, 65, 130]
CASES = {
    "none": (RAGGED, [Request(0)] * 7, []),
    "one for all": (RAGGED, [Request(0, A)] * 7, [200]),
    "long": ([5, 40], [Request(0, A), Request(0, B)], [512, 511]),
    "distinct": ([4, 2, 9], [Request(0, ((i, True),)) for i in range(3)], [64, 1, 65]),
    "composed": (
        RAGGED,
        [Request(0, b) for b in (A + B, B, (), B + A, ((0, False),), (*A, (2, False)), A)],
        [33, 70, 5],
    ),
    "twice the same": ([4, 6], [Request(0, A + A), Request(0, A)], [40]),
    "one row": ([17], [Request(0, A)], [100]),
}
HEADS = [(4, 4, 64), (12, 4, 16), (6, 2, 80), (8, 1, 96), (9, 3, 128), (5, 1, 256), (3, 3, 20)]
SETTINGS = [(0, 0.0), (5, 0.0), (0, 3.0), (100, 30.0)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, path):
    for i, heads in enumerate(HEADS):
        window, softcap = SETTINGS[i % len(SETTINGS)]
        for again in (0, 1):
            step = make(*CASES[case], heads=heads, window=window if again else 0, softcap=softcap)
            got, same_dtype = errors(step, path=path)
            assert within_tolerance(got, same_dtype, FLOOR[torch.float32]), (heads, window, softcap, got, same_dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prefix", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arena", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_mix_of_dtypes(dtype, arena, prefix, path):
    """The reference rounds an fp32 prefix to bf16 queries' dtype. Rust reads it as it is and must be as exact."""
    for heads in ((4, 4, 64), (6, 2, 80), (2, 1, 20)):
        got, same_dtype = errors(make(*CASES["composed"], heads=heads, window=50), dtype, arena, prefix, path=path)
        assert within_tolerance(got, same_dtype, FLOOR[dtype]), (heads, got, same_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_other_rows_change_no_bit(dtype):
    step = make(*CASES["composed"], heads=(6, 2, 64), window=60, softcap=9.0)
    inputs = step.inputs(dtype, prefix=torch.bfloat16)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(run_rust(step, inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    lens, requests, _ = CASES["composed"]
    blocks = list(map(tuple, step.tables.block.tolist()))
    for i, request in enumerate(requests):
        used = sorted({b for b, _ in request.blocks})
        own = Request(0, tuple((used.index(b), slides) for b, slides in request.blocks))
        alone = decode_tables(lens[i : i + 1], [own], [blocks[b] for b in used])
        alone = alone._replace(row=step.tables.row[i : i + 1])
        o, lse = cpu_decode.decode(inputs._replace(q=inputs.q[i : i + 1]), alone, step.options)
        assert torch.equal(o[0], runs[0][0][i])
        assert torch.equal(lse[0], runs[0][1][i])


def test_strided_queries_and_wider_slot_tables():
    step = make(*CASES["composed"], heads=(6, 2, 64))
    expected, q = run_rust(step), step.q.float()
    head_major = q.transpose(0, 1).contiguous().transpose(0, 1)  # memory of attention modules, [heads, rows, D]
    fused = torch.zeros(7, 3, 6, 64).copy_(q[:, None])[:, 1]
    no_unit_stride = torch.stack([q] * 2, -1)[..., 0]
    wide = torch.zeros(len(step.slot_table), 500, dtype=torch.int32)
    wide[:, : step.slot_table.shape[1]] = step.slot_table
    for strided in (head_major, fused, no_unit_stride):
        assert not strided.is_contiguous()
        slot_table = wide[:, : step.slot_table.shape[1]]
        got = run_rust(step, step.inputs()._replace(q=strided, slot_table=slot_table))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


MISTAKES = {
    "prefix missing": lambda t: t._replace(use_indptr=torch.zeros_like(t.use_indptr)),
    "prefix row off by one": lambda t: t._replace(block=t.block + torch.tensor([1, 0], dtype=torch.int32)),
    "prefix one row short": lambda t: t._replace(block=t.block - torch.tensor([0, 1], dtype=torch.int32)),
    "blocks exchanged": lambda t: t._replace(block=t.block.flip(0)),
    "window slides over none": lambda t: t._replace(use=t.use * torch.tensor([1, 1, 0], dtype=torch.int32)),
    "window slides over all": lambda t: t._replace(use=t.use.index_fill(1, torch.tensor([2]), 1)),
    "window off by one": lambda t: t._replace(use=t.use + torch.tensor([0, 1, 0], dtype=torch.int32)),
    "prefix of another row": lambda t: t._replace(use=t.use.roll(1, 0)),
    "keys of a neighbour": lambda t: t._replace(row=t.row.roll(1), lens=t.lens.clamp(max=1)),
    "newest key missing": lambda t: t._replace(lens=(t.lens - 1).clamp(min=1)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_tables_are_out_of_tolerance(mistake, path):
    step, floor = make(*CASES["composed"], heads=(4, 2, 16), window=45), FLOOR[torch.float32]
    assert within_tolerance(*errors(step, path=path), floor)
    assert not within_tolerance(*errors(step, path=path, tables=MISTAKES[mistake](step.tables)), floor)


def test_a_wrong_log_base_is_out_of_tolerance():
    step, floor = make(*CASES["composed"], heads=(4, 2, 16)), FLOOR[torch.float32]
    got, same_dtype = errors(step)
    _, lse = run_rust(step)
    wrong = relative_error(lse / torch.log(torch.tensor(2.0)), run_reference(step)[1])
    assert within_tolerance(got, same_dtype, floor)
    assert not within_tolerance([got[0], wrong], same_dtype, floor)


def put(name, index, value):
    """A change that sets an entry of a table."""
    return lambda s: replace(
        s,
        tables=s.tables._replace(
            **{name: getattr(s.tables, name).clone().index_put_(index, torch.tensor(value, dtype=torch.int32))}
        ),
    )


def at(*index):
    return tuple(torch.tensor(i) for i in index)


def put_slot(value):
    """A change that sets an entry of the slot table."""

    def change(s):
        slot_table = s.slot_table.clone()
        slot_table[s.tables.row[2], 40] = value
        return replace(s, slot_table=slot_table)

    return change


INVALID = {
    "slot beyond the arena": (put_slot(10**6), "arena row 1000000"),
    "negative slot": (put_slot(-1), "arena row -1"),
    "neither keys nor blocks": (put("lens", at(2), 0), "0 keys and sees no block"),
    "negative length": (put("lens", at(3), -7), "-7 keys"),
    "more keys than columns": (put("lens", at(0), 200), "200 keys"),
    "row beyond the table": (put("row", at(1), 9), "row 9 of the slot table"),
    "negative row": (put("row", at(1), -1), "row -1 of the slot table"),
    "block beyond the prefix": (put("block", at(2, 0), 10**5), "from 100000 on"),
    "block far too long": (put("block", at(0, 1), 2**31 - 1), "block 0"),
    "negative block": (put("block", at(0, 0), -3), "from -3 on"),
    "a use of a block beyond the table": (put("use", at(0, 0), 7), "block 7, expected one of"),
    "a use of a negative block": (put("use", at(0, 0), -1), "block -1"),
    "uses out of order": (put("use_indptr", at(1), 99), "use_indptr"),
    "a length missing": (lambda s: replace(s, tables=s.tables._replace(lens=s.tables.lens[:-1])), "6 of lens"),
    "a use missing": (lambda s: replace(s, tables=s.tables._replace(use=s.tables.use[:-1])), "use_indptr"),
    "int64": (lambda s: replace(s, tables=s.tables._replace(lens=s.tables.lens.long())), "int64"),
    "strided": (
        lambda s: replace(s, tables=s.tables._replace(lens=s.tables.lens.repeat_interleave(2)[::2])),
        "contiguous",
    ),
    "a table of int64": (lambda s: replace(s, slot_table=s.slot_table.long()), "slot table"),
    "a transposed table": (lambda s: replace(s, slot_table=s.slot_table.T.contiguous().T), "slot table"),
    "keys of other heads": (lambda s: replace(s, k=s.k[:, :1].contiguous()), "expected both"),
    "fewer values": (lambda s: replace(s, v=s.v[:-1]), "expected both"),
    "another head dim": (lambda s: replace(s, q=s.q[..., :8]), "expected both"),
    "a bias of fewer heads": (lambda s: replace(s, bias=torch.zeros(3, 5)), "position bias"),
    "a bias of an even number of distances": (lambda s: replace(s, bias=torch.zeros(4, 6)), "position bias"),
    "a bias of another dtype": (lambda s: replace(s, bias=torch.zeros(4, 5).double()), "position bias"),
    "a strided bias": (lambda s: replace(s, bias=torch.zeros(5, 4).T), "position bias"),
    "a bias with a soft cap": (
        lambda s: replace(s, bias=torch.zeros(4, 5), options=s.options._replace(softcap=2.0)),
        "a position bias of 20 numbers",
    ),
    "heads that do not group": (lambda s: replace(s, q=s.q[:, :3]), "3 query heads and 2 kv heads"),
}


@pytest.mark.parametrize("invalid", INVALID)
def test_invalid_arguments_are_refused(invalid):
    change, message = INVALID[invalid]
    step = change(make(*CASES["composed"], heads=(4, 2, 16), window=0))
    inputs = step.inputs()
    before = [t.clone() for t in inputs]
    with pytest.raises(ConfigError, match=message):
        run_rust(step, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_slots_before_the_window_are_not_read():
    step = make(*CASES["none"], heads=(4, 2, 16), window=20)
    assert all(torch.equal(a, b) for a, b in zip(run_rust(put_slot(-1)(step)), run_rust(step), strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("max_distance", [1, 40, 400])
def test_a_position_bias(max_distance, path):
    for heads, window, dtype in (((4, 4, 64), 0, torch.float32), ((6, 2, 80), 30, torch.bfloat16)):
        for case in ("composed", "long", "twice the same"):
            step, floor = make(*CASES[case], heads=heads, window=window, max_distance=max_distance), FLOOR[dtype]
            got, same_dtype = errors(step, dtype, path=path)
            assert within_tolerance(got, same_dtype, floor), (heads, case, got, same_dtype)


BIAS_MISTAKES = {
    "off by one": lambda s: s.bias.roll(1, 1),
    "of another head": lambda s: s.bias.roll(1, 0),
    "dropped": lambda _: None,
    "of the other direction": lambda s: s.bias.flip(1).contiguous(),
}


@pytest.mark.parametrize("mistake", BIAS_MISTAKES)
def test_a_wrong_bias_is_out_of_tolerance(mistake):
    step = make(*CASES["composed"], heads=(4, 2, 16), max_distance=20)
    exact = run_reference(step)
    assert max(relative_errors(run_rust(step), exact)) < 1e-5
    assert max(relative_errors(run_rust(replace(step, bias=BIAS_MISTAKES[mistake](step))), exact)) > 1e-2
    nearer = step.tables._replace(use=step.tables.use + torch.tensor([0, 1, 0], dtype=torch.int32))
    assert max(relative_errors(run_rust(replace(step, tables=nearer)), exact)) > 1e-2


@pytest.mark.parametrize("path", PATHS)
def test_rows_without_own_keys_see_their_blocks_alone(path):
    """Cross-attention, whose keys are blocks that the beams of a request share."""
    for lens in ([0, 0, 0, 4, 0, 0, 0], [0, 5, 0, 1, 70, 0, 0]):
        step = make(*CASES["composed"], heads=(6, 2, 80))
        lens = torch.tensor(lens, dtype=torch.int32)
        step = replace(step, tables=step.tables._replace(lens=torch.minimum(lens, step.tables.lens)))
        step.tables.lens[2] = 2  # the row without blocks
        got, same_dtype = errors(step, path=path)
        assert within_tolerance(got, same_dtype, FLOOR[torch.float32]), (got, same_dtype)


def test_no_rows():
    step = make([3], [Request(0)], [], heads=(4, 2, 16))
    t = step.tables
    none = t._replace(row=t.row[:0], lens=t.lens[:0], use_indptr=t.use_indptr[:1])
    o, lse = run_rust(replace(step, q=step.q[:0], tables=none))
    assert o.shape == (0, 4, 16)
    assert lse.shape == (0, 4)


# ---- the operator ----


def operator_args(step, *, dtype=torch.float32, backend="auto", prefix=True):
    """Arguments of `ops.attn_decode`."""
    q, k, v, slot_table, pk, pv = step.inputs(dtype)
    scale, window, softcap, _ = step.options
    pair = (pk, pv) if prefix else (None, None)
    max_len = int(step.tables.lens.max())
    return q, k, v, *pair, slot_table, list(step.tables), step.bias, max_len, scale, window, softcap, backend, 0


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_operator_runs_in_rust(backend, monkeypatch):
    monkeypatch.setattr(decode_ops, "decode_fwd", None)
    for prefix, max_distance in ((True, 0), (False, 0), (True, 9)):
        step = make(*CASES["composed"], heads=(4, 2, 16), max_distance=max_distance)
        expected = run_rust(step)
        got = ops.attn_decode(*operator_args(step, backend=backend, prefix=prefix))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_reference_backend_does_not_run_in_rust(monkeypatch):
    monkeypatch.setattr(cpu_decode, "decode", None)
    ops.attn_decode(*operator_args(make(*CASES["composed"], heads=(4, 2, 16)), backend="reference"))


@pytest.mark.parametrize(
    ("reason", "kwargs", "change"),
    [
        ("torch.float64", {"dtype": torch.float64}, lambda s: s),
        (
            "a position bias with a soft cap",
            {},
            lambda s: make(*CASES["none"], heads=(4, 2, 16), max_distance=9, softcap=2.0),
        ),
        ("not contiguous", {}, lambda s: replace(s, k=s.k.transpose(0, 1).contiguous().transpose(0, 1))),
        ("head dims over 256", {}, lambda s: make(*CASES["one row"], heads=(2, 1, 272))),
    ],
)
def test_an_unsupported_call_falls_back_and_is_logged(reason, kwargs, change, caplog, monkeypatch):
    step = change(make(*CASES["composed"], heads=(4, 2, 16)))
    monkeypatch.setattr(cpu_decode, "decode", None)
    backends.log_fallback.cache_clear()
    got = ops.attn_decode(*operator_args(step, **kwargs))
    assert max(relative_errors(got, run_reference(step))) < 1e-5
    assert [r.message for r in caplog.records if "the rust backend" in r.message and reason in r.message]


def test_without_the_extension_the_torch_backend_runs(caplog, monkeypatch):
    monkeypatch.setattr(cpu_decode, "_rust", lambda: None)
    backends.log_fallback.cache_clear()
    step = make(*CASES["composed"], heads=(4, 2, 16))
    o, _ = ops.attn_decode(*operator_args(step))
    assert relative_error(o, run_reference(step)[0]) < 1e-5
    assert "Rust extension" in caplog.text


def test_the_operator_is_registered_properly():
    step = make(*CASES["composed"], heads=(4, 2, 16))
    torch.library.opcheck(ops.attn_decode.custom_op, operator_args(step), test_utils=("test_schema", "test_faketensor"))


# ---- threads and instructions ----

# Forks a process for each case, which then reads its environment. Only the first one has to import torch.
PROGRAM = """
import json, logging, os, sys, traceback
import torch
from prefixfast.attention import cpu_decode
from prefixfast_kernels.inputs import AttnOptions, DecodeInputs
from prefixfast_kernels.testing.tables import Request, decode_tables

def decode(path):
    torch.set_num_threads(2)
    logging.basicConfig(level=logging.WARNING)
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(2, 4, 64, generator=g), *torch.randn(2, 300, 4, 64, generator=g).unbind()
    slot_table = torch.arange(200, dtype=torch.int32).view(2, 100)
    tables = decode_tables([100, 90], [Request(0, ((0, True),))] * 2, [(200, 99)])
    o, _ = cpu_decode.decode(DecodeInputs(q, k, v, slot_table), tables, AttnOptions(0.125))
    torch.save(o, path)

for number, (env, torch_file) in enumerate(json.loads(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(f"{number}.err", os.O_WRONLY | os.O_CREAT), 2)
        os.environ.update(env)
        torch._C.__file__ = torch_file or torch._C.__file__
        try:
            decode(f"{number}.pt")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
UNKNOWN = ("", "AVX2", "sse9")
NOWHERE = "/nowhere/at/all.so"


class Child(NamedTuple):
    """Exit code and standard error of a process, and its output of decode attention if it has one."""

    code: int
    text: str
    o: torch.Tensor | None


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Child]:
    """Processes by the instructions in their environment, without any, and where torch's file is not found."""
    folder = tmp_path_factory.mktemp("children")
    cases = {name: ({"PREFIXFAST_SIMD": name}, "") for name in (*PATHS, *UNKNOWN)}
    cases |= {"free": ({}, ""), NOWHERE: ({}, NOWHERE)}
    command = [sys.executable, "-c", PROGRAM, json.dumps(list(cases.values()))]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = {}
    for number, (name, code) in enumerate(zip(cases, run.stdout.split(), strict=True)):
        path = folder / f"{number}.pt"
        text = (folder / f"{number}.err").read_text(encoding="utf8")
        found[name] = Child(int(code), text, torch.load(path) if path.exists() else None)
    return found


def test_the_environment_variable_selects_the_instructions(children):
    assert [children[name][:2] for name in PATHS] == [(0, "")] * len(PATHS)
    exact = children["scalar"].o
    assert all(relative_error(children[name].o, exact) < 1e-5 for name in PATHS)
    assert not torch.equal(children[PATHS[0]].o, exact) or len(PATHS) == 1


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_instructions_are_an_error(name, children):
    code, text, _ = children[name]
    assert code == 1
    assert (
        f'ConfigError: environment variable PREFIXFAST_SIMD: instructions "{name}": this machine has {", ".join(PATHS)}'
        in text
    )


def test_without_torchs_threads_it_runs_on_one_thread(children):
    code, text, o = children[NOWHERE]
    assert code == 0
    assert text.count(f"decode attention runs on one thread: {NOWHERE} is not loaded") == 1
    assert torch.equal(o, children["free"].o)


@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP runtime is found on Linux only")
def test_it_runs_on_torchs_threads():
    assert cpu_decode._joined_openmp()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_step_equals_reference(data):
    draw = data.draw
    blocks = draw(st.lists(st.integers(1, 150), max_size=3))
    lens = draw(st.lists(st.integers(1, 140), min_size=1, max_size=6))
    use = st.tuples(st.integers(0, max(len(blocks) - 1, 0)), st.booleans())
    requests = [Request(0, tuple(draw(st.lists(use, max_size=2 if blocks else 0)))) for _ in lens]
    used = sorted({b for r in requests for b, _ in r.blocks})  # every block of a step has users
    requests = [Request(0, tuple((used.index(b), s) for b, s in r.blocks)) for r in requests]
    kv_heads = draw(st.integers(1, 3))
    heads = (kv_heads * draw(st.integers(1, 8)), kv_heads, draw(st.sampled_from([1, 8, 16, 20, 64, 80, 128])))
    window, softcap = draw(st.sampled_from([0, 1, 7, 64, 200])), draw(st.sampled_from([0.0, 5.0]))
    step = make(
        lens,
        requests,
        [blocks[b] for b in used],
        heads=heads,
        window=window,
        softcap=softcap,
        seed=draw(st.integers(0, 99)),
    )
    dtypes = [draw(st.sampled_from([torch.float32, torch.bfloat16])) for _ in range(3)]
    got, same_dtype = errors(step, *dtypes, path=draw(st.sampled_from(PATHS)))
    assert within_tolerance(got, same_dtype, FLOOR[dtypes[0]]), (got, same_dtype)
