"""Frozen prefixes under trained ones, frozen rows, gradient checkpointing, and out-of-memory back-off."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prefixfast
import tiny
from prefixfast.attention.plan import PrefixRows, PrefixUse, training_plan
from prefixfast.config import PrefixConfig
from prefixfast.errors import BaseMismatchError, CapacityError, ConfigError
from prefixfast.prefix.kv import kv_by_layer
from prefixfast.training.parameters import ParameterOptions, PrefixParameters
from prefixfast.training.resilience import TokenBudget
from prefixfast.training.trainer import train
from token_rows import distance, rows

HOW = {"batch_size": 3, "prefix_length": 4, "learning_rate": 2e-2, "init": "random", "max_steps": 6}
KINDS = {
    "flat": {"reparameterization": "none"},
    "mlp": {"reparameterization": "mlp", "encoder_hidden_size": 16, "learning_rate": 5e-3},
}


def base_prefix(model, **fields) -> prefixfast.Prefix:
    return train(model, rows(50, 4), **{**HOW, "prefix_length": 7, "reparameterization": "none", "seed": 3, **fields})


def loss_of(model, prefixes, data) -> float:
    """Mean loss of a target token with prefixes composed from left to right, with a plan built in this test."""
    before = np.cumsum([0, *(p.length for p in prefixes)])
    table = np.array(
        [[s, p.length, p.pos_start, p.window == "slide", 0] for s, p in zip(before, prefixes, strict=False)], np.int32
    )
    arena = [
        tuple(torch.cat([kv_by_layer(p, model.layers)[i][j] for p in prefixes]) for j in (0, 1))
        for i in range(len(model.layers))
    ]
    lost = []
    for row in data:
        ids, target = torch.tensor(row["input_ids"]), np.array(row["labels"]) != -100
        indptr = np.array([0, len(prefixes)], np.int32)
        plan = training_plan(
            np.array([len(ids)], np.int32),
            PrefixUse(indptr, np.arange(len(prefixes), dtype=np.int32)),
            PrefixRows(table[None]),
            arena,
            backend=model.backend,
        )
        logits = model.forward(plan, ids)
        at = torch.tensor(np.flatnonzero(target))
        lost.append(F.cross_entropy(logits[at - 1], ids[at], reduction="none"))
    return float(torch.cat(lost).mean())


@pytest.mark.parametrize(("family", "kind"), [("gpt2", "flat"), ("llama", "mlp"), ("gemma2", "flat")])
def test_training_on_top_of_a_frozen_prefix(family, kind):
    with prefixfast.load(tiny.make(family, dtype=torch.float64)) as model:
        first = base_prefix(model)
        kept = first.digest
        how = {**HOW, **KINDS[kind], "prefix_dropout": 0.1, "max_steps": 8}
        data, held_out = {"a": rows(0, 5), "b": rows(1, 4)}, rows(2, 6)
        run = train(model, data, on_top_of=first, eval_data=held_out, **how)
        assert first.digest == kept
        for name, prefix in run.items():
            assert prefix.length == 4, "the frozen rows are not stored"
            assert prefix.training["on_top_of"] == kept
            assert loss_of(model, [first, prefix], held_out) == pytest.approx(run.metrics[name]["eval_loss"], abs=1e-9)
            assert abs(loss_of(model, [prefix], held_out) - run.metrics[name]["eval_loss"]) > 1e-4, (
                "without it the loss is another"
            )
            assert distance(train(model, data[name], on_top_of=first, eval_data=held_out, **how), prefix) < 1e-9
            assert distance(train(model, data[name], eval_data=held_out, **how), prefix) > 1e-4


def test_generation_with_both_prefixes_matches_training():
    """After one example is memorized, [frozen, new] generates its target greedily, and either prefix alone does not."""
    with prefixfast.load(tiny.make("llama")) as model:
        first = base_prefix(model)
        row = rows(8, 1)[0]
        new = train(
            model,
            [row],
            on_top_of=first,
            **{**HOW, "max_steps": 60, "reparameterization": "none", "learning_rate": 5e-2},
        )
        target = [i for i in row["labels"] if i != -100]
        prompt = row["input_ids"][: -len(target)]
        with prefixfast.Engine(model, max_num_seqs=4) as engine:
            both, alone, bare = engine.generate([prompt] * 3, [[first, new], new, first], max_new_tokens=len(target))
        assert both.token_ids == target
        assert alone.token_ids != target
        assert bare.token_ids != target


def test_the_init_text_follows_the_frozen_prefix(base, make_prefix):
    first = make_prefix(1, length=3, base=base.fingerprint)
    data = [{"prompt": "a=", "completion": "b"}]
    how = {"prefix_length": 4, "max_steps": 1, "learning_rate": 1e-12, "init": "text", "init_text": "some words"}
    assert distance(train(base, data, on_top_of=first, **how), train(base, data, **how)) > 1e-3


def test_the_frozen_prefix_may_be_a_name_in_the_store(base, make_prefix, tmp_path):
    store = prefixfast.PrefixStore(tmp_path)
    store.put("house", make_prefix(1, length=3, base=base.fingerprint))
    data = rows(0, 3)
    by_name = train(base, data, on_top_of="house", store=store, **HOW)
    assert by_name.training["on_top_of"] == store["house"].digest
    with pytest.raises(ConfigError, match="a store beside the name"):
        train(base, data, on_top_of="house", **HOW)
    with pytest.raises(ConfigError, match="expected a Prefix or a name"):
        train(base, data, on_top_of=3, **HOW)
    with pytest.raises(BaseMismatchError, match="on_top_of"):
        train(base, data, on_top_of=make_prefix(2, heads=2), **HOW)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_frozen_rows_keep_their_values_and_the_others_learn(kind):
    with prefixfast.load(tiny.make("llama", dtype=torch.float64)) as model:
        how = {**HOW, **kind, "weight_decay": 0.1, "prefix_dropout": 0.2}
        start = train(
            model,
            rows(0, 4),
            **{**how, "max_steps": 1, "learning_rate": 1e-37, "weight_decay": 0.0, "prefix_dropout": 0.0},
        )
        data = {"a": rows(0, 5), "b": rows(1, 4)}
        run = train(model, data, frozen_rows=2, **how)
        for name, prefix in run.items():
            for tensor, t in prefix.kv.items():
                assert torch.equal(t[:2], start.kv[tensor][:2])
                assert (t[2:] - start.kv[tensor][2:]).abs().min(0).values.max() > 1e-6
            assert distance(train(model, data[name], frozen_rows=2, **how), prefix) < 1e-9
        if kind is KINDS["flat"]:
            assert run["a"].num_trained == run["a"].num_stored // 2
        free = train(model, data, **how)
        assert distance(free["a"], run["a"]) > 1e-3


def test_dropout_does_not_drop_frozen_rows():
    with prefixfast.load(tiny.make("gpt2")) as model:
        config = PrefixConfig(prefix_length=5, frozen_rows=2, prefix_dropout=0.5)
        params = PrefixParameters.make(
            model.layers, [None] * 3, ParameterOptions(config, False, 0, torch.float32, model.device)
        )
        params.refresh(np.zeros(3, np.int64))
        dropped = [(leaf.view(3, 5, -1) == 0).float().mean((0, 2)) for kv in params.leaves for leaf in kv]
        assert torch.stack(dropped)[:, :2].max() == 0
        assert torch.stack(dropped)[:, 2:].mean() == pytest.approx(0.5, abs=0.1)


# ---- gradient checkpointing ----


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_gradient_checkpointing_gives_equal_gradients(family):
    model = tiny.make(family, dtype=torch.float64)
    how = {**HOW, "reparameterization": "none", "max_steps": 3, "token_budget": 40}
    plain, again = (train(model, rows(0, 6), gradient_checkpointing=g, **how) for g in (False, True))
    assert distance(plain, again) < 1e-12
    assert not [m for m in model.modules() if "forward" in vars(m)], "the layers are as they were"


def test_gradient_checkpointing_recomputes_and_is_undone_after_an_error():
    model = tiny.make("gpt2")
    calls = []
    handle = model.transformer.h[1].attn.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    class Fails:
        def on_step(self, step, losses, grad_norms, active):
            raise RuntimeError("own")

    for flag in (False, True):
        calls.clear()
        with pytest.raises(RuntimeError, match="own"):
            train(
                model,
                rows(0, 3),
                gradient_checkpointing=flag,
                callbacks=[Fails()],
                **{**HOW, "reparameterization": "none"},
            )
        assert calls.count(True) == 1 + flag
    handle.remove()
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_gradient_checkpointing_keeps_a_patched_forward():
    model = tiny.make("gpt2")
    layer, original = model.transformer.h[0], model.transformer.h[0].forward
    layer.forward = hooked = lambda *args, **how: original(*args, **how)
    train(model, rows(0, 3), gradient_checkpointing=True, **{**HOW, "reparameterization": "none"})
    assert vars(layer)["forward"] is hooked


# ---- out-of-memory back-off ----


class Limit:
    """`Model.losses` that raises the allocator's error above a number of tokens."""

    def __init__(self, original, tokens: int, error: Exception) -> None:
        self.original, self.tokens, self.error, self.seen, self.refused = original, tokens, error, [], 0

    def __call__(self, plan, ids, *rest):
        losses = self.original(plan, ids, *rest)
        if len(ids) > self.tokens:
            self.refused += 1
            raise self.error
        self.seen.append(len(ids))
        return losses


ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
}


@pytest.mark.parametrize(("error", "kind"), [("gpu", "flat"), ("cpu", "mlp")])
def test_out_of_memory_halves_the_budget_and_changes_no_result(monkeypatch, error, kind):
    with prefixfast.load(tiny.make("gpt2", dtype=torch.float64)) as model:
        data = {"a": rows(0, 6), "b": rows(1, 6)}
        how = {**HOW, **KINDS[kind], "batch_size": 6, "max_steps": 4}
        plain = train(model, data, eval_data=rows(2, 9), **how)
        limit = Limit(model.losses, 15, ERRORS[error])
        monkeypatch.setattr(model, "losses", limit)
        tight = train(model, data, eval_data=rows(2, 9), **how)
        assert limit.refused in range(1, 5), "it halves a few times, then stays"
        assert max(limit.seen) <= 15
        assert all(distance(plain[n], tight[n]) < 1e-9 for n in data)
        assert tight.metrics["a"]["eval_loss"] == pytest.approx(plain.metrics["a"]["eval_loss"], abs=1e-9)


def test_one_example_that_does_not_fit_is_an_error(monkeypatch):
    with prefixfast.load(tiny.make("gpt2")) as model:
        monkeypatch.setattr(model, "losses", Limit(model.losses, 2, ERRORS["gpu"]))
        with pytest.raises(CapacityError, match=r"one example of .* tokens"):
            train(model, rows(0, 4), **HOW)


def test_an_explicit_budget_is_not_halved(monkeypatch):
    with prefixfast.load(tiny.make("gpt2")) as model:
        monkeypatch.setattr(model, "losses", Limit(model.losses, 5, ERRORS["gpu"]))
        with pytest.raises(CapacityError, match="token_budget=100: lower it"):
            train(model, rows(0, 4), token_budget=100, **HOW)


def test_other_errors_are_not_caught(monkeypatch):
    with prefixfast.load(tiny.make("gpt2")) as model:
        monkeypatch.setattr(model, "losses", Limit(model.losses, 5, RuntimeError("shape mismatch")))
        with pytest.raises(RuntimeError, match="shape mismatch"):
            train(model, rows(0, 4), **HOW)


@pytest.mark.parametrize(("width", "tokens"), [(64, 4096), (160, 2048), (1280, 1024)])
def test_the_automatic_budget_follows_the_width_of_the_base_on_a_cpu(width, tokens):
    hf = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(3, width))
    assert TokenBudget("auto", SimpleNamespace(device=torch.device("cpu"), hf=hf)).tokens == tokens
    assert TokenBudget("auto", SimpleNamespace(device=torch.device("cuda"), hf=hf)).tokens == 4096


def test_frozen_rows_are_saved_as_a_cartridge(tmp_path):
    import json

    with prefixfast.load(tiny.make("gpt2")) as model:
        first = train(model, rows(0, 4), frozen_rows=2, **HOW, reparameterization="none")
        first.save_pretrained(tmp_path / "p")
        config = json.loads((tmp_path / "p" / "adapter_config.json").read_text(encoding="utf8"))
        assert (config["peft_type"], config["num_frozen_tokens"]) == ("CARTRIDGE", 2)
        (tmp_path / "p" / "prefixfast.json").unlink()
        read = prefixfast.Prefix.from_pretrained(tmp_path / "p")
        how = {k: v for k, v in HOW.items() if k not in ("init", "prefix_length")}
        again, free = (train(model, rows(1, 4), init=read, **how, **more) for more in ({}, {"frozen_rows": 0}))
        for name, t in read.kv.items():
            assert torch.equal(again.kv[name][:2], t[:2])
            assert not torch.equal(again.kv[name][2:], t[2:])
            assert not torch.equal(free.kv[name][:2], t[:2])


def test_training_on_top_of_the_prefix_that_it_starts_from():
    with prefixfast.load(tiny.make("llama")) as model:
        shared = base_prefix(model)
        same = {**HOW, "prefix_length": shared.length, "init": shared, "on_top_of": shared, "max_steps": 1}
        copy = train(model, rows(50, 4), **{**same, "learning_rate": 1e-12, "reparameterization": "none"})
        data = [row["input_ids"] for row in rows(51, 3)]
        targets = [[7, 8, 9]] * 3
        composed, trained = (
            prefixfast.score(data, [[shared, p]] * 3, targets=targets, model=model) for p in (shared, copy)
        )
        for a, b in zip(composed, trained, strict=True):
            assert a.token_logprobs == pytest.approx(b.token_logprobs, abs=1e-4)
