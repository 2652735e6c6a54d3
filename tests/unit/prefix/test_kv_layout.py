"""Layers that share keys or differ in heads, values of another width, and prefixes whose base is refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AttentionInterface

import composed
import layered
import tiny
from parity.packed import Case, packed
from prefixfast import (
    BaseMismatchError,
    ConfigError,
    DataError,
    Engine,
    Prefix,
    PrefixStore,
    check_fits,
    generate,
    load,
    score,
    train,
)
from prefixfast.engine.kv_arena import bytes_per_row, make_arena
from prefixfast.model.prefix_shape import own_layers
from prefixfast.prefix.kv import kv_by_layer
from prefixfast.training.estimate import estimate
from token_rows import distance, rows

pytestmark = pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers")
TEXT, PROMPT = list(range(40, 47)), [3, 90, 17, 55, 8, 21, 64]
SHARED = ("gemma3n, 2 shared", "gemma4, 2 shared", "gemma4, wide sliding layers")
HOW = {"batch_size": 3, "prefix_length": 4, "max_steps": 4, "progress": False}


def own_logits(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize(
    ("name", "backend"), [*((n, "torch") for n in layered.MODELS), *((n, "reference") for n in SHARED)]
)
def test_a_prefix_from_a_text_is_the_text(name, backend):
    model = layered.make(name)
    expected = own_logits(model, TEXT + PROMPT)
    greedy = model.generate(input_ids=torch.tensor([TEXT + PROMPT]), max_new_tokens=8, do_sample=False)
    logp = expected[len(TEXT) + 3 : -1].log_softmax(-1)[range(3), PROMPT[4:]].sum().item()
    with load(model, backend=backend) as base, Engine(base, max_model_len=64, max_num_batched_tokens=5) as engine:
        first = Prefix.from_text(base, TEXT[:3])
        prefixes = [first, Prefix.from_text(base, TEXT[3:], after=first)]
        for parts in ([Prefix.from_text(base, TEXT)], prefixes, [first.concat(prefixes[1])]):
            assert composed.error(composed.logits(base, PROMPT, parts), expected[len(TEXT) :]) < 1e-5
            made = engine.generate([PROMPT, PROMPT], [parts, None], max_new_tokens=8)
            assert made[0].token_ids == greedy[0, len(TEXT + PROMPT) :].tolist()
            got = score([PROMPT[:4]], [parts], targets=[PROMPT[4:]], model=base)[0].logprob
            assert got == pytest.approx(logp, abs=1e-3)


def _with_rows(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention of one text over the rows in ``module.rows`` and its own keys."""
    k, v = (t.transpose(0, 1)[None] for t in module.rows)
    key, value = torch.cat([k, key], 2), torch.cat([v, value], 2)
    group, hidden = query.shape[1] // key.shape[1], torch.ones(query.shape[2], key.shape[2]).triu(k.shape[2] + 1).bool()
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), weights


AttentionInterface.register("with rows", _with_rows)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", layered.WITHOUT_PEFT)
def test_logits_and_gradients_are_those_of_concatenated_rows(name, backend):
    g, weights = torch.Generator().manual_seed(1), torch.rand(len(PROMPT), tiny.VOCAB, dtype=torch.float64)
    with load(layered.make(name, dtype=torch.float64), backend=backend) as base:
        kv = {f"self.{i}.{x}": (5, *row) for i, s in enumerate(base.layers) for x, row in zip("kv", s.row, strict=True)}
        prefix = Prefix({n: torch.randn(t, generator=g, dtype=torch.float64) for n, t in kv.items()}, pos_start=5)
        logits, leaves = packed(base, Case([torch.tensor(PROMPT)], [0], []), [prefix], grad=True)
        (logits * weights).sum().backward()
    model, rows = layered.make(name, dtype=torch.float64), {n: t.requires_grad_() for n, t in dict(prefix.kv).items()}
    model.set_attn_implementation("with rows")
    for module in model.modules():
        if (layer := getattr(module, "layer_idx", None)) is not None:
            module.rows = rows[f"self.{layer}.k"], rows[f"self.{layer}.v"]
    positions = torch.arange(5, 5 + len(PROMPT))[None]
    expected = model(input_ids=torch.tensor([PROMPT]), position_ids=positions, use_cache=False).logits[0]
    (expected * weights).sum().backward()
    assert composed.error(logits, expected) < 1e-6  # norms and routers of these models compute in fp32
    for layer, pair in enumerate(leaves):
        for x, t in zip("kv", pair, strict=True):
            assert composed.error(t.grad, rows[f"self.{layer}.{x}"].grad) < 1e-5


@pytest.mark.parametrize("how", [{"init": "zero", "reparameterization": "none"}, {"init": "random"}], ids=str)
@pytest.mark.parametrize("name", ["gemma3n, 2 shared", "gemma4, 2 shared"])
def test_a_trained_prefix_has_no_rows_in_layers_that_share_and_its_loss_is_that_of_peft(tmp_path, name, how):
    data = rows(1, 6)
    with load(layered.make(name)) as base:
        prefix = train(base, data, **HOW, **how)
        assert prefix.layers == (0, 1, 2, 3)
        assert [prefix.kv[f"self.{i}.k"].shape[1:] for i in range(4)] == [base.layers[i].row[0] for i in range(4)]
        ours = torch.cat([composed.logits(base, row["input_ids"], [prefix]) for row in data])
        continued = train(base, data, init=prefix, max_steps=2, batch_size=3, progress=False)
        above = train(base, data, on_top_of=prefix, **HOW, init="zero", reparameterization="none")
        assert continued.layers == above.layers == (0, 1, 2, 3)
        both = composed.logits(base, PROMPT, [prefix, above])
        assert composed.error(both, composed.logits(base, PROMPT, [prefix])) > 1e-4
    prefix.to_peft(tmp_path / "p")
    theirs = PeftModel.from_pretrained(layered.make(name), tmp_path / "p").eval()
    with torch.no_grad():
        expected = torch.cat([theirs(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in data])
    assert composed.error(ours, expected) < 1e-5


def test_training_continues_from_an_adapter_of_peft(tmp_path):
    name = "gemma4, 2 shared"
    table = tiny.peft_table(layered.make(name), 5, 1)
    tiny.with_prefix(layered.make(name), table).save_pretrained(tmp_path / "p")
    start = Prefix.from_pretrained(tmp_path / "p")
    with load(layered.make(name)) as base:
        same = train(base, rows(1, 6), init=start, max_steps=1, learning_rate=1e-12, batch_size=3, progress=False)
        assert same.layers == (0, 1, 2, 3)
        assert composed.error(composed.logits(base, PROMPT, [same]), composed.logits(base, PROMPT, [start])) < 1e-5


@pytest.mark.parametrize("name", ["deepseek_v3, short values", "jetmoe"])
def test_training_with_values_of_another_width(name):
    with load(layered.make(name)) as base:
        for kind in ("none", "mlp"):
            prefix = train(base, rows(1, 6), **HOW, init="random", reparameterization=kind)
            expected = {
                f"self.{i}.{x}": (4, *row)
                for i, s in enumerate(base.layers)
                for x, row in zip("kv", s.row, strict=True)
            }
            assert prefix.shapes == expected
            found = prefix.inspect(base, [PROMPT], words=1, rows=[0])
            assert 0 < found.mass.min() < found.mass.max() < 1
    with load(layered.make(name)) as base:
        near = Prefix.from_text(base, TEXT).inspect(base, [PROMPT], words=1).words
        assert [found[0][0] for found in near.values()] == [f"#{t}" for t in TEXT]


@pytest.mark.parametrize(
    ("name", "searched"), [("gemma4, 2 shared", [0, 1, 2, 3, 4]), (layered.WIDE_FIRST, [])], ids=str
)
def test_words_of_an_adapter_of_peft(tmp_path, name, searched):
    tiny.with_prefix(layered.make(name), tiny.peft_table(layered.make(name), 5, 1)).save_pretrained(tmp_path / "p")
    with load(layered.make(name)) as base:
        assert list(Prefix.from_pretrained(tmp_path / "p").inspect(base, [PROMPT], words=1).words) == searched


@pytest.mark.parametrize("name", ["gemma3n, 2 shared", "gemma4, 2 shared", "deepseek_v3, short values"])
def test_gradient_checkpointing_changes_nothing(name):
    how = {**HOW, "init": "random", "reparameterization": "none"}
    made = []
    for checkpointing in (False, True):
        with load(layered.make(name, dtype=torch.float64)) as base:
            made.append(train(base, rows(1, 6), **how, gradient_checkpointing=checkpointing))
    assert distance(*made) < 1e-12


@pytest.mark.parametrize("layers", [[1], [3], [0, 2]], ids=str)
@pytest.mark.parametrize("name", ["gemma3n, 2 shared", "gemma4, 2 shared"])
def test_layers_that_share_see_the_rows_of_their_source_only(name, layers):
    with load(layered.make(name)) as base:
        prefix = train(base, rows(1, 6), **HOW, init="zero", reparameterization="none", layers=layers)
        mass = prefix.inspect(base, [PROMPT], words=0).mass.amax(1)
        seeing = [i for i, s in enumerate(base.layers) if (i if s.source is None else s.source) in layers]
        assert (mass > 0).nonzero()[:, 0].tolist() == seeing
        tokens = generate([PROMPT], prefix, model=base, max_new_tokens=1)[0].token_ids
        assert tokens == [int(composed.logits(base, PROMPT, [prefix])[-1].argmax())]


def test_attention_mass_of_layers_that_share_is_that_of_peft(tmp_path):
    name, ids = "gemma3n, 2 shared", PROMPT[:6]
    theirs = tiny.with_prefix(layered.make(name), tiny.peft_table(layered.make(name), 5, 1))
    theirs.save_pretrained(tmp_path / "p")
    theirs.get_base_model().set_attn_implementation("eager")
    with torch.no_grad():
        weights = theirs(input_ids=torch.tensor([ids]), output_attentions=True).attentions
    expected = torch.stack([w[0, :, :, :5].sum(-1).mean(-1) for w in weights])
    with load(layered.make(name)) as base:
        got = Prefix.from_pretrained(tmp_path / "p").inspect(base, [ids], words=0).mass
    assert (got - expected).abs().max() < 1e-5


def test_attention_mass_of_layers_with_fewer_heads_ends_in_nan():
    with load(layered.make("laguna, fewer heads")) as base:
        found = Prefix.from_text(base, TEXT).inspect(base, [PROMPT], words=0)
    assert [int((~row.isnan()).sum()) for row in found.mass] == [4, 2, 4]
    assert "nan" not in str(found)


@pytest.mark.parametrize("name", SHARED)
def test_stored_prefixes_and_adapters_serve_by_name(tmp_path, name):
    store = PrefixStore(tmp_path / "s")
    tiny.with_prefix(layered.make(name), tiny.peft_table(layered.make(name), 5, 1)).save_pretrained(tmp_path / "p")
    with load(layered.make(name)) as base:
        prefixes = {"ours": Prefix.from_text(base, TEXT), "theirs": Prefix.from_pretrained(tmp_path / "p")}
        for n, prefix in prefixes.items():
            store.put(n, prefix)
        with Engine(base, store=store, max_model_len=64) as engine:
            named = engine.generate([PROMPT] * 2, list(prefixes), max_new_tokens=8)
            given = engine.generate([PROMPT] * 2, list(prefixes.values()), max_new_tokens=8)
            assert [g.token_ids for g in named] == [g.token_ids for g in given]
            own = [t for i, s in enumerate(base.layers) if s.source is None for t in engine.loop.arena.layers[i]]
            assert len({t.data_ptr() for kv in engine.loop.arena.layers for t in kv}) == len(own), (
                "no layer is kept twice"
            )


@pytest.mark.parametrize("name", ["gemma3n, 2 shared", "gemma4, 2 shared", "deepseek_v3, short values"])
def test_memory_and_estimates_count_the_layers_with_keys_of_their_own(name):
    how = {**HOW, "init": "zero", "reparameterization": "none"}
    with load(layered.make(name)) as base:
        prefix = train(base, rows(1, 6), **how)
        assert (
            estimate(base, rows(1, 6), **how).stored_numbers
            == prefix.num_stored
            == 4 * sum(s.row_numbers for s in base.layers)
        )
        arena = make_arena(base, 96, 2, 8)
        tensors = {t.data_ptr(): t.nbytes for kv in arena.layers for t in kv}
        assert sum(tensors.values()) == 96 * bytes_per_row(base)


def test_an_adapter_of_peft_composes_with_other_prefixes(tmp_path):
    name = "gemma4, 2 shared"
    tiny.with_prefix(layered.make(name), tiny.peft_table(layered.make(name), 5, 1)).save_pretrained(tmp_path / "p")
    table = Prefix.from_pretrained(tmp_path / "p")
    with load(layered.make(name)) as base:
        kv = kv_by_layer(table, base.layers)
        own = {f"self.{i}.{x}": t for i in own_layers(base.layers) for x, t in zip("kv", kv[i], strict=True)}
        same, text = Prefix(own, pos_start=5, base=base.fingerprint), Prefix.from_text(base, TEXT)
        for parts, expected in (([table, text], same.concat(text)), ([text, table], text.concat(same))):
            logits = composed.logits(base, PROMPT, [expected])
            assert composed.error(composed.logits(base, PROMPT, parts), logits) < 1e-5
            made = generate([PROMPT] * 2, [parts, [expected]], model=base, max_new_tokens=8)
            assert made[0].token_ids == made[1].token_ids


def test_layers_without_keys_cannot_be_asked_for():
    with load(layered.make("gemma3n, 2 shared")) as base:
        with pytest.raises(ConfigError, match="layer 5 reads the keys of layer 3"):
            train(base, rows(1, 6), **HOW, init="zero", layers=[1, 5])
        prefix = Prefix.from_text(base, TEXT)
        dead = {f"self.5.{x}": prefix.kv[f"self.3.{x}"] for x in "kv"}
        with pytest.raises(BaseMismatchError, match="layer 5 of this base reads the keys of layer 3"):
            check_fits(base, Prefix({**prefix.kv, **dead}, pos_start=7, base=base.fingerprint))


def test_an_adapter_of_another_width_does_not_fit(tmp_path):
    name = "gemma4, 2 shared"
    for fields in (
        {"global_head_dim": 32},
        {"num_hidden_layers": 4, "layer_types": [layered.SLIDING, layered.FULL] * 2},
    ):
        model = tiny.randomize(layered._gemma4(num_kv_shared_layers=2, **fields))
        tiny.with_prefix(model, tiny.peft_table(model, 5, 1)).save_pretrained(tmp_path / "p")
        with load(layered.make(name)) as base, pytest.raises(BaseMismatchError, match="trained on another model"):
            check_fits(base, Prefix.from_pretrained(tmp_path / "p"))


# ---- what PEFT cannot hold ----


def peft_fails(name: str, length: int) -> bool:
    """Whether PEFT raises for a prefix of the base."""
    peft = get_peft_model(layered.make(name), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length))
    ids = torch.tensor([PROMPT])
    try:
        peft(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return True
    return False


@pytest.mark.parametrize("name", [*layered.WITHOUT_PEFT, *layered.SKIPPED])
def test_prefixes_that_peft_cannot_hold_are_refused_with_the_reason(tmp_path, name):
    with load(layered.make(name)) as base:
        prefix = Prefix.from_text(base, TEXT)
    reason = prefix.peft_incompatibility
    assert reason is not None
    with pytest.raises(ConfigError, match="PEFT cannot hold this prefix exactly"):
        prefix.to_peft(tmp_path / "p")
    prefix.save_pretrained(tmp_path / "p")
    again = Prefix.from_pretrained(tmp_path / "p")
    assert (again.digest, again.peft_incompatibility) == (prefix.digest, reason)
    table = {tuple(t.shape[1:]) for t in prefix.kv.values()}
    assert len(table) > 1 or peft_fails(name, len(TEXT)) or name == "jetmoe"


DAMAGED = {
    "not a mapping": [1],
    "no layers": {"layers": [], "peft": [2, 8]},
    "a source that comes later": {"layers": [[2, 8, 8, 1], [2, 8, 8, 1]], "peft": [2, 8]},
    "a source that reads another": {"layers": [[2, 8, 8, 0], [2, 8, 8, 0], [2, 8, 8, 1]], "peft": [2, 8]},
    "three numbers": {"layers": [[2, 8, 0]], "peft": [2, 8]},
    "no rows": {"layers": [[2, 8, 8, 0]], "peft": [0, 8]},
    "text": {"layers": "abcd", "peft": [2, 8]},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_layout_is_a_data_error(tmp_path, make_prefix, kind):
    make_prefix(base={"name": "x"}).save_pretrained(tmp_path / "p")
    path = tmp_path / "p" / "prefixfast.json"
    meta = json.loads(path.read_text(encoding="utf8"))
    meta["base"]["kv_layout"] = DAMAGED[kind]
    path.write_text(json.dumps(meta), encoding="utf8")
    with pytest.raises(DataError, match="kv_layout"):
        Prefix.from_pretrained(tmp_path / "p")


# ---- bases that are refused now ----


@pytest.mark.parametrize("kind", ["falcon_h1", "bart", "bloom", "no_such_family"])
def test_a_prefix_of_a_refused_base_loads_exports_and_converts(tmp_path, cli, make_prefix, kind):
    base = {
        "name": "ann/base",
        "config": {"model_type": kind, "num_hidden_layers": 3},
        "tokenizer": None,
        "weights": "0",
    }
    prefix = make_prefix(base=base)
    prefix.save_pretrained(tmp_path / "p")
    assert Prefix.from_pretrained(tmp_path / "p").digest == prefix.digest
    store = PrefixStore(tmp_path / "s")
    store.put("ann", Prefix.from_pretrained(tmp_path / "p"))
    assert store.get("ann").digest == prefix.digest
    store.get("ann").to_peft(tmp_path / "peft")
    assert Prefix.from_pretrained(tmp_path / "peft").kv.keys() == prefix.kv.keys()
    assert cli("convert", tmp_path / "p", tmp_path / "out", "--verify").code == 0
    assert cli("prefixes", "export", tmp_path / "s", tmp_path / "all").code == 0
    assert cli("prefixes", "show", tmp_path / "s", "ann").code == 0
    assert store.get("ann").concat(make_prefix(5, base=base)).length == 2 * prefix.length
