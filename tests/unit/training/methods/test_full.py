"""Full and top-2 fine-tuning equal Hugging Face's model with torch's AdamW, and give the base back to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

import tiny
from cut_runs import Cut, CutAt
from prefixfast import TunedWeights, load, train
from prefixfast.errors import CapacityError, ConfigError
from token_rows import rows

HOW = {
    "batch_size": 3,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "weight_decay": 0.01,
    "shuffle": False,
}
DATA = rows(0, 6)


MODELS = {
    "gpt2": tiny.FAMILIES["gpt2"],
    "llama": tiny.FAMILIES["llama"],
    "tied llama": lambda: LlamaForCausalLM(LlamaConfig(**tiny.GROUPED, tie_word_embeddings=True)),
}


def make(family: str, dtype=torch.float32):
    return tiny.randomize(MODELS[family], dtype=dtype)


def trained_names(model, method: str) -> list[str]:
    """Names of the weights that the authors train, written for the two families."""
    count = model.config.num_hidden_layers
    if method == "full":
        return [n for n, _ in model.named_parameters()]
    blocks = [f".{i}." for i in (count - 2, count - 1)]
    head = ("ln_f", "model.norm", "lm_head")
    tied = ("wte",) if hasattr(model, "transformer") else ("embed_tokens",)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return [
        n
        for n, _ in model.named_parameters()
        if any(b in n for b in blocks) or any(h in n for h in head) or (is_tied and tied[0] in n)
    ]


def reference(model, method: str, num_steps: int):
    """Weights after each step and clipped gradients, from the model's own forward on single rows."""
    named = dict(model.named_parameters())
    names = trained_names(model, method)
    model.requires_grad_(False)
    for n in names:
        named[n].requires_grad_(True)
    optimizer = torch.optim.AdamW([named[n] for n in names], lr=HOW["learning_rate"], weight_decay=HOW["weight_decay"])
    schedule = get_linear_schedule_with_warmup(optimizer, HOW["warmup_steps"], num_steps)
    norms = []
    for step in range(num_steps):
        batch = [DATA[(3 * step + i) % len(DATA)] for i in range(3)]
        total = sum(sum(label != -100 for label in r["labels"]) for r in batch)
        optimizer.zero_grad()
        for r in batch:
            logits = model(input_ids=torch.tensor([r["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(r["labels"])[1:]
            (F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) / total).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_([named[n] for n in names], 1.0)))
        optimizer.step()
        schedule.step()
    return {n: named[n].detach() for n in names}, norms


class Norms:
    def __init__(self):
        self.found = []

    def on_step(self, step, losses, grad_norms, active):
        self.found.append(float(grad_norms[0]))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("method", ["full", "top2"])
def test_weights_and_gradients_equal_those_of_transformers(family, method):
    model = make(family, torch.float64)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    seen = Norms()
    tuned = train(model, DATA, method=method, callbacks=[seen], **HOW)
    assert isinstance(tuned, TunedWeights)
    for n, p in model.state_dict().items():
        assert torch.equal(p, before[n])
    expected, norms = reference(make(family, torch.float64), method, HOW["max_steps"])
    assert seen.found == pytest.approx(norms, rel=1e-9)
    assert set(tuned.tensors) == set(expected)
    for n, t in tuned.tensors.items():
        torch.testing.assert_close(t, expected[n], rtol=1e-8, atol=1e-9)
        assert not torch.equal(t, before[n])


@pytest.mark.parametrize("options", [{"token_budget": 11}, {"gradient_checkpointing": True}])
def test_memory_options_do_not_change_weights(options):
    whole, small = (train(make("gpt2", torch.float64), DATA, method="full", **HOW, **o) for o in ({}, options))
    for n, t in whole.tensors.items():
        torch.testing.assert_close(small.tensors[n], t, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["full", "top2"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, dtype, method):
    model = make("gpt2", dtype)
    how = {**HOW, "method": method, "save_steps": 1, "eval_data": rows(1, 3), "eval_steps": 1, "shuffle": True}
    whole = train(model, DATA, output_dir=tmp_path / "whole", **how)
    with pytest.raises(Cut):
        train(model, DATA, output_dir=tmp_path / "cut", callbacks=[CutAt(3)], **how)
    resumed = train(model, DATA, output_dir=tmp_path / "cut", resume=True, **how)
    assert resumed.digest == whole.digest
    assert TunedWeights.from_pretrained(tmp_path / "cut").digest == whole.digest
    again = train(model, DATA, output_dir=tmp_path / "cut", resume=True, **how)  # finished: read from the folder
    assert again.digest == whole.digest
    assert again.training["metrics"] == whole.training["metrics"]


def test_sixteen_bits_train_masters_in_fp32():
    """Steps that are too small for bf16 add up: the weights that many of them give differ from the base's."""
    model = make("gpt2", torch.bfloat16)
    how = {"method": "full", "batch_size": 6, "learning_rate": 2e-5, "lr_scheduler_type": "constant"}
    one, many = (train(model, DATA, max_steps=n, **how) for n in (1, 30))
    changed = [sum(int((t != model.get_parameter(n)).sum()) for n, t in tuned.tensors.items()) for tuned in (one, many)]
    assert {t.dtype for t in many.tensors.values()} == {torch.bfloat16}
    assert changed[1] > 3 * changed[0]
    masters = train(make("gpt2").to(torch.bfloat16).float(), DATA, max_steps=30, **how)
    error, moved = 0.0, 0.0
    for n, t in many.tensors.items():
        before = model.get_parameter(n).detach().float()
        error += float((t.float() - masters.tensors[n]).square().sum())
        moved += float((masters.tensors[n] - before).square().sum())
    assert error < moved


class Fail:
    def __init__(self, error):
        self.error = error

    def on_step(self, *_):
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, CapacityError("full"), RuntimeError("any")])
@pytest.mark.parametrize("method", ["full", "top2"])
def test_the_base_is_given_back_to_the_bit_after_an_error(error, method):
    with load(make("gpt2", torch.bfloat16)) as base:
        hf, fingerprint = base.hf, base.fingerprint
        before = {n: (p.data_ptr(), p.detach().clone(), p.requires_grad) for n, p in hf.named_parameters()}
        with pytest.raises(error if isinstance(error, type) else type(error)):
            train(base, DATA, method=method, callbacks=[Fail(error)], **HOW)
        for n, p in hf.named_parameters():
            address, values, flag = before[n]
            assert (p.data_ptr(), p.requires_grad, p.grad) == (address, flag, None)
            assert torch.equal(p, values)
        assert base.fingerprint == fingerprint
        tuned = train(base, DATA, method=method, **HOW)
        assert tuned.base == fingerprint == base.fingerprint


def test_weights_without_finite_gradients_fail():
    model = make("gpt2")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ConfigError, match="gradient was not finite"):
        train(model, DATA, method="full", **{**HOW, "learning_rate": 1e6, "max_steps": 40})
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_names_are_trained_one_after_the_other():
    model, data = make("gpt2", torch.float64), {"a": rows(3, 4), "b": rows(4, 5)}
    run = train(model, data, method="top2", sweep={"learning_rate": [1e-3, 1e-4]}, **{**HOW, "learning_rate": None})
    alone = train(model, data["b"], method="top2", **{**HOW, "learning_rate": 1e-4})
    assert len(run) == 4
    assert run["b,learning_rate=0.0001"].digest == alone.digest


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"prefix_length": 3}, "prefix_length"),
        ({"init": "random"}, "init"),
        ({"init_text": "a"}, "init_text"),
        ({"lora_rank": 3}, "lora_rank"),
        ({"num_examples": 3}, "num_examples"),
        ({"store": "store"}, "store"),
        ({"on_top_of": "a"}, "on_top_of"),
        ({"sweep": {"prefix_length": [1, 2]}}, "prefix_length"),
        ({"prefix_config": {"layers": [1]}}, "layers"),
    ],
)
def test_options_that_the_method_does_not_read_are_refused_before_any_work(tmp_path, monkeypatch, options, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"{name}: method 'full' does not read it"):
        train("no/such-model", [{}], method="full", **options)
    assert not list(tmp_path.iterdir())
