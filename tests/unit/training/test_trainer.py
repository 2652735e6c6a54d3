"""Training: a prefix has the same result alone and among others, and wrong input is refused."""

import json

import numpy as np
import pytest
import torch

import prefixfast
import tiny
from prefixfast.config import TrainConfig
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, DataError
from prefixfast.training.batching import BatchOrder, micro_batches
from prefixfast.training.examples import TokenizeOptions, tokenize_rows
from prefixfast.training.parameters import ParameterOptions, PrefixParameters
from prefixfast.training.trainer import train
from token_rows import distance, rows

STEPS, USERS = 20, 50


DATA = {f"user {i}": rows(i, 5 + i % 7) for i in range(USERS)}
COMMON = {
    "max_steps": STEPS,
    "batch_size": 3,
    "prefix_length": 4,
    "prefix_dropout": 0.2,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
    "init": "random",
}


@pytest.mark.parametrize(("reparameterization", "loss"), [("none", "token_mean"), ("mlp", "sequence_sum")])
def test_a_prefix_alone_equals_the_prefix_among_fifty_others_in_fp64(reparameterization, loss):
    model = tiny.make("gpt2", dtype=torch.float64)
    how = {
        **COMMON,
        "reparameterization": reparameterization,
        "encoder_hidden_size": 16,
        "loss": loss,
        "token_budget": 300,
    }
    together = train(model, DATA, **how)
    assert set(together) == set(DATA)
    for name in ("user 0", "user 17", "user 49"):
        alone = train(model, DATA[name], **how)
        assert distance(alone, together[name]) < 1e-9
        assert distance(alone, together["user 3"]) > 1e-3, "different data must give different prefixes"


def test_prefixes_with_different_numbers_of_steps_equal_those_alone():
    model = tiny.make("gemma2", dtype=torch.float64)
    data = {"short": rows(0, 2), "middle": rows(1, 8), "long": rows(2, 17)}
    how = {
        "num_train_epochs": 2,
        "batch_size": 3,
        "prefix_length": 3,
        "prefix_dropout": 0.1,
        "learning_rate": 1e-2,
        "init": "random",
        "reparameterization": "none",
    }
    together = train(model, data, eval_data=rows(3, 2), **how)
    assert [m["steps"] for m in together.metrics.values()] == [2, 6, 12]
    for name, own in data.items():
        assert distance(train(model, own, **how), together[name]) < 1e-9


def test_token_budget_does_not_change_results():
    model = tiny.make("llama", dtype=torch.float64)
    how = {**COMMON, "max_steps": 6}
    small, large = (train(model, DATA["user 5"], token_budget=b, **how) for b in (11, 4096))
    assert distance(small, large) < 1e-9


def test_gradients_alone_and_among_others_in_fp32():
    """Gradients are compared directly, since the first step of AdamW depends on their signs only."""
    with prefixfast.load(tiny.make("llama")) as model:
        examples = tokenize_rows(model, DATA, TokenizeOptions(Task("input_ids"), 160))
        config = TrainConfig(batch_size=3, max_steps=1)
        chosen, prefix = BatchOrder.draw(np.stack([examples.first[:-1], examples.first[1:]], 1), [config] * USERS).at(0)

        def gradients(only=None):
            params = PrefixParameters.make(
                model.layers,
                [None] * USERS,
                ParameterOptions(prefixfast.PrefixConfig(prefix_length=4), False, 0, torch.float32, model.device),
            )
            keep = np.ones(len(prefix), bool) if only is None else prefix == only
            own = prefixfast.attention.plan.PlannedPrefix(params.layers, 4, 4, True)
            table = prefixfast.attention.plan.prefix_rows([own] * USERS, len(model.layers))
            for m in micro_batches(
                examples, chosen[keep], prefix[keep], token_budget=200, sequence_sum=False, device=model.device
            ):
                plan = prefixfast.attention.plan.training_plan(
                    m.lengths,
                    prefixfast.attention.plan.PrefixUse(np.arange(len(m.lengths) + 1, dtype=np.int32), m.prefix),
                    table,
                    params.leaves,
                    backend=model.backend,
                )
                logits = model.forward(plan.with_logits_at(m.logits_at), m.ids)
                (
                    torch.nn.functional.cross_entropy(logits, m.targets, reduction="none") * m.weights.float()
                ).sum().backward()
            return [t.grad.view(USERS, 4, -1) for kv in params.leaves for t in kv]

        everyone = gradients()
        for user in (0, 23, 49):
            for a, b in zip(everyone, gradients(only=user), strict=True):
                assert (a[user] - b[user]).abs().max() < 1e-5 * a[user].abs().max()


def test_each_epoch_is_a_permutation_of_the_examples():
    order = BatchOrder.draw(np.array([[0, 7], [7, 17]]), [TrainConfig(batch_size=3, num_train_epochs=2)] * 2)
    assert order.total.tolist() == [6, 8]
    seen = [order.at(s) for s in range(8)]
    for prefix, (first, count, per_epoch) in {0: (0, 7, 3), 1: (7, 10, 4)}.items():
        for epoch in range(2):
            taken = np.concatenate([c[p == prefix] for c, p in seen[epoch * per_epoch : (epoch + 1) * per_epoch]])
            assert sorted(taken) == list(range(first, first + count))
    assert not np.array_equal(seen[0][0][:3], seen[3][0][:3]), "epochs are shuffled anew"
    assert set(seen[7][1]) == {1}


def test_order_without_shuffling():
    order = BatchOrder.draw(np.array([[0, 7]]), [TrainConfig(batch_size=3, max_steps=5, shuffle=False)])
    assert order.examples.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("init", ["random", "zero"])
def test_training_lowers_the_loss_and_restores_the_model(init):
    model = tiny.make("qwen3").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    data = rows(3, 6)
    prefix = train(
        model, data, init=init, prefix_length=6, max_steps=40, batch_size=6, learning_rate=2e-2, eval_data=data
    )
    untrained = train(
        model, data, init=init, prefix_length=6, max_steps=1, batch_size=6, learning_rate=1e-9, eval_data=data
    )
    assert prefix.training["metrics"]["eval_loss"] < untrained.training["metrics"]["eval_loss"] - 1
    assert model.training
    assert all(p.requires_grad and p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.config._attn_implementation == "sdpa"


def test_init_from_a_prefix():
    model = tiny.make("llama")
    start = train(model, rows(0, 4), init="random", reparameterization="none", prefix_length=3, max_steps=2)
    for reparameterization in ("none", "mlp"):
        same = train(
            model, rows(1, 4), init=start, reparameterization=reparameterization, max_steps=1, learning_rate=1e-12
        )
        assert same.length == 3
        assert distance(start, same) < 1e-6
    with pytest.raises(ConfigError, match="leave it out"):
        train(model, rows(1, 4), init=start, prefix_length=20)
    fixed = prefixfast.Prefix(start.kv, pos_start=0, window="always")
    kept = train(model, rows(1, 4), init=fixed, max_steps=1, learning_rate=1e-12)
    assert (kept.pos_start, kept.window) == (0, "always")
    with pytest.raises(ConfigError, match="none for"):
        train(model, {"a": rows(0, 2), "b": rows(1, 2)}, init={"a": start})


def test_skipped_steps_are_counted_and_isolated():
    model = tiny.make("gpt2")
    bad = prefixfast.Prefix(
        {
            n: torch.full_like(t, 1e20)
            for n, t in train(model, rows(0, 2), init="zero", reparameterization="none", max_steps=1).kv.items()
        },
        10,
    )
    good = train(model, rows(0, 2), init="zero", reparameterization="none", max_steps=1)
    run = train(model, {"good": rows(0, 4), "bad": rows(0, 4)}, init={"good": good, "bad": bad}, max_steps=3)
    assert set(run) == {"good"}
    assert "not finite in 3 steps" in run.failed["bad"]
    assert run.metrics["good"]["skipped_steps"] == 0
    assert distance(run["good"], good) > 0
    with pytest.raises(ConfigError, match="lower learning_rate"):
        train(model, rows(0, 4), init=bad, max_steps=3)


def test_log_and_prefix_are_written(tmp_path):
    model = tiny.make("gpt2")
    run = train(
        model,
        {"a": rows(0, 4), "b": rows(1, 4)},
        eval_data=rows(2, 3),
        init="random",
        max_steps=6,
        logging_steps=2,
        eval_steps=3,
        output_dir=tmp_path,
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [2, 4, 6]
    assert [x["step"] for x in lines if "eval_loss" in x] == [0, 3, 6]
    assert lines[-1]["metrics"].keys() == {"a", "b"}
    assert prefixfast.Prefix.from_pretrained(tmp_path / "b").digest == run["b"].digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": [{"input_ids": [5, 6, 7], "labels": [-100, 6, 8]}]}, "labels"),
        ({"data": [{"input_ids": [5, 6, 700], "labels": [-100, 6, 700]}]}, "0 to 100"),
        ({"data": [{"input_ids": [5, 6], "labels": [5, -100]}]}, "labels"),
        ({"data": [{"input_ids": [3] * 170, "labels": [-100] + [3] * 169}]}, "tokens, at most 150 fit"),
        ({"data": []}, "at least one row"),
        ({"data": {}}, "empty mapping"),
        ({"data": ["text"]}, "expected a mapping"),
        ({"data": [{"prompt": "a", "completion": "b"}]}, "no tokenizer"),
        ({"init": "word"}, "'text', 'random'"),
        ({"init": "random", "init_text": "words"}, "only with init='text'"),
        ({"learning_rat": 0.1}, "learning_rate"),
        ({"num_virtual_tokens": 3}, "prefix_length"),
        ({"data": {"../x": rows(0, 2)}, "output_dir": "never-made"}, "folder of output_dir"),
        (
            {"data": {"checkpoint": rows(0, 2)}, "output_dir": "never-made"},
            "'checkpoint' cannot be a folder of output_dir",
        ),
        ({"dtype": "float64"}, "the given model computes in torch.float32, got 'float64'"),
        ({"on_error": "ignore"}, "'isolate' or 'raise', got 'ignore'"),
    ],
)
def test_wrong_input_is_refused(change, message):
    with pytest.raises((ConfigError, DataError), match=message):
        train(tiny.make("gpt2"), **{"data": rows(0, 3), "init": "random", "max_steps": 1, **change})


def test_a_base_model_by_name_is_loaded_in_the_requested_dtype(folder):
    made = {
        dtype: train(folder, rows(0, 2), init="random", max_steps=1, dtype=dtype) for dtype in ("float32", "float64")
    }
    assert {dtype: next(iter(p.kv.values())).dtype for dtype, p in made.items()} == {
        "float32": torch.float32,
        "float64": torch.float64,
    }


def test_overflow_policies():
    model = tiny.make("gpt2")
    long = {"input_ids": list(range(3, 43)), "labels": [-100] * 38 + [41, 42]}
    data = [long, *rows(0, 2)]
    with prefixfast.load(model) as base:
        cut = tokenize_rows(base, {"a": data}, TokenizeOptions(Task("input_ids"), 20, "truncate"))
        left = tokenize_rows(base, {"a": data}, TokenizeOptions(Task("input_ids"), 20, "skip"))
    assert (cut.num_truncated, cut.lengths[0], cut.num_targets[0]) == (1, 20, 2)
    assert cut.ids[:20].tolist() == list(range(23, 43)), "the prompt's start goes, the target stays"
    assert (left.num_skipped, len(left.num_targets)) == (1, 2)
