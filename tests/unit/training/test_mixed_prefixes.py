"""Prefixes with other sites, lengths and layers share the batches, and each equals the prefix that is trained alone."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

import tiny
from cut_runs import Cut, CutAt
from prefixfast import ConfigError, PrefixStore, load
from prefixfast.training.estimate import estimate
from prefixfast.training.methods import prefix as method
from prefixfast.training.trainer import train
from seq2seq import SITES, make_seq2seq, rows
from token_rows import distance
from token_rows import rows as decoder_rows

DROPS = {"prefix_dropout": 0.2, "encoder_hidden_size": 8}
OWN = {
    "three": {"prefix_length": {"enc": 3, "self": 5, "cross": 2}, "weight_decay": 0.05, "frozen_rows": 1, **DROPS},
    "decoder": {"prefix_length": {"self": 4}, "max_grad_norm": 0.1, "layers": [1]},
    "encoder": {"prefix_length": {"enc": 2, "cross": 4}, "learning_rate": 3e-2, "max_steps": 3, "batch_size": 3},
    "again": {"prefix_length": {"self": 4}, "max_grad_norm": 0.1, "layers": [1], "seed": 5, "learning_rate": 2e-2},
}
HOW = {"init": "random", "learning_rate": 1e-2, "max_steps": 4, "batch_size": 2, "logging_steps": 1, "seed": 3}
KINDS = {
    "flat": dict.fromkeys(OWN, "none"),
    "mlp": dict.fromkeys(OWN, "mlp"),
    "both": {"three": "mlp", "decoder": "none", "encoder": "auto", "again": "none"},
}


DATA = {name: rows(i, 3 + i) for i, name in enumerate(OWN)}
HELD_OUT = {name: rows(20 + i, 3) for i, name in enumerate(OWN)}
# With gradient accumulation, since the tokens of a step are more than those of a forward pass.
EVALUATED = {**HOW, "token_budget": 40, "eval_data": HELD_OUT, "eval_steps": 1}


@pytest.fixture(scope="module")
def bart():
    with load(make_seq2seq("bart").double()) as model:
        yield model


@pytest.fixture(scope="module")
def gpt2():
    with load(tiny.make("gpt2", dtype=torch.float64)) as model:
        yield model


class Losses:
    """Callback that keeps the training losses of each step by name."""

    def __init__(self) -> None:
        self.names, self.by_step = [], []

    def on_train_begin(self, names, steps):
        self.names.append(list(names))

    def on_step(self, step, losses, grad_norms, active):
        numbers = active.nonzero()[:, 0].tolist()
        self.by_step.append({self.names[0][i]: [float(losses[i]), float(grad_norms[i])] for i in numbers})

    def of(self, name):
        return torch.tensor([step[name] for step in self.by_step if name in step])


def overrides(kind="flat"):
    return {name: own | {"reparameterization": KINDS[kind][name]} for name, own in OWN.items()}


ALONE = {}  # finished runs of one name, which tests share


def alone(model, how, name, options):
    """The prefix of a run of one name, with its losses and gradient norms by step."""
    given = {n: v for n, v in how.items() if n != "eval_data"} | options
    if "eval_data" in how:
        given["eval_data"] = {name: how["eval_data"][name]}
    key = id(model), name, repr(given)
    if key not in ALONE:
        seen = Losses()
        ALONE[key] = train(model, {name: DATA[name]}, callbacks=[seen], **given)[name], seen.of(name)
    return ALONE[key]


def worst(model, how, own):
    """Largest difference of tensors, losses and gradient norms between one run of all names and a run of each."""
    seen = Losses()
    together = train(model, DATA, overrides=own, callbacks=[seen], **how)
    assert seen.names == [list(OWN)]
    found = []
    for name, options in own.items():
        prefix, (one, steps) = together[name], alone(model, how, name, options)
        assert (prefix.sites, prefix.length, prefix.pos_start) == (one.sites, one.length, one.pos_start)
        assert (prefix.num_trained, set(prefix.kv)) == (one.num_trained, set(one.kv))
        assert prefix.training["identity"] == one.training["identity"]
        assert len(seen.of(name)) == len(steps) == one.training["metrics"]["steps"]
        found += [distance(prefix, one), float((seen.of(name) - steps).abs().max())]
        metrics = (p.training["metrics"] for p in (prefix, one))
        found += [abs(a - b) for a, b in zip(*(m.values() for m in metrics), strict=True)]
    return max(found)


@pytest.mark.parametrize("kind", ["both", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("flat", "mlp"))])
def test_prefixes_with_other_sites_equal_their_own_runs(bart, kind):
    assert worst(bart, EVALUATED, overrides(kind)) < 1e-9


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.long) for kind in KINDS])
@pytest.mark.parametrize("name", ["m2m_100", "t5"])
def test_other_families_and_gradient_checkpointing(name, kind):
    with load(make_seq2seq(name).double()) as model:
        assert worst(model, {**HOW, "gradient_checkpointing": True}, overrides(kind)) < 1e-9


@pytest.mark.long
def test_prefixes_in_fp32_equal_their_own_runs():
    with load(make_seq2seq("bart")) as model:
        assert worst(model, HOW, overrides()) < 1e-5


@pytest.mark.long
def test_a_frozen_prefix_stands_before_all(bart):
    frozen = train(bart, rows(9), prefix_length={"self": 2, "cross": 3}, max_steps=1, **STILL)
    assert worst(bart, {**HOW, "on_top_of": frozen}, overrides("both")) < 1e-9


STILL = {"init": "random", "reparameterization": "none", "learning_rate": 1e-15}


def swapped(table):
    """Table in which the two prefixes with most rows have each other's."""
    two = np.argsort(table[0, :, 1])[-2:]
    table[:, two, :2] = table[:, two[::-1], :2]


def taken(table):
    """Table in which prefixes without rows have those of another one."""
    has = table[0, :, 1] > 0
    table[:, ~has, :2] = table[:, has.argmax(), None, :2]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("change", [swapped, taken])
def test_planted_rows_of_another_prefix_are_seen(bart, monkeypatch, site, change):
    real = method._rows

    def planted(data, blocks, at):
        made = real(data, blocks, at)
        if at == site and len(data.group.jobs) > 1:
            change(made.table)
        return made

    monkeypatch.setattr(method, "_rows", planted)
    assert worst(bart, EVALUATED, overrides("both")) > 1e-2


def test_exchanged_owners_of_the_numbers_are_seen(bart, monkeypatch):
    real = method._owners

    def exchanged(block, count, model):
        owners = real(block, count, model)
        return owners if owners is None else owners.flip(0)

    monkeypatch.setattr(method, "_owners", exchanged)
    assert worst(bart, EVALUATED, overrides("both")) > 1e-2


def test_a_step_is_one_forward_of_encoder_and_decoder(bart, caplog):
    caplog.set_level("INFO")
    count = Counter()
    stacks = {"encoder": bart.hf.get_encoder(), "decoder": bart.hf.get_decoder()}
    hooks = [m.register_forward_hook(lambda *_, n=name: count.update([n])) for name, m in stacks.items()]
    try:
        run = train(bart, DATA, overrides=overrides("both"), **HOW)
    finally:
        for hook in hooks:
            hook.remove()
    assert len({p.sites for p in run.values()}) == 3
    assert count == {"encoder": HOW["max_steps"], "decoder": HOW["max_steps"]}
    assert "4 prefixes of 4 to 10 prefix rows (enc 0 to 3, self 0 to 5, cross 0 to 4) each" in caplog.text


def test_early_stopping_of_one_prefix_leaves_the_others(bart):
    own = overrides("both")
    own["decoder"] |= {"learning_rate": 1e-30, "early_stopping_patience": 1}
    assert worst(bart, EVALUATED, own) < 1e-9
    stopped, _ = alone(bart, EVALUATED, "decoder", own["decoder"])
    assert stopped.training["metrics"]["steps"] < HOW["max_steps"]


# ---- checkpoints ----


def test_a_resumed_run_equals_an_uninterrupted_one(bart, tmp_path):
    how = {**HOW, "overrides": overrides("both"), "eval_data": HELD_OUT, "eval_steps": 2, "save_steps": 1}
    whole = train(bart, DATA, **how)
    with pytest.raises(Cut):
        train(bart, DATA, output_dir=tmp_path, callbacks=[CutAt(4)], **how)
    resumed = train(bart, DATA, output_dir=tmp_path, resume=True, **how)
    assert {n: p.digest for n, p in resumed.items()} == {n: p.digest for n, p in whole.items()}
    other = {**how["overrides"], "again": {**OWN["again"], "prefix_length": {"self": 3}}}
    with pytest.raises(ConfigError, match="own prefix_config"):
        train(bart, DATA, output_dir=tmp_path, resume=True, **{**how, "overrides": other})


@pytest.mark.parametrize("gone", ["decoder", pytest.param("three", marks=pytest.mark.long)])
def test_the_others_go_on_when_one_is_deleted_from_the_store(bart, tmp_path, gone):
    how = {**HOW, "overrides": overrides("both"), "store": tmp_path, "save_steps": 1, "eval_data": HELD_OUT}
    whole = train(bart, DATA, **{**how, "store": None})
    with pytest.raises(Cut):
        train(bart, DATA, callbacks=[CutAt(3)], **how)
    PrefixStore(tmp_path).delete(gone)
    left = {n: r for n, r in DATA.items() if n != gone}
    only = {n: {k: v for k, v in how[n].items() if k != gone} for n in ("overrides", "eval_data")}
    seen = Losses()
    run = train(bart, left, resume=True, callbacks=[seen], **{**how, **only})
    assert max(distance(p, whole[n]) for n, p in run.items()) < 1e-9
    assert len(seen.by_step) == HOW["max_steps"] - 2, "training went on from the checkpoint"
    assert train(bart, left, resume=True, **{**how, **only}).unchanged == tuple(left)


# ---- decoder-only bases, initial values, limits ----


DECODER_ONLY = [{"reparameterization": "none"}, {"position": "infix"}, {}]


@pytest.mark.parametrize("more", ["on_top_of", *(pytest.param(more, marks=pytest.mark.long) for more in DECODER_ONLY)])
def test_lengths_and_layers_of_decoder_only_prefixes_share_the_batches(gpt2, more):
    data = {n: decoder_rows(i, 4) for i, n in enumerate("abc")}
    own = {"a": {"prefix_length": 2}, "b": {"prefix_length": 5, "layers": [0, 2]}, "c": {"pos_start": "zero"}}
    if more == "on_top_of":
        more = {more: train(gpt2, decoder_rows(8, 3), prefix_length=3, max_steps=1, **STILL)}
    how = {**HOW, "encoder_hidden_size": 8, "prefix_length": 4, **more}
    seen = Losses()
    run = train(gpt2, data, overrides=own, callbacks=[seen], **how)
    assert len(seen.names) == 1
    for name, options in own.items():
        assert distance(train(gpt2, data[name], **{**how, **options}), run[name]) < 1e-9


@pytest.mark.long
def test_embeddings_of_other_lengths_share_the_batches(gpt2):
    data = {n: decoder_rows(i, 4) for i, n in enumerate("ab")}
    how = {"method": "embedding", "max_steps": 3, "init": "random"}
    run = train(gpt2, data, overrides={"a": {"prefix_length": 2}, "b": {"prefix_length": 4}}, **how)
    for name, length in zip("ab", (2, 4), strict=True):
        assert distance(train(gpt2, data[name], prefix_length=length, **how), run[name]) < 1e-9


def test_initial_prefixes_keep_their_sites_lengths_and_windows(bart):
    first = {name: alone(bart, EVALUATED, name, own)[0] for name, own in overrides("both").items()}
    first["again"] = dataclasses.replace(first["again"], window="always")
    how = {k: v for k, v in HOW.items() if k != "init"} | {"frozen_rows": 0}
    run = train(bart, DATA, init=first, **how)
    for name, prefix in run.items():
        given = first[name]
        assert (prefix.sites, prefix.length, prefix.window) == (given.sites, given.length, given.window)
    for name in ("three", "again"):
        assert distance(train(bart, DATA[name], init=first[name], **how), run[name]) < 1e-9
    with pytest.raises(ConfigError, match="prefix_length: the prefix in init has"):
        train(bart, DATA, init=first, overrides={"three": {"prefix_length": 9}}, **how)


def test_rows_are_limited_by_the_prefix_that_they_belong_to(bart):
    long = [{"input_ids": [5] * 9, "labels": [6] * 60}, *rows(1)]
    sweep = {"prefix_length": [2, 5]}
    run = train(bart, long, sweep=sweep, overflow="truncate", max_steps=2, **STILL)
    assert [m["truncated_rows"] for m in run.metrics.values()] == [0, 1]
    run = train(bart, {"it": long}, sweep=sweep, max_steps=2, **STILL)
    assert list(run) == ["it,prefix_length=2"]
    assert "prefix 'it', row 0: the target has 60 tokens, at most 59 fit" in run.failed["it,prefix_length=5"]


def test_the_estimate_is_that_of_the_largest_prefix(bart):
    found = estimate(bart, DATA, overrides=overrides(), **HOW)
    alone = estimate(bart, DATA["three"], **{**HOW, **OWN["three"], "reparameterization": "none"})
    assert (found.sites, found.stored_numbers, found.trained_numbers) == (
        *(getattr(alone, n) for n in ("sites", "stored_numbers", "trained_numbers")),
    )
    assert found.prefixes == 4


def test_places_cannot_be_mixed(gpt2):
    data = {n: decoder_rows(i, 4) for i, n in enumerate("ab")}
    places = zip("ab", ("prefix", "infix"), strict=True)
    first = {n: train(gpt2, data[n], position=p, max_steps=1, **STILL) for n, p in places}
    with pytest.raises(ConfigError, match="one position"):
        train(gpt2, data, init=first, max_steps=1)
    with pytest.raises(ConfigError, match="unknown option 'position'"):
        train(gpt2, data, overrides={"a": {"position": "infix"}}, max_steps=1)
