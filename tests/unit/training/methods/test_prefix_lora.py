"""Method ``prefix+lora`` equals a dense model after steps, and the prefix acts with its LoRA alone."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import get_linear_schedule_with_warmup

import merged
import prefixfast
import seq2seq
import tiny
from cut_runs import Cut, CutAt
from prefixfast import (
    BaseMismatchError,
    ConfigError,
    DataError,
    Prefix,
    RequestError,
    TunedWeights,
    generate,
    score,
    train,
)
from prefixfast.model.tuned.lora import new_lora
from prefixfast.training.estimate import estimate
from token_rows import rows

DATA, HELD_OUT = rows(0, 6), rows(1, 4)
RATE, LORA_RATE, DECAY, WARMUP, STEPS = 0.05, 0.01, 0.02, 1, 4
START = {"prefix_length": 4, "init": "random", "reparameterization": "none", "seed": 3, "shuffle": False}
HOW: dict[str, Any] = {
    **START,
    "batch_size": 3,
    "max_steps": STEPS,
    "learning_rate": RATE,
    "warmup_steps": WARMUP,
    "weight_decay": DECAY,
}
LORA = {"r": 4, "lora_alpha": 6, "target_modules": {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "down_proj"]}}


def config(family: str, **fields: Any) -> LoraConfig:
    return LoraConfig(**{**LORA, "target_modules": LORA["target_modules"][family], **fields})


def joint(model: Any, family: str = "llama", **fields: Any) -> TunedWeights:
    return train(model, DATA, lora=config(family), lora_learning_rate=LORA_RATE, **{**HOW, **fields})


class Norms:
    def __init__(self):
        self.found = []

    def on_step(self, step, losses, grad_norms, active):
        self.found.append(float(grad_norms[0]))


def initial_rows(model) -> dict[str, torch.Tensor]:
    """Keys and values before the first step, those of a run whose learning rate is as good as zero."""
    return dict(train(model, DATA, **{**HOW, "learning_rate": 1e-30, "weight_decay": 0.0, "max_steps": 1}).kv)


def dense_steps(model, kv, tensors) -> list[float]:
    """Gradient norms of steps of torch's AdamW on dense weights, which change ``kv`` and ``tensors``."""
    groups = [(kv, RATE), (tensors, LORA_RATE)]
    every = [t.requires_grad_() for own, _ in groups for t in own.values()]
    optimizer = torch.optim.AdamW(
        [{"params": list(own.values()), "lr": rate} for own, rate in groups], weight_decay=DECAY
    )
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    norms = []
    for step in range(STEPS):
        batch = [DATA[(3 * step + i) % len(DATA)] for i in range(3)]
        total = sum(sum(label != -100 for label in r["labels"]) for r in batch)
        optimizer.zero_grad()
        for r in batch:
            weights = merged.updates(model, tensors, LORA["lora_alpha"] / LORA["r"])
            found = merged.logits(model, weights, kv, torch.tensor(r["input_ids"]))[:-1]
            labels = torch.tensor(r["labels"])[1:]
            (F.cross_entropy(found, labels, reduction="sum", ignore_index=-100) / total).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(every, 1.0)))
        optimizer.step()
        schedule.step()
    return norms


def unlike(a, b) -> float:
    assert set(a) == set(b)
    return max(float((a[n] - b[n]).detach().abs().max()) for n in a)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_steps_equal_those_of_a_dense_model(family):
    """The gradients of rows and updates, their common norm, and both learning rates."""
    model, seen = tiny.make(family, dtype=torch.float64), Norms()
    kv = initial_rows(model)
    with prefixfast.load(model) as base:
        fields = {**LORA, "target_modules": LORA["target_modules"][family]}
        tensors = {n: t.detach().clone() for n, t in new_lora(base, fields, HOW["seed"])[0].items()}
    start, first = dict(kv), {n: t.clone() for n, t in tensors.items()}
    kv = {n: t.clone() for n, t in kv.items()}
    tuned = joint(model, family, callbacks=[seen])
    norms = dense_steps(model, kv, tensors)
    assert seen.found == pytest.approx(norms, rel=1e-9)
    assert unlike(tuned.prefix.kv, kv) < 1e-9
    assert unlike(tuned.tensors, tensors) < 1e-9
    assert unlike(kv, start) > 1e-2
    assert unlike(tensors, first) > 1e-3


MLP = {"init": "zero", "reparameterization": "mlp", "learning_rate": 1e-3}


@pytest.mark.parametrize("options", [{}, pytest.param(MLP, marks=pytest.mark.long)])
def test_with_lora_frozen_at_zero_the_prefix_is_that_of_plain_training(options):
    how = {**HOW, **options}
    plain = train(tiny.make("llama", dtype=torch.float64), DATA, **how)
    frozen = train(tiny.make("llama", dtype=torch.float64), DATA, lora=config("llama"), lora_learning_rate=0.0, **how)
    assert frozen.prefix.digest == plain.digest
    assert frozen.num_trained == plain.num_trained
    assert not any(t.any() for n, t in frozen.tensors.items() if "lora_B" in n)


def test_requests_see_the_prefix_with_its_lora_and_others_see_neither():
    model, plain = (tiny.make("llama", dtype=torch.float64) for _ in range(2))
    with prefixfast.load(model) as base:
        other = train(base, DATA, **{**HOW, "seed": 9})
        before = score(HELD_OUT, other, model=base)
        tuned = joint(base, max_steps=20)
        state = {n: t.clone() for n, t in base.hf.state_dict().items()}
        found = score(HELD_OUT, tuned, model=base)
        for row, got in zip(HELD_OUT, found, strict=True):
            ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])[1:]
            logprobs = merged.of_tuned(plain, tuned, ids)[:-1].log_softmax(-1)
            expected = logprobs[labels != -100].gather(1, labels[labels != -100][:, None])[:, 0]
            assert got.token_logprobs == pytest.approx(expected.tolist(), rel=1e-9)
            assert (got.prefix_digest, got.usage["prefix_rows"]) == (tuned.digest, 4)
        prompts = [r["input_ids"][:5] for r in DATA]
        fields = {"max_new_tokens": 5, "min_new_tokens": 5}
        for ids, got in zip(prompts, generate(prompts, tuned, model=base, **fields), strict=True):
            text = list(ids)
            for _ in range(5):
                step = merged.of_tuned(plain, tuned, torch.tensor(text))[-1].clone()
                step[tiny.EOS] = -torch.inf
                text.append(int(step.argmax()))
            assert (got.token_ids, got.prefix_digest) == (text[len(ids) :], tuned.digest)
        assert all(torch.equal(t, state[n]) for n, t in base.hf.state_dict().items())
        assert score(HELD_OUT, other, model=base) == before
        beams = [g.token_ids for g in generate(prompts, tuned, model=base, num_beams=3, **fields)]
        assert beams != [g.token_ids for g in generate(prompts, other, model=base, num_beams=3, **fields)]


def test_a_folder_holds_an_adapter_that_peft_reads_and_the_prefix(tmp_path):
    model = tiny.make("llama", dtype=torch.float64)
    tuned = joint(model, output_dir=tmp_path / "run")
    again = TunedWeights.from_pretrained(tmp_path / "run")
    assert (again.digest, again.prefix.digest, again.prefix.base) == (
        tuned.digest,
        tuned.prefix.digest,
        tuned.prefix.base,
    )
    assert again.num_stored == tuned.num_trained
    live = PeftModel.from_pretrained(tiny.make("llama", dtype=torch.float64), tmp_path / "run").double().eval()
    expected = [s.logprob for s in score(HELD_OUT, tuned, model=model)]
    assert [s.logprob for s in score(HELD_OUT, again.prefix, model=live)] == pytest.approx(expected, rel=1e-9)
    again.prefix.save_pretrained(tmp_path / "prefix")
    alone = Prefix.from_pretrained(tmp_path / "prefix")
    for base in (model, live.merge_and_unload()):
        with pytest.raises(BaseMismatchError, match="adapters of PEFT"):
            score(HELD_OUT, alone, model=base)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    how = {"save_steps": 1, "eval_data": HELD_OUT, "eval_steps": 1}
    model = tiny.make("llama", dtype=torch.bfloat16)
    whole = joint(model, output_dir=tmp_path / "whole", **how)
    with pytest.raises(Cut):
        joint(model, output_dir=tmp_path / "cut", callbacks=[CutAt(3)], **how)
    resumed = joint(model, output_dir=tmp_path / "cut", resume=True, **how)
    assert resumed.digest == whole.digest == TunedWeights.from_pretrained(tmp_path / "cut").digest
    assert {t.dtype for t in (*resumed.tensors.values(), *resumed.prefix.kv.values())} == {torch.float32}
    with pytest.raises(ConfigError, match="lora"):
        train(model, DATA, lora=config("llama", r=3), output_dir=tmp_path / "cut", resume=True, **HOW)


def test_several_names_have_lora_of_their_own_and_options_take_the_place_of_a_configuration():
    model = tiny.make("llama", dtype=torch.float64)
    run = train(model, {"a": DATA, "b": HELD_OUT}, method="prefix+lora", lora_rank=2, **HOW)
    alone = train(model, HELD_OUT, method="prefix+lora", lora_rank=2, **HOW)
    assert run["b"].digest == alone.digest != run["a"].digest
    assert alone.options["target_modules"] == ["q_proj", "v_proj"]
    found = estimate(model, HELD_OUT, method="prefix+lora", lora_rank=2, **HOW)
    assert found.trained_numbers == found.stored_numbers == alone.num_trained == alone.num_stored
    only = train(model, DATA, method="lora", lora=config("llama", r=2), max_steps=2)
    assert only.prefix is None
    assert only.options["r"] == 2


@pytest.mark.long
def test_an_encoder_decoder_base():
    model = seq2seq.make_seq2seq("bart").double()
    texts = [[3 + i % 90 for i in r["input_ids"]] for r in DATA]
    data = [{"input_ids": ids, "labels": ids[::-1]} for ids in texts]
    how = {**HOW, "max_steps": 15, "lora_learning_rate": LORA_RATE}
    tuned = train(model, data, lora=LoraConfig(r=2, target_modules=["q_proj"]), eval_data=data, **how)
    found = score(data, tuned, model=model)
    mean = -sum(s.logprob for s in found) / sum(len(s.token_ids) for s in found)
    assert mean == pytest.approx(tuned.training["metrics"]["eval_loss"], rel=1e-9)
    assert tuned.prefix.sites == ("enc", "self", "cross")


def live(family: str, *, dtype=torch.float64, **fields: Any) -> PeftModel:
    """A model with LoRA that acts."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = config(family, init_lora_weights=False, task_type="CAUSAL_LM", **fields)
        return get_peft_model(tiny.make(family, dtype=dtype), own).to(dtype)


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.long), "llama"])
def test_a_prefix_on_a_base_with_live_lora(family):
    """Its LoRA has dropout and is in training mode, as PEFT makes it."""
    model, seen = live(family, lora_dropout=0.5), Norms()
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    dense, at_rest = live(family).merge_and_unload().eval(), Norms()
    prefix = train(model, DATA, callbacks=[seen], **HOW)
    expected = train(dense, DATA, callbacks=[at_rest], **HOW)
    assert seen.found == pytest.approx(at_rest.found, rel=1e-9)
    assert unlike(prefix.kv, expected.kv) < 1e-9
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == flags
    model.eval()
    ids = torch.tensor(DATA[0]["input_ids"])
    found = score([DATA[0]["input_ids"][:3]], prefix, targets=[ids[3:].tolist()], model=model)[0]
    logprobs = merged.logits(dense, {}, prefix.kv, ids)[2:-1].log_softmax(-1)
    assert found.token_logprobs == pytest.approx(logprobs.gather(1, ids[3:, None])[:, 0].tolist(), rel=1e-9)


def test_what_is_not_known_to_be_right_is_refused(tmp_path):
    model = tiny.make("llama")
    tuned = joint(model)
    wrong: dict[str, Any] = {
        "store": lambda: joint(model, store=tmp_path / "store"),
        "on_top_of": lambda: joint(model, on_top_of=tuned.prefix),
        "method": lambda: joint(model, method="prefix"),
        "lora_rank": lambda: joint(model, lora_rank=3),
        "lora_alpha": lambda: joint(model, sweep={"lora_alpha": [1, 2]}),
        "LoraConfig": lambda: train(model, DATA, lora={"r": 4}, **HOW),
        "lora_dropout": lambda: train(model, DATA, lora=config("llama", lora_dropout=0.1), **HOW),
        "use_dora": lambda: train(model, DATA, lora=config("llama", use_dora=True), **HOW),
        "pissa": lambda: train(model, DATA, lora=config("llama", init_lora_weights="pissa"), **HOW),
        "Embedding": lambda: train(model, DATA, lora=config("llama", target_modules=["embed_tokens"]), **HOW),
        "modules_to_save": lambda: train(model, DATA, lora=config("llama", modules_to_save=["norm"]), **HOW),
        "absent": lambda: train(model, DATA, lora=config("llama", target_modules=["absent"]), **HOW),
        "merge_and_unload": lambda: joint(live("llama")),
    }
    for words, call in wrong.items():
        with pytest.raises(ConfigError, match=words):
            call()
    with pytest.raises(RequestError, match="lora"):
        generate([[5, 6], [7]], [tuned, None], model=model)
    with prefixfast.Engine(model, max_num_seqs=2, max_model_len=32) as engine, pytest.raises(RequestError):
        engine.submit([5, 6], tuned)
    with pytest.raises(ConfigError):
        train(model, DATA, on_top_of=tuned, **HOW)


def without_key(folder) -> None:
    meta = json.loads((folder / "prefixfast.json").read_bytes())
    del meta["prefix"]
    (folder / "prefixfast.json").write_text(json.dumps(meta))


def other_rows(folder) -> None:
    kv = load_file(folder / "prefix.safetensors")
    save_file({n: t + 1 for n, t in kv.items()}, folder / "prefix.safetensors")


@pytest.mark.parametrize("damage", [without_key, other_rows, lambda folder: (folder / "prefix.safetensors").unlink()])
def test_a_folder_whose_prefix_is_not_that_of_its_lora_is_refused(tmp_path, damage):
    joint(tiny.make("llama"), max_steps=1, output_dir=tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError):
        TunedWeights.from_pretrained(tmp_path)


def test_commands(tmp_path, folder, cli):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "abc", "completion": "de"}\n' * 3)
    how = ("--method", "prefix+lora", "--lora-rank", 2, "--max-steps", 2, "--dtype", "float32")
    done = cli("train", folder, data, "-o", tmp_path / "out", *how)
    assert done.code == 0, done.err
    tuned = TunedWeights.from_pretrained(tmp_path / "out")
    assert (tuned.training["method"], tuned.prefix.length) == ("prefix+lora", 10)
    done = cli(
        "generate", data, "-o", tmp_path / "a.txt", "--prefix", tmp_path / "out", "--max-new-tokens", 4, *how[-2:]
    )
    assert done.code == 0, done.err
    expected = generate(["abc"] * 3, tuned, model=folder, max_new_tokens=4, dtype="float32")
    assert (tmp_path / "a.txt").read_text().split("\n")[:3] == [" ".join(g.text.split("\n")) for g in expected]
