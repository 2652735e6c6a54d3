"""Prefixes in some layers only: training, folders, store, PEFT, generation, scores and the command line."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from peft import PeftModel

import composed
import tiny
from prefixfast import (
    BaseMismatchError,
    ConfigError,
    Engine,
    Prefix,
    PrefixConfig,
    PrefixStore,
    check_fits,
    generate,
    score,
    train,
)
from prefixfast.attention.plan import PrefixUse, training_plan
from prefixfast.prefix.kv import kv_by_layer, row_table
from prefixfast.prefix.model_card import model_card
from prefixfast.training.estimate import estimate
from prefixfast.training.parameters import ParameterOptions, PrefixParameters
from token_rows import distance, rows

HOW = {"batch_size": 3, "prefix_length": 4, "init": "random", "max_steps": 5, "progress": False}
KINDS = {
    "flat": {"reparameterization": "none", "learning_rate": 2e-2},
    "mlp": {"reparameterization": "mlp", "encoder_hidden_size": 16, "learning_rate": 5e-3},
    "dropped and frozen": {
        "reparameterization": "none",
        "learning_rate": 2e-2,
        "prefix_dropout": 0.3,
        "frozen_rows": 1,
    },
}
DATA = {"a": rows(1, 6), "b": rows(2, 5), "c": rows(3, 7)}


@pytest.fixture(scope="module")
def model():
    from prefixfast import load

    with load(tiny.make("llama", dtype=torch.float64)) as made:
        yield made


def names(*layers: int) -> set[str]:
    return {f"self.{i}.{x}" for i in layers for x in "kv"}


def loss(model, prefixes, data) -> float:
    lost = []
    for row in data:
        ids = torch.tensor(row["input_ids"])
        at = torch.tensor([i for i, t in enumerate(row["labels"]) if t != -100])
        lost.append(
            torch.nn.functional.cross_entropy(
                composed.logits(model, row["input_ids"], prefixes)[at - 1], ids[at], reduction="none"
            )
        )
    return float(torch.cat(lost).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_only_these_layers_are_trained(model, kind):
    how = {**HOW, **KINDS[kind], "layers": [2, 0]}
    run = train(model, DATA, **how)
    for name, prefix in run.items():
        assert set(prefix.kv) == names(0, 2)
        assert (prefix.layers, prefix.length, prefix.pos_start) == ((0, 2), 4, 4)
        assert distance(train(model, DATA[name], **how), prefix) < 1e-9
        before, after = (
            loss(model, [p], DATA[name])
            for p in (train(model, DATA[name], **{**how, "max_steps": 1, "learning_rate": 1e-9}), prefix)
        )
        assert after < before - 0.01
    assert json.loads(json.dumps(run["a"].training["prefix_config"]))["layers"] == [0, 2]


def test_gradients_of_the_layers_with_rows(model):
    """The gradient in one direction is compared to central differences."""
    start = train(model, DATA["a"], **HOW, **KINDS["flat"], layers=(1,))
    direction = {
        n: torch.randn(t.shape, generator=torch.Generator().manual_seed(i), dtype=t.dtype)
        for i, (n, t) in enumerate(start.kv.items())
    }
    away = [
        dataclasses.replace(start, kv={n: t + e * direction[n] for n, t in start.kv.items()}) for e in (1e-3, -1e-3)
    ]  # the norm layers compute in fp32
    wanted = (loss(model, [away[0]], DATA["a"]) - loss(model, [away[1]], DATA["a"])) / 2e-3
    config = PrefixConfig(prefix_length=4, layers=(1,))
    params = PrefixParameters.make(
        model.layers,
        [kv_by_layer(start, model.layers)],
        ParameterOptions(config, False, 0, torch.float64, model.device),
    )
    assert [len(k) for k, _ in params.leaves] == [0, 4, 0]
    total = 0.0
    for row in DATA["a"]:
        ids = torch.tensor(row["input_ids"])
        at = torch.tensor([i for i, t in enumerate(row["labels"]) if t != -100])
        one = np.array([0, 1], np.int32), np.zeros(1, np.int32)
        plan = training_plan(
            np.array([len(ids)], np.int32),
            PrefixUse(*one),
            row_table([start], model),
            params.leaves,
            backend=model.backend,
        )
        total = total + torch.nn.functional.cross_entropy(model.forward(plan, ids)[at - 1], ids[at], reduction="sum")
    (total / sum(t != -100 for row in DATA["a"] for t in row["labels"])).backward()
    assert all(t.grad is None for i in (0, 2) for t in params.leaves[i])
    got = sum((t.grad * direction[f"self.1.{x}"]).sum() for x, t in zip("kv", params.leaves[1], strict=True))
    assert float(got) == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("kind", ["flat", "mlp"])
def test_all_layers_by_number_equal_the_default(model, kind):
    how = {**HOW, **KINDS[kind]}
    by_number, plain = train(model, DATA["a"], **how, layers=(0, 1, 2)), train(model, DATA["a"], **how)
    assert by_number.digest == plain.digest
    assert by_number.training["prefix_config"] == plain.training["prefix_config"]


@pytest.mark.parametrize(("under", "own"), [((0, 1), (1, 2)), (None, (2,)), ((1,), None), ((0,), (2,))])
def test_on_top_of_a_prefix_in_other_layers(model, under, own):
    base = train(model, rows(50, 4), **{**HOW, "prefix_length": 7}, **KINDS["flat"], layers=under)
    how = {**HOW, **KINDS["flat"], "layers": own, "on_top_of": base}
    run = train(model, DATA, **how)
    for name, prefix in run.items():
        assert prefix.layers == (own or (0, 1, 2))
        assert distance(train(model, DATA[name], **how), prefix) < 1e-9
        at_once = {
            **HOW,
            **KINDS["flat"],
            "on_top_of": base,
            "init": prefix,
            "max_steps": 1,
            "batch_size": len(DATA[name]),
            "learning_rate": 1e-12,
        }
        loss_of_both = train(model, DATA[name], **at_once).training["metrics"]["loss"]
        assert loss_of_both == pytest.approx(loss(model, [base, prefix], DATA[name]), abs=1e-9)
        assert loss_of_both < loss(
            model, [base, train(model, DATA[name], **{**how, "max_steps": 1, "learning_rate": 1e-12})], DATA[name]
        )
    with Engine(model, max_num_seqs=4, max_model_len=40) as engine:
        got = engine.generate([DATA["a"][0]["input_ids"]], [[base, run["a"]]], max_new_tokens=6)[0].token_ids
    ids = list(DATA["a"][0]["input_ids"])
    for token in got:
        assert token == int(composed.logits(model, ids, [base, run["a"]])[-1].argmax())
        ids.append(token)


def test_initial_values(model, tokenizer, folder):
    from prefixfast import load

    text = {
        "init_text": "hello there",
        "prefix_length": "text",
        "max_steps": 1,
        "learning_rate": 1e-12,
        "progress": False,
        "seed": 0,
    }
    with load(folder, dtype="float32") as base:
        data = [{"prompt": "a", "completion": "b"}]
        whole, part = (train(base, data, **text, layers=layers) for layers in (None, (1,)))
        assert set(part.kv) == names(1)
        assert all(torch.allclose(part.kv[n], whole.kv[n]) for n in part.kv)
        more = train(base, data, init=part, max_steps=1, progress=False)
        assert more.layers == (1,)
        assert train(base, data, init=part, layers=[1], max_steps=1, progress=False).digest == more.digest
        with pytest.raises(ConfigError, match=r"layers: the prefix in init has 1, got 0, 1"):
            train(base, data, init=part, layers=[0, 1], progress=False)
        init = {"x": part, "y": dataclasses.replace(whole, kv={n: whole.kv[n] for n in names(0)})}
        both = train(base, {"x": data, "y": data}, init=init, max_steps=1, progress=False)
        assert [p.layers for p in both.values()] == [(1,), (0,)]


def test_wrong_layers(model):
    for wrong in ([], [-1], [0, 0], [1, "2"], ["0"], [None], [True], "01", 3, [1.0]):
        with pytest.raises(ConfigError, match=r"PrefixConfig\.layers: expected a list of at least one layer number"):
            PrefixConfig(layers=wrong)
    assert PrefixConfig(layers=range(2, 4)).layers == PrefixConfig(layers=np.array([3, 2])).layers == (2, 3)
    with pytest.raises(ConfigError, match=r"expected numbers from 0 to 2 \(this base has 3 layers\), got 3"):
        train(model, DATA["a"], **HOW, layers=[0, 3])


def test_the_only_site_and_the_only_objective(model):
    how = {**HOW, **KINDS["flat"], "max_steps": 1}
    plain = train(model, DATA["a"], **how)
    named = train(model, DATA["a"], **{**how, "prefix_length": {"self": 4}}, sites=["self"], objective="sft")
    assert named.digest == plain.digest
    assert named.training["prefix_config"] == plain.training["prefix_config"]
    assert PrefixConfig(prefix_length={"self": 7}, sites=["self"]) == PrefixConfig(prefix_length=7, sites=("self",))
    for wrong in ({"sites": []}, {"sites": ["self", "self"]}, {"prefix_length": {}}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: expected at least one of the sites"):
            PrefixConfig(**wrong)
    for wrong in ({"sites": ["self", "cross"]}, {"prefix_length": {"enc": 3}}, {"layers": {"cross": [0]}}):
        with pytest.raises(ConfigError, match=r"expected 'self', got '(enc|cross)'.*this base is decoder-only"):
            train(model, DATA["a"], **{**how, **wrong})
    for length in ("many", "text", 0, True, 2.5, None):
        with pytest.raises(ConfigError, match=r"prefix_length: expected .* for site 'self'"):
            PrefixConfig(prefix_length={"self": length})
    with pytest.raises(ConfigError, match="objective: expected 'sft'"):
        train(model, DATA["a"], **how, objective="distill")
    with pytest.raises(ConfigError, match="objective: expected 'sft'"):
        estimate(model, DATA["a"], **how, objective="distill")


def test_a_sweep_and_an_estimate(model):
    run = train(model, DATA["a"], **{**HOW, "max_steps": 2}, **KINDS["flat"], sweep={"layers": [[0], [1, 2], None]})
    assert {name: prefix.layers for name, prefix in run.items()} == {
        "layers=0": (0,),
        "layers=1+2": (1, 2),
        "layers=None": (0, 1, 2),
    }
    found = estimate(model, DATA["a"], **{**HOW, **KINDS["flat"], "layers": [1]})
    assert (
        found.stored_numbers
        == found.trained_numbers
        == run["layers=0"].num_stored
        == run["layers=None"].num_stored // 3
    )


def test_resume_is_exact(tmp_path):
    base = tiny.make("gpt2")
    how = {**HOW, **KINDS["mlp"], "layers": [0, 2], "max_steps": 6, "save_steps": 2}
    whole = train(base, DATA, **how)

    class StopError(Exception):
        pass

    class Stop:
        def on_step(self, step, *_):
            if step == 5:
                raise StopError

    with pytest.raises(StopError):
        train(base, DATA, **how, output_dir=tmp_path / "run", callbacks=[Stop()])
    again = train(base, DATA, **how, output_dir=tmp_path / "run", resume=True)
    assert {n: p.digest for n, p in again.items()} == {n: p.digest for n, p in whole.items()}
    with pytest.raises(ConfigError, match="layers"):
        train(base, DATA, **{**how, "layers": [0, 1]}, output_dir=tmp_path / "run", resume=True)


def test_folders_the_store_and_peft(tmp_path):
    base = tiny.make("gpt2")
    run = {layers: train(base, DATA["a"], **HOW, **KINDS["flat"], layers=layers) for layers in ((0, 1), (1, 2), (2,))}
    store = PrefixStore(tmp_path / "store")
    for layers, prefix in run.items():
        prefix.save_pretrained(tmp_path / str(layers))
        again = Prefix.from_pretrained(tmp_path / str(layers))
        assert (again.digest, again.layers) == (prefix.digest, layers)
        assert again.peft_incompatibility == "some layers have no prefix"
        assert not (tmp_path / str(layers) / "adapter_config.json").exists()
        with pytest.raises(ConfigError, match="PEFT cannot hold this prefix exactly: some layers have no prefix"):
            prefix.to_peft(tmp_path / "peft")
        assert store.put(str(layers), prefix).layers == layers
        assert f"for each of the layers {', '.join(map(str, layers))} (from 0)," in model_card(prefix, "ann/mill")
    batch = [[5, 6, 7], [8, 9], [3], [4, 4, 4, 4]]
    whole = train(base, DATA["a"], **HOW, **KINDS["flat"])
    whole.to_peft(tmp_path / "whole")
    assert "for each of 3 layers," in model_card(whole, "ann/mill")
    theirs = PeftModel.from_pretrained(tiny.make("gpt2"), tmp_path / "whole")
    stored = generate(batch, [*map(str, run), whole], model=base, store=store, max_new_tokens=8, progress=False)
    given = generate(batch, [*run.values(), whole], model=base, max_new_tokens=8, progress=False)
    assert [g.token_ids for g in stored] == [g.token_ids for g in given]
    ids = torch.tensor([batch[3]])
    expected = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[
        0, 4:
    ].tolist()
    assert given[3].token_ids == expected[: len(given[3].token_ids)], "beside prefixes in some layers"


def test_composition_and_concat(tmp_path):
    base = tiny.make("gpt2")
    low, low_too, top = (
        train(base, DATA[n], **{**HOW, "seed": i}, **KINDS["flat"], layers=layers)
        for i, (n, layers) in enumerate(zip("abc", ((0, 1), (0, 1), (2,)), strict=True))
    )
    both = low.concat(low_too)
    assert (both.layers, both.length) == ((0, 1), 8)
    two, one = (
        generate([[5, 6, 7]], [p], model=base, max_new_tokens=8, progress=False)[0].token_ids
        for p in ([low, low_too], both)
    )
    assert two == one
    with pytest.raises(
        ConfigError, match="no single prefix does the same: prefix 1 lies in other layers than prefix 0"
    ):
        low.concat(top)


def test_check_fits_distinguishes_fewer_layers_from_a_smaller_base_model(model):
    prefix = train(model, DATA["a"], **HOW, **KINDS["flat"], layers=(0, 1))
    check_fits(model, prefix)
    with pytest.raises(
        BaseMismatchError,
        match="got 2 layers, the first ones, and it does not say for how many it was made; was it trained",
    ):
        check_fits(model, dataclasses.replace(prefix, base=None))
    check_fits(
        model, dataclasses.replace(prefix, base=None, kv={n.replace(".0.", ".2."): t for n, t in prefix.kv.items()})
    )
    with pytest.raises(BaseMismatchError, match=r"self\.3\.k: \(2, 8\) where no layer is expected"):
        check_fits(model, dataclasses.replace(prefix, kv={n.replace(".1.", ".3."): t for n, t in prefix.kv.items()}))
    with pytest.raises(BaseMismatchError, match="different lengths"):
        check_fits(
            model, dataclasses.replace(prefix, kv={n: t[: 4 - int(n.split(".")[1])] for n, t in prefix.kv.items()})
        )


def test_score_inspect_and_from_text(model, tokenizer, folder, caplog):
    from prefixfast import load

    low, top = (train(model, DATA["a"], **HOW, **KINDS["flat"], layers=layers) for layers in ((0,), (1, 2)))
    targets = [[7, 8, 9], [3, 4]]
    for used in ([low], [low, top]):
        for prompt, target, one in zip(
            ([5, 6], [9, 9, 9]),
            targets,
            score([[5, 6], [9, 9, 9]], [used, used], targets=targets, model=model),
            strict=True,
        ):
            logp = composed.logits(model, prompt + target, used).log_softmax(-1)
            expected = [float(logp[len(prompt) - 1 + i, t]) for i, t in enumerate(target)]
            assert one.token_logprobs == pytest.approx(expected, abs=1e-9)
    assert low.inspect(model, [[5, 6, 7]], words=0).mass[0].min() > 0
    assert low.inspect(model, [[5, 6, 7]], words=0).mass[1:].abs().max() == 0
    with load(folder, dtype="float32") as base:
        text = Prefix.from_text(base, "hello")
        part = dataclasses.replace(text, kv={n: t for n, t in text.kv.items() if ".0." not in n})
        with caplog.at_level(logging.WARNING):
            assert part.inspect(base, ["abc"]).words == {}
        assert "layer 0, which the prefix leaves out" in caplog.text
        after = Prefix.from_text(base, "there", after=part)
        ids = base.tokenizer.encode(["there"])[0].tolist()
        assert after.layers == (0, 1, 2)
        assert (
            composed.error(
                composed.logits(base, [40, 41], [part, after]), composed.logits(base, [*ids, 40, 41], [part])[-2:]
            )
            < 1e-5
        )


def test_the_command_line(cli, folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    fast = ("--max-steps", 1, "--prefix-length", 3, "--dtype", "float32", "--init", "random")
    code, _, err = cli("train", folder, tmp_path / "rows.jsonl", "-o", tmp_path / "p", *fast, "--layers", "1,2")
    assert code == 0, err
    assert Prefix.from_pretrained(tmp_path / "p").layers == (1, 2)
    assert cli("train", folder, tmp_path / "rows.jsonl", "-o", tmp_path / "q", *fast, "--layers", "1")[0] == 0
    code, _, err = cli(
        "train", folder, tmp_path / "rows.jsonl", "-o", tmp_path / "t", *fast, "--sweep", "layers=[0,1],[2]"
    )
    assert code == 0, err
    assert Prefix.from_pretrained(tmp_path / "t" / "layers=0+1").layers == (0, 1)
    code, _, err = cli("train", folder, tmp_path / "rows.jsonl", "-o", tmp_path / "t", *fast, "--sweep", "layers=[0,1")
    assert "--sweep: expected FIELD=VALUE,VALUE,... with values as in YAML" in err
    code, out, err = cli(
        "train", folder, tmp_path / "rows.jsonl", "-o", tmp_path / "q", *fast, "--layers", "2", "--print-config"
    )
    assert code == 0, err
    (tmp_path / "run.yaml").write_text(out)
    assert (
        cli("train", folder, tmp_path / "rows.jsonl", "-o", tmp_path / "r", "--config", tmp_path / "run.yaml")[0] == 0
    )
    assert Prefix.from_pretrained(tmp_path / "r").layers == (2,)
    code, _, err = cli("train", folder, tmp_path / "rows.jsonl", "-o", tmp_path / "s", *fast, "--layers", "one")
    assert code != 0
    assert "--layers: expected numbers with commas between them" in err
