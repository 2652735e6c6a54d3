"""Trained weights in `generate`, `score`, `Engine` and the command line, and their folders."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from prefixfast import (
    BaseMismatchError,
    ConfigError,
    DataError,
    Engine,
    MethodConfig,
    Prefix,
    RequestError,
    TunedWeights,
    generate,
    load,
    score,
    train,
)
from prefixfast.model.tuned import blocks
from token_rows import rows

DATA = rows(0, 6)
PROMPTS = [[5, 6, 7], [8, 9], [10]]
HOW = {"batch_size": 3, "max_steps": 8, "learning_rate": 3e-2}


@pytest.fixture(scope="module")
def base():
    with load(tiny.make("gpt2")) as loaded:
        yield loaded


@pytest.fixture(scope="module", params=["full", "top2"])
def weights(base, request):
    return train(base, DATA, method=request.param, **HOW)


@pytest.fixture
def tuned_model(weights):
    """A model that has the weights for good."""
    model = tiny.make("gpt2")
    model.load_state_dict(dict(weights.tensors), strict=False)
    return model


def texts(found):
    return [g.token_ids for g in found]


def test_results_are_those_of_a_model_that_has_the_weights(base, weights, tuned_model):
    how = {"max_new_tokens": 6, "num_beams": 2}
    with load(tuned_model) as own:
        expected = texts(generate(PROMPTS, model=own, **how))
        scores = [s.logprob for s in score(PROMPTS, model=own, targets=[[4, 5]] * 3)]
    alone = texts(generate(PROMPTS, model=base, **how))
    found = generate(PROMPTS, weights, model=base, **how)
    assert texts(found) == expected != alone
    assert {g.prefix_digest for g in found} == {weights.digest}
    got = score(PROMPTS, weights, model=base, targets=[[4, 5]] * 3)
    assert [s.logprob for s in got] == pytest.approx(scores)
    assert texts(generate(PROMPTS, model=base, **how)) == alone
    with Engine(base, share_prompts=2) as engine:
        for _ in range(2):
            assert texts(engine.generate(PROMPTS, weights, **how)) == expected
            assert texts(engine.generate(PROMPTS, **how)) == alone
        engine.submit(PROMPTS[0], max_new_tokens=2).result()
        with pytest.raises(ConfigError, match="engine with a thread"):
            engine.generate(PROMPTS, weights, **how)


def test_the_base_has_its_own_memory_after_a_call_and_after_an_error(base, weights):
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in base.hf.named_parameters()}

    def fails(ids, logits):
        raise RuntimeError

    generate(PROMPTS, weights, model=base, max_new_tokens=2)
    with pytest.raises(RuntimeError):
        generate(PROMPTS, weights, model=base, max_new_tokens=2, logits_processor=[fails])
    for n, p in base.hf.named_parameters():
        assert p.data_ptr() == before[n][0]
        assert torch.equal(p, before[n][1])


def test_weights_beside_prefixes_are_refused(base, weights):
    prefix = Prefix.from_text(base, [4, 5])
    for given in ([weights] * 3, [None, prefix, weights], [[prefix, weights]] * 3):
        with pytest.raises(RequestError, match="change the base for all requests"):
            generate(PROMPTS, given, model=base, max_new_tokens=2)
    with pytest.raises(RequestError, match="change the base for all requests"):
        generate([{"input_ids": [4], "prefix": "a"}], {"a": weights}, model=base, max_new_tokens=2)
    with Engine(base) as engine, pytest.raises(RequestError, match="change the base for all requests"):
        engine.submit(PROMPTS[0], weights)


def test_weights_of_another_base_are_refused(weights):
    with load(tiny.make("gpt2", seed=1)) as other, pytest.raises(BaseMismatchError):
        generate(PROMPTS, weights, model=other, max_new_tokens=2)


def test_a_folder_holds_the_weights_to_the_bit(weights, tmp_path):
    weights.save_pretrained(tmp_path / "w")
    found = TunedWeights.from_pretrained(tmp_path / "w")
    assert (found.digest, found.fields) == (weights.digest, weights.fields)
    assert all(torch.equal(t, weights.tensors[n]) for n, t in found.tensors.items())
    with pytest.raises(DataError, match=r"TunedWeights\.from_pretrained"):
        Prefix.from_pretrained(tmp_path / "w")


def damage_meta(change):
    def damage(folder):
        meta = json.loads((folder / "prefixfast.json").read_text())
        change(meta)
        (folder / "prefixfast.json").write_text(json.dumps(meta))

    return damage


def damage_tensors(change):
    def damage(folder):
        tensors = load_file(folder / "tuned.safetensors")
        change(tensors, next(iter(tensors)))
        save_file(tensors, folder / "tuned.safetensors")

    return damage


def cut(folder):
    path = folder / "tuned.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


DAMAGES = {
    "no file": lambda folder: (folder / "tuned.safetensors").unlink(),
    "no meta": lambda folder: (folder / "prefixfast.json").unlink(),
    "cut": cut,
    "no JSON": lambda folder: (folder / "prefixfast.json").write_text("{"),
    "a list": lambda folder: (folder / "prefixfast.json").write_text("[]"),
    "version": damage_meta(lambda m: m.update(version=2)),
    "method": damage_meta(lambda m: m.update(method="other")),
    "method of a number": damage_meta(lambda m: m.update(method=3)),
    "options": damage_meta(lambda m: m.update(options=None)),
    "base": damage_meta(lambda m: m.update(base={"name": 3})),
    "training": damage_meta(lambda m: m["training"].update(num_trained=-1)),
    "unknown key": damage_meta(lambda m: m.update(more=1)),
    "missing key": damage_meta(lambda m: m.pop("task")),
    "digest": damage_meta(lambda m: m.update(digest="0" * 64)),
    "other numbers": damage_tensors(lambda t, n: t[n].add_(1)),
    "not finite": damage_tensors(lambda t, n: t[n].view(-1)[:1].fill_(float("nan"))),
    "integers": damage_tensors(lambda t, n: t.update({n: t[n].int()})),
    "one tensor less": damage_tensors(lambda t, n: t.pop(n)),
    "empty": damage_tensors(lambda t, n: [t.pop(name) for name in list(t)]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused(base, tmp_path, name):
    tensors = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    TunedWeights(tensors, "full", base=base.fingerprint).save_pretrained(tmp_path / "w")
    DAMAGES[name](tmp_path / "w")
    with pytest.raises(DataError):
        TunedWeights.from_pretrained(tmp_path / "w")


@pytest.mark.parametrize("tensors", [{"a": torch.ones(3)}, {"transformer.wte.weight": torch.ones(2, 2)}])
def test_weights_that_do_not_fit_the_base_are_refused(base, tensors):
    with pytest.raises(ConfigError, match="does not fit"):
        generate(PROMPTS, TunedWeights(tensors, "full"), model=base, max_new_tokens=2)


@pytest.mark.parametrize("method", ["full", "top2"])
def test_a_part_of_the_weights_is_refused(base, method):
    weights = train(base, DATA, method=method, **HOW)
    tensors = dict(weights.tensors)
    tensors.pop("transformer.h.2.mlp.c_fc.weight")
    with pytest.raises(ConfigError, match="are missing"):
        generate(PROMPTS, TunedWeights(tensors, method), model=base, max_new_tokens=2)


def test_adapters_are_checked_once_for_a_base(monkeypatch):
    with load(tiny.make("gpt2")) as model:
        weights = train(model, DATA, method="adapter", **HOW)
        expected = texts(generate(PROMPTS, weights, model=model, max_new_tokens=4))
        monkeypatch.setattr(blocks, "packed_forward", None)
        assert texts(generate(PROMPTS, weights, model=model, max_new_tokens=4)) == expected


@pytest.mark.parametrize("name", MethodConfig.names())
def test_options_of_methods_are_keyword_arguments_only(name):
    for argument in ("config", "prefix_config"):
        with pytest.raises(ConfigError, match="keyword argument of train"):
            train("nowhere", DATA, **{argument: {name: getattr(MethodConfig(), name)}})


def test_infix_by_method_and_by_position_are_one_training(base):
    how = HOW | {"prefix_length": 2, "init": "random"}
    by_method, by_position = train(base, DATA, method="infix", **how), train(base, DATA, position="infix", **how)
    assert by_method.digest == by_position.digest
    assert by_method.training["identity"] == by_position.training["identity"]
