"""Decode attention in Rust against the reference in fp64: every shape, dtype and instruction set; planted mistakes; tables that must be refused."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixfast import _rust
from prefixfast.attention import backends, ops
from prefixfast.attention import cpu_decode as attend
from prefixfast.errors import ConfigError
from prefixfast_kernels import reference
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.testing.tables import Request, decode_tables, relative_error
from prefixfast_kernels.torch_sdpa_lse import Options

FLOOR = {torch.float32: 4e-6, torch.bfloat16: 2e-3}
PATHS = _rust.attend_paths()


@dataclass(frozen=True)
class Step:
    """A decode step in fp64; prefix rows lie in the arena too, so that either place can be used."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    tables: DecodeTables
    options: Options

    def cast(self, dtype, arena, prefix):
        """q, arena pair and prefix pair in their dtypes, rounded."""
        return self.q.to(dtype), *(t.to(d) for d in (arena, prefix) for t in (self.k, self.v))


def make(lens, requests, block_lengths, *, heads, window=0, softcap=0.0, seed=0):
    hq, h, d = heads
    g = torch.Generator().manual_seed(seed)
    blocks, row = [], 2
    for length in block_lengths:
        blocks.append((row, length))
        row += length + 3
    q = torch.randn(len(lens), hq, d, generator=g, dtype=torch.float64)
    k, v = (torch.randn(row + sum(lens) + 5, h, d, generator=g, dtype=torch.float64) for _ in range(2))
    slots = (row + torch.randperm(sum(lens), generator=g)).int().split(lens)
    table = torch.full(
        (len(lens) + 2, max(lens) + 3), 10**6, dtype=torch.int32
    )  # entries past a row's end are never read
    rows = torch.randperm(len(lens) + 2, generator=g)[: len(lens)].int()
    for r, own in zip(rows.tolist(), slots, strict=True):
        table[r, : len(own)] = own
    tables = decode_tables(lens, requests, blocks)._replace(row=rows)
    return Step(q, k, v, table, tables, Options(d**-0.5, window, softcap))


def spec(step, q, k, v, pk, pv):
    o = step.options
    return reference.attn_decode(
        q, k, v, pk, pv, step.table, step.tables, scale=o.scale, window=o.window, softcap=o.softcap
    )


def errors(step, dtype, arena, prefix, path, *, tables=None):
    """Errors of (o, lse) against fp64 on the same rounded numbers: of Rust, and of the reference in ``dtype``."""
    given = step.cast(dtype, arena, prefix)
    exact = spec(step, *(t.double() for t in given))
    got = attend.decode(*given, step.table, step.tables if tables is None else tables, step.options, path=path)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    same = spec(step, *given)
    return [relative_error(a, b) for a, b in zip(got, exact, strict=True)], [
        relative_error(a, b) for a, b in zip(same, exact, strict=True)
    ]


def holds(got, same, dtype):
    """At most twice the error of plain torch in the same dtype, above a rounding floor."""
    return all(e <= 2 * s + FLOOR[dtype] for e, s in zip(got, same, strict=True))


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
            got, same = errors(step, torch.float32, torch.float32, torch.float32, path)
            assert holds(got, same, torch.float32), (heads, window, softcap, got, same)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prefix", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arena", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_mix_of_dtypes(dtype, arena, prefix, path):
    """The reference rounds an fp32 prefix to the queries' bf16; Rust reads it as it is, so it is held to the same bound."""
    for heads in ((4, 4, 64), (6, 2, 80), (2, 1, 20)):
        got, same = errors(make(*CASES["composed"], heads=heads, window=50), dtype, arena, prefix, path)
        assert holds(got, same, dtype), (heads, got, same)


def test_the_number_of_threads_and_the_neighbours_change_no_bit():
    step = make(*CASES["composed"], heads=(6, 2, 64), window=60, softcap=9.0)
    given = step.cast(torch.float32, torch.float32, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(attend.decode(*given, step.table, step.tables, step.options))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    lens, requests, _ = CASES["composed"]
    blocks = list(map(tuple, step.tables.block.tolist()))
    for i, request in enumerate(requests):
        used = sorted({b for b, _ in request.blocks})
        own = Request(0, tuple((used.index(b), slides) for b, slides in request.blocks))
        alone = decode_tables(lens[i : i + 1], [own], [blocks[b] for b in used])._replace(
            row=step.tables.row[i : i + 1]
        )
        o, lse = attend.decode(given[0][i : i + 1], *given[1:], step.table, alone, step.options)
        assert torch.equal(o[0], runs[0][0][i])
        assert torch.equal(lse[0], runs[0][1][i])


def test_takes_strided_queries_and_wider_tables():
    step = make(*CASES["composed"], heads=(6, 2, 64))
    _, *kv = given = step.cast(torch.float32, torch.float32, torch.float32)
    expected = attend.decode(*given, step.table, step.tables, step.options)
    as_model = (
        step.q.float().transpose(0, 1).contiguous().transpose(0, 1)
    )  # [heads, rows, D] memory, as attention modules give it
    fused = torch.zeros(7, 3, 6, 64).copy_(step.q[:, None].float())[:, 1]
    no_unit = torch.stack([step.q.float()] * 2, -1)[..., 0]
    wide = torch.zeros(len(step.table), 500, dtype=torch.int32)
    wide[:, : step.table.shape[1]] = step.table
    for q in (as_model, fused, no_unit):
        assert not q.is_contiguous()
        got = attend.decode(q, *kv, wide[:, : step.table.shape[1]], step.tables, step.options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


MISTAKES = {
    "prefix dropped": lambda t: t._replace(user_indptr=torch.zeros_like(t.user_indptr)),
    "prefix row off by one": lambda t: t._replace(block=t.block + torch.tensor([1, 0], dtype=torch.int32)),
    "prefix one row short": lambda t: t._replace(block=t.block - torch.tensor([0, 1], dtype=torch.int32)),
    "blocks exchanged": lambda t: t._replace(block=t.block.flip(0)),
    "window slides over none": lambda t: t._replace(user_slides=torch.zeros_like(t.user_slides)),
    "window slides over all": lambda t: t._replace(user_slides=torch.ones_like(t.user_slides)),
    "window off by one": lambda t: t._replace(user_pos=t.user_pos + 1),
    "another's prefix": lambda t: t._replace(user=t.user.roll(1)),
    "own keys of a neighbour": lambda t: t._replace(row=t.row.roll(1), lens=t.lens.clamp(max=1)),
    "newest key forgotten": lambda t: t._replace(lens=(t.lens - 1).clamp(min=1)),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_planted_mistakes_are_caught(mistake, path):
    step = make(*CASES["composed"], heads=(4, 2, 16), window=45)
    args = (step, torch.float32, torch.float32, torch.float32, path)
    assert holds(*errors(*args), torch.float32)
    assert not holds(*errors(*args, tables=MISTAKES[mistake](step.tables)), torch.float32)


def test_a_wrong_log_base_is_caught():
    step = make(*CASES["composed"], heads=(4, 2, 16))
    got, same = errors(step, torch.float32, torch.float32, torch.float32, None)
    _, lse = attend.decode(*step.cast(*[torch.float32] * 3), step.table, step.tables, step.options)
    wrong = relative_error(lse / torch.log(torch.tensor(2.0)), spec(step, *step.cast(*[torch.float64] * 3))[1])
    assert holds(got, same, torch.float32)
    assert not holds([got[0], wrong], same, torch.float32)


def put(name, index, value):
    return lambda s: replace(
        s,
        tables=s.tables._replace(
            **{name: getattr(s.tables, name).clone().index_put_(index, torch.tensor(value, dtype=torch.int32))}
        ),
    )


def at(*index):
    return tuple(torch.tensor(i) for i in index)


def put_slot(value):
    def change(s):
        table = s.table.clone()
        table[s.tables.row[2], 40] = value
        return replace(s, table=table)

    return change


HOSTILE = {
    "slot beyond the arena": (put_slot(10**6), "arena row 1000000"),
    "negative slot": (put_slot(-1), "arena row -1"),
    "no keys": (put("lens", at(0), 0), "0 keys"),
    "negative length": (put("lens", at(3), -7), "-7 keys"),
    "more keys than columns": (put("lens", at(0), 200), "200 keys"),
    "row beyond the table": (put("row", at(1), 9), "row 9 of the slot table"),
    "negative row": (put("row", at(1), -1), "row -1 of the slot table"),
    "block beyond the prefix": (put("block", at(2, 0), 10**5), "from 100000 on"),
    "block far too long": (put("block", at(0, 1), 2**31 - 1), "block 0"),
    "negative block": (put("block", at(0, 0), -3), "from -3 on"),
    "user beyond the rows": (put("user", at(0), 7), "row 7, expected one of 7"),
    "negative user": (put("user", at(0), -1), "row -1"),
    "users out of order": (put("user_indptr", at(1), 99), "user_indptr"),
    "a length missing": (lambda s: replace(s, tables=s.tables._replace(lens=s.tables.lens[:-1])), "6 of lens"),
    "a position missing": (
        lambda s: replace(s, tables=s.tables._replace(user_pos=s.tables.user_pos[:-1])),
        "user_indptr",
    ),
    "int64": (lambda s: replace(s, tables=s.tables._replace(lens=s.tables.lens.long())), "int64"),
    "strided": (
        lambda s: replace(s, tables=s.tables._replace(lens=s.tables.lens.repeat_interleave(2)[::2])),
        "contiguous",
    ),
    "a table of int64": (lambda s: replace(s, table=s.table.long()), "slot table"),
    "a transposed table": (lambda s: replace(s, table=s.table.T.contiguous().T), "slot table"),
    "keys of other heads": (lambda s: replace(s, k=s.k[:, :1].contiguous()), "expected both"),
    "fewer values": (lambda s: replace(s, v=s.v[:-1]), "expected both"),
    "another head dim": (lambda s: replace(s, q=s.q[..., :8]), "expected both"),
    "heads that do not group": (lambda s: replace(s, q=s.q[:, :3]), "3 query heads and 2 kv heads"),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_does_not_fit_is_refused(hostile):
    change, message = HOSTILE[hostile]
    step = change(make(*CASES["composed"], heads=(4, 2, 16), window=0))
    given = step.cast(*[torch.float32] * 3)
    before = [t.clone() for t in given]
    with pytest.raises(ConfigError, match=message):
        attend.decode(*given, step.table, step.tables, step.options)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_slots_behind_the_window_are_not_read():
    step = make(*CASES["none"], heads=(4, 2, 16), window=20)
    expected = attend.decode(*step.cast(*[torch.float32] * 3), step.table, step.tables, step.options)
    got = attend.decode(*step.cast(*[torch.float32] * 3), put_slot(-1)(step).table, step.tables, step.options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_no_rows():
    step = make([3], [Request(0)], [], heads=(4, 2, 16))
    none = step.tables._replace(row=step.tables.row[:0], lens=step.tables.lens[:0])
    o, lse = attend.decode(step.q[:0].float(), *step.cast(*[torch.float32] * 3)[1:], step.table, none, step.options)
    assert o.shape == (0, 4, 16)
    assert lse.shape == (0, 4)


# ---- the operator ----


def call(step, *, dtype=torch.float32, bias=None, backend="auto", prefix=True):
    q, k, v, pk, pv = step.cast(dtype, dtype, dtype)
    o = step.options
    most = int(step.tables.lens.max())
    pair = (pk, pv) if prefix else (None, None)
    return ops.attn_decode(
        q, k, v, *pair, step.table, list(step.tables), bias, most, o.scale, o.window, o.softcap, backend, 0
    )


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_operator_runs_it(backend, monkeypatch):
    step = make(*CASES["composed"], heads=(4, 2, 16))
    monkeypatch.setattr(ops, "decode_fwd", None)
    given = step.cast(*[torch.float32] * 3)
    expected = attend.decode(*given, step.table, step.tables, step.options)
    for prefix in (True, False):
        assert all(torch.equal(a, b) for a, b in zip(call(step, backend=backend, prefix=prefix), expected, strict=True))


def test_the_reference_does_not(monkeypatch):
    monkeypatch.setattr(attend, "decode", None)
    call(make(*CASES["composed"], heads=(4, 2, 16)), backend="reference")


@pytest.mark.parametrize(
    ("reason", "how", "change"),
    [
        ("torch.float64", {"dtype": torch.float64}, lambda s: s),
        ("a position bias", {"bias": torch.zeros(4, 5)}, lambda s: s),
        ("with gaps", {}, lambda s: replace(s, k=s.k.transpose(0, 1).contiguous().transpose(0, 1))),
        ("head dims over 256", {}, lambda s: make(*CASES["one row"], heads=(2, 1, 272))),
    ],
)
def test_what_it_does_not_serve_falls_back_and_is_logged(reason, how, change, caplog, monkeypatch):
    step = change(make(*CASES["composed"], heads=(4, 2, 16)))
    monkeypatch.setattr(attend, "decode", None)
    backends.log_fallback.cache_clear()
    got = call(step, **how)
    exact = spec(step, *step.cast(*[torch.float64] * 3))
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, exact, strict=True))
    assert [r.message for r in caplog.records if "attend" in r.message and reason in r.message]


def test_without_the_extension_torch_does_it(caplog, monkeypatch):
    monkeypatch.setattr(attend, "_rust", lambda: None)
    backends.log_fallback.cache_clear()
    step = make(*CASES["composed"], heads=(4, 2, 16))
    exact = spec(step, *step.cast(*[torch.float64] * 3))
    assert relative_error(call(step)[0], exact[0]) < 1e-5
    assert "Rust extension" in caplog.text


def test_it_is_registered_properly():
    step = make(*CASES["composed"], heads=(4, 2, 16))
    o = step.options
    given = (
        *step.cast(*[torch.float32] * 3),
        step.table,
        list(step.tables),
        None,
        130,
        o.scale,
        o.window,
        o.softcap,
        "auto",
        0,
    )
    torch.library.opcheck(ops.attn_decode, given, test_utils=("test_schema", "test_faketensor"))


# ---- threads and instructions ----

PROGRAM = """
import logging, sys
import torch
from prefixfast.attention import cpu_decode as attend
from prefixfast_kernels.testing.tables import Request, decode_tables
from prefixfast_kernels.torch_sdpa_lse import Options
torch.set_num_threads(2)
logging.basicConfig(level=logging.WARNING)
g = torch.Generator().manual_seed(0)
q, k, v = torch.randn(2, 4, 64, generator=g), *torch.randn(2, 300, 4, 64, generator=g).unbind()
table = torch.arange(200, dtype=torch.int32).view(2, 100)
tables = decode_tables([100, 90], [Request(0, ((0, True),))] * 2, [(200, 99)])
o, _ = attend.decode(q, k, v, k, v, table, tables, Options(0.125, 0, 0.0))
torch.save(o, sys.argv[1])
"""


def child(path, env, program=PROGRAM):
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    return run.returncode, run.stderr


def test_the_environment_names_the_instructions(tmp_path):
    found = {}
    for name in PATHS:
        code, text = child(tmp_path / name, {"PREFIXFAST_SIMD": name})
        assert (code, text) == (0, "")
        found[name] = torch.load(tmp_path / name)
    assert all(relative_error(o, found["scalar"]) < 1e-5 for o in found.values())
    assert not torch.equal(found[PATHS[0]], found["scalar"]) or len(PATHS) == 1


@pytest.mark.parametrize("name", ["", "AVX2", "sse9"])
def test_unknown_instructions_are_an_error(name, tmp_path):
    code, text = child(tmp_path / "o", {"PREFIXFAST_SIMD": name})
    assert code == 1
    assert (
        f'ConfigError: environment variable PREFIXFAST_SIMD: instructions "{name}": this machine has {", ".join(PATHS)}'
        in text
    )


def test_without_torchs_threads_it_runs_alone(tmp_path):
    code, text = child(
        tmp_path / "o", {}, PROGRAM.replace("torch.set_num_threads(2)", "torch._C.__file__ = '/nowhere/at/all.so'")
    )
    assert code == 0
    assert text.count("decode attention runs on one thread: /nowhere/at/all.so is not loaded") == 1
    child(tmp_path / "p", {})
    assert torch.equal(torch.load(tmp_path / "o"), torch.load(tmp_path / "p"))


@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP runtime is known on Linux only")
def test_it_runs_on_torchs_threads():
    assert attend._runs_on_torchs_threads()


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
    got, same = errors(step, *dtypes, draw(st.sampled_from(PATHS)))
    assert holds(got, same, dtypes[0]), (got, same)
