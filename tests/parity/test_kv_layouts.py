"""PEFT adapters of models whose layers share keys or differ in their heads: import, training and export."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel

import composed
import layered
import tiny
from parity.packed import Case, packed, unpacked
from parity.test_generate import GAP, alone, sequence_score
from parity.test_hf_cache import padded
from prefixfast import Engine, HFCache, Prefix, load, score
from prefixfast.prefix import peft_format

pytestmark = pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers")  # PEFT names the skipped layers
TOLERANCE = 1e-5
LENGTHS, CHOICE = (7, 4, 1, 20, 6, 11), (0, 1, 0, 0, None, 1)
NAMES = tuple(layered.WITH_PEFT)


def prompts(lengths=LENGTHS) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(11)
    return [torch.randint(3, tiny.VOCAB, (n,), generator=g) for n in lengths]


@functools.cache
def tables(name: str) -> list[torch.Tensor]:
    return [tiny.peft_table(layered.make(name), n, seed) for n, seed in ((5, 1), (3, 2))]


@functools.cache
def adapters(name: str) -> list:
    """PEFT's models with each adapter, and the model without one."""
    return [tiny.with_prefix(layered.make(name), t) for t in tables(name)] + [layered.make(name)]


@pytest.fixture
def imported(tmp_path):
    def read(name: str) -> list[Prefix]:
        for i, theirs in enumerate(adapters(name)[:-1]):
            theirs.save_pretrained(tmp_path / str(i))
        return [Prefix.from_pretrained(tmp_path / str(i)) for i in range(2)]

    return read


def peft_logits(theirs, ids: torch.Tensor, pos_start: int | None = None) -> torch.Tensor:
    """Logits of PEFT for one prompt. PEFT adds the length of the prefix to given positions."""
    length = 0 if not hasattr(theirs, "prompt_tokens") else len(theirs.prompt_tokens["default"])
    start = 0 if pos_start is None else pos_start - length
    positions = torch.arange(start, start + len(ids))[None]
    return theirs(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], position_ids=positions).logits[0]


@pytest.mark.parametrize("start", ["after", "zero"])
@pytest.mark.parametrize("name", [*NAMES, *layered.SKIPPED])
@torch.no_grad()
def test_logits_of_a_mixed_batch_equal_peft(imported, name, start):
    own = imported(name)
    if start == "zero":
        own = [Prefix(p.kv, pos_start=0) for p in own]
    batch = prompts((7, 4, 1, 36, 6, 27))
    case = Case(batch, [-1 if c is None else c for c in CHOICE], tables(name))
    with load(layered.make(name)) as base:
        got, _ = packed(base, case, own)
        without, _ = packed(base, case, own, drop=0)
    pos = [None if c is None else own[c].pos_start for c in CHOICE]
    models = [adapters(name)[-1 if c is None else c] for c in CHOICE]
    expected = torch.cat([peft_logits(m, ids, p) for m, ids, p in zip(models, batch, pos, strict=True)])
    assert composed.error(got, expected) < TOLERANCE
    assert composed.error(without, expected) > 1000 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_peft(imported, name):
    own, batch = imported(name), prompts((7, 4, 1, 36, 6, 27))
    case = Case(batch, [-1 if c is None else c for c in CHOICE], tables(name))
    weights = [torch.rand(len(ids), generator=torch.Generator().manual_seed(9)) for ids in batch]
    make = functools.partial(layered.make, name, dtype=torch.float64)  # fp32 rounding alone gives 2e-5 in Gemma 4
    _, expected = unpacked(make, case, weights=[w.double() for w in weights])
    with load(make()) as base:
        logits, leaves = packed(base, case, own, grad=True)
        targets = torch.cat([ids.roll(-1) for ids in batch])
        (F.cross_entropy(logits, targets, reduction="none") * torch.cat(weights).double()).sum().backward()
        first = 0
        for table, gradient in zip(case.tables, expected, strict=True):
            rows = slice(first, first := first + len(table))
            own_layers = [i for i, s in enumerate(base.layers) if s.source is None]
            part = {f"self.{i}.{x}": t.grad[rows] for i in own_layers for x, t in zip("kv", leaves[i], strict=True)}
            got = peft_format.to_table(part, base.fingerprint).double()
            assert composed.error(got, gradient) < TOLERANCE


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", [*NAMES, *layered.SKIPPED])
def test_tokens_of_a_mixed_batch_equal_those_of_each_request_alone(imported, name, beams):
    own, how = imported(name), {"num_beams": beams, "max_new_tokens": 16}
    chosen = [None if c is None else own[c] for c in CHOICE]
    with Engine(layered.make(name), max_num_seqs=64, max_model_len=64, max_num_batched_tokens=30) as engine:
        got = engine.generate([ids.tolist() for ids in prompts()], chosen, **how)
    for g, ids, c in zip(got, prompts(), CHOICE, strict=True):
        theirs = adapters(name)[-1 if c is None else c]
        expected = alone(theirs, ids, **how)
        if g.token_ids != expected:
            gap = [sequence_score(theirs, ids, t, 1.0) for t in (g.token_ids, expected)]
            assert abs(gap[0] - gap[1]) < GAP, (g.token_ids, expected, gap)


@pytest.mark.parametrize("name", NAMES)
def test_unmodified_generate_gives_peft_tokens(imported, name):
    own, how = imported(name), {"max_new_tokens": 12, "do_sample": False}
    chosen, batch = [None if c is None else own[c] for c in CHOICE], prompts()
    expected = [
        alone(adapters(name)[-1 if c is None else c], ids, max_new_tokens=12)
        for c, ids in zip(CHOICE, batch, strict=True)
    ]
    with load(layered.make(name)) as base, HFCache(base, chosen, max_len=64) as cache:
        out = base.hf.generate(**padded(batch), past_key_values=cache, **how)[:, max(LENGTHS) :].tolist()
    assert [row[: row.index(tiny.EOS) + 1] if tiny.EOS in row else row for row in out] == expected


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_peft(imported, name):
    (prefix, _), ids = imported(name), prompts((27,))[0]
    with torch.no_grad():
        logp = peft_logits(adapters(name)[0], ids)[:-1].log_softmax(-1).gather(1, ids[1:, None])[6:].sum().item()
    with load(layered.make(name)) as base:
        got = score([ids[:7].tolist()], prefix, targets=[ids[7:].tolist()], model=base)[0].logprob
    assert got == pytest.approx(logp, abs=1e-3)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "CARTRIDGE"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_exports_give_equal_logits_in_peft_and_come_back(tmp_path, name, kind):
    ids = prompts((27,))[0]
    with load(layered.make(name)) as base:
        prefix = Prefix.from_text(base, list(range(40, 47)))
        assert prefix.layers == tuple(i for i, s in enumerate(base.layers) if s.source is None)
        ours = composed.logits(base, ids, [prefix])
        prefix.save_pretrained(tmp_path / "saved")
        again = Prefix.from_pretrained(tmp_path / "saved")
        assert again.digest == prefix.digest
        again.to_peft(tmp_path / "peft", peft_type=kind)
        back = Prefix.from_pretrained(tmp_path / "peft")
        assert composed.error(composed.logits(base, ids, [back]), ours) < TOLERANCE
    theirs = PeftModel.from_pretrained(layered.make(name), tmp_path / "peft").eval()
    assert composed.error(peft_logits(theirs, ids), ours) < TOLERANCE
    back.to_peft(tmp_path / "again")
    same = "adapter_model.safetensors"
    assert (tmp_path / "again" / same).read_bytes() == (tmp_path / "peft" / same).read_bytes()


@pytest.mark.parametrize("name", [*NAMES, *layered.SKIPPED])
def test_an_imported_adapter_is_kept_to_the_bit(imported, tmp_path, name):
    imported(name)[0].to_peft(tmp_path / "back")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "0" / file).read_bytes()
