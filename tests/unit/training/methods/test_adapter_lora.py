"""Methods ``adapter`` and ``lora`` equal a dense model and PEFT's model after steps, and give the base back."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

import causal_lms
import dense
import prefixfast
import tiny
from cut_runs import Cut, CutAt
from prefixfast import ConfigError, TunedWeights, generate, score, train
from prefixfast.model.tuned.adapter import new_adapters
from prefixfast.training.estimate import estimate
from token_rows import rows

DATA = rows(0, 6)
HOW = {
    "batch_size": 3,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 1,
    "weight_decay": 0.01,
    "shuffle": False,
    "seed": 5,
}
METHODS = {"adapter": {"adapter_size": 0.05}, "lora": {"lora_rank": 4}}


def plain_loop(parameters, logits_of):
    """Gradient norms of steps of torch's AdamW on single rows.

    Args:
        parameters: Trained tensors, which are changed.
        logits_of: Function from token ids ``[N]`` to logits ``[N, V]``.
    """
    optimizer = torch.optim.AdamW(parameters, lr=HOW["learning_rate"], weight_decay=HOW["weight_decay"])
    schedule = get_linear_schedule_with_warmup(optimizer, HOW["warmup_steps"], HOW["max_steps"])
    norms = []
    for step in range(HOW["max_steps"]):
        batch = [DATA[(3 * step + i) % len(DATA)] for i in range(3)]
        total = sum(sum(label != -100 for label in r["labels"]) for r in batch)
        optimizer.zero_grad()
        for r in batch:
            logits, labels = logits_of(torch.tensor(r["input_ids"]))[:-1], torch.tensor(r["labels"])[1:]
            (F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) / total).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        schedule.step()
    return norms


class Norms:
    def __init__(self):
        self.found = []

    def on_step(self, step, losses, grad_norms, active):
        self.found.append(float(grad_norms[0]))


def unlike(a, b):
    """Largest difference of two tensors by name."""
    assert set(a) == set(b)
    return max(float((a[n] - b[n]).detach().abs().max()) for n in a)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_equal_those_of_a_dense_model(family):
    model, seen = tiny.make(family, dtype=torch.float64), Norms()
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    tuned = train(model, DATA, method="adapter", callbacks=[seen], **METHODS["adapter"], **HOW)
    with prefixfast.load(model) as base:
        start = new_adapters(base, tuned.options["bottleneck"], HOW["seed"])
    expected = {n: t.clone().requires_grad_() for n, t in start.items()}
    norms = plain_loop(list(expected.values()), lambda ids: dense.logits(family, weights, ids, expected))
    limit = {"gpt2": 1e-9, "llama": 1e-4}[family]  # transformers computes Llama's norms and angles in fp32
    assert seen.found == pytest.approx(norms, rel=limit)
    assert unlike(tuned.tensors, expected) < limit
    assert unlike(tuned.tensors, start) > 1e-2
    assert unlike(model.state_dict(), weights) == 0
    assert abs(tuned.num_stored / sum(t.numel() for t in weights.values()) - 0.05) < 0.01
    assert tuned.num_trained == tuned.num_stored


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_equals_peft(family):
    model, seen = tiny.make(family, dtype=torch.float64), Norms()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tuned = train(model, DATA, method="lora", lora_rank=4, lora_alpha=12, callbacks=[seen], **HOW)
    assert unlike(model.state_dict(), before) == 0
    other = tiny.make(family, dtype=torch.float64)
    torch.manual_seed(HOW["seed"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12)
        theirs = get_peft_model(other, config).double().eval()
    own = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in own.items()}
    norms = plain_loop(list(own.values()), lambda ids: theirs(input_ids=ids[None]).logits[0])
    tensors = {f"base_model.model.{n.replace('.weight', '.default.weight')}": t for n, t in tuned.tensors.items()}
    assert seen.found == pytest.approx(norms, rel=1e-8)
    assert unlike(tensors, own) < 1e-8
    assert unlike(tensors, start) > 1e-2


@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_memory_options(method):
    how = {"method": method, **METHODS[method], **HOW}
    one, two = (
        train(tiny.make("qwen3", dtype=torch.float64), DATA, **how, **options)
        for options in ({}, {"token_budget": 11, "gradient_checkpointing": True})
    )
    assert unlike(one.tensors, two.tensors) < 1e-9


@pytest.mark.parametrize(("method", "dtype"), [("adapter", torch.float32), ("lora", torch.bfloat16)])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, method, dtype):
    how = {**HOW, "method": method, **METHODS[method], "save_steps": 1, "eval_data": rows(1, 3), "eval_steps": 1}
    model = tiny.make("gpt2", dtype=dtype)
    whole = train(model, DATA, output_dir=tmp_path / "whole", **how)
    with pytest.raises(Cut):
        train(model, DATA, output_dir=tmp_path / "cut", callbacks=[CutAt(3)], **how)
    resumed = train(model, DATA, output_dir=tmp_path / "cut", resume=True, **how)
    assert resumed.digest == whole.digest == TunedWeights.from_pretrained(tmp_path / "cut").digest
    assert {t.dtype for t in resumed.tensors.values()} == {torch.float32}
    assert train(model, DATA, output_dir=tmp_path / "cut", resume=True, **how).digest == whole.digest


@pytest.mark.parametrize("method", METHODS)
def test_the_base_is_given_back_after_an_error(method):
    class Fail:
        def on_step(self, *_):
            raise ZeroDivisionError

    how = {"method": method, **METHODS[method], **HOW}
    with prefixfast.load(tiny.make("gpt2", dtype=torch.bfloat16)) as base:
        state = [(n, id(m), m.training, len(m._forward_hooks)) for n, m in base.hf.named_modules()]
        keys, fingerprint = list(base.hf.state_dict()), base.fingerprint
        with pytest.raises(ZeroDivisionError):
            train(base, DATA, callbacks=[Fail()], **how)
        tuned = train(base, DATA, **how)
        assert [(n, id(m), m.training, len(m._forward_hooks)) for n, m in base.hf.named_modules()] == state
        assert (list(base.hf.state_dict()), base.fingerprint, tuned.base) == (keys, fingerprint, fingerprint)
        assert not any(p.requires_grad for p in base.hf.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_counts_what_training_trains(method):
    how = {"method": method, **METHODS[method], **HOW}
    found, tuned = estimate(tiny.make("llama"), DATA, **how), train(tiny.make("llama"), DATA, **how)
    assert found.trained_numbers == found.stored_numbers == tuned.num_trained == tuned.num_stored


@pytest.mark.parametrize(("method", "dtype"), [("adapter", torch.bfloat16), ("lora", torch.float32)])
def test_generation_with_beams_and_scores_use_the_weights(method, dtype):
    how = {**HOW, "method": method, **METHODS[method], "max_steps": 40, "learning_rate": 0.02, "batch_size": 6}
    with prefixfast.load(tiny.make("llama", dtype=dtype)) as model:
        tuned = train(model, DATA, eval_data=DATA, **how)
        metrics = tuned.training["metrics"]
        assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.5
        prompts = [r["input_ids"][:3] for r in DATA]
        for options in ({}, {"num_beams": 3}):
            fields = {"max_new_tokens": 5, "min_new_tokens": 5, **options}
            got = [g.token_ids for g in generate(prompts, tuned, model=model, **fields)]
            plain = [g.token_ids for g in generate(prompts, model=model, **fields)]
            assert got != plain
            assert [g.token_ids for g in generate(prompts, model=model, **fields)] == plain
        with_them, without = (score(DATA, *given, model=model) for given in ((tuned,), ()))
        mean = -sum(s.logprob for s in with_them) / sum(len(s.token_ids) for s in with_them)
        assert mean == pytest.approx(metrics["eval_loss"], rel=0.05 if dtype == torch.bfloat16 else 1e-4)
        assert sum(s.logprob for s in with_them) > sum(s.logprob for s in without) + len(DATA)


def test_greedy_tokens_with_lora_are_those_of_peft(tmp_path):
    from peft import PeftModel

    with prefixfast.load(tiny.make("gpt2")) as model:
        tuned = train(model, DATA, method="lora", **{**HOW, "max_steps": 30, "learning_rate": 0.05})
        prompts = [r["input_ids"][:4] for r in DATA]
        ours = [g.token_ids for g in generate(prompts, tuned, model=model, max_new_tokens=6, min_new_tokens=6)]
    tuned.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(tiny.make("gpt2"), tmp_path).eval()
    for prompt, got in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        made = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
        assert got == made[0, len(prompt) :].tolist()


def test_a_lora_folder_of_peft_is_read_and_weights_that_do_not_fit_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(tiny.make("llama"), LoraConfig(task_type="CAUSAL_LM", r=4)).eval()
    with torch.no_grad():
        for p in (p for p in theirs.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.3)
    theirs.save_pretrained(tmp_path / "peft")
    tuned = TunedWeights.from_pretrained(tmp_path / "peft")
    tuned.save_pretrained(tmp_path / "ours")
    assert TunedWeights.from_pretrained(tmp_path / "ours").digest == tuned.digest
    prompts = [r["input_ids"][:4] for r in DATA]
    with prefixfast.load(tiny.make("llama")) as model:
        ours = [g.token_ids for g in generate(prompts, tuned, model=model, max_new_tokens=6, min_new_tokens=6)]
    for prompt, got in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        made = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
        assert got == made[0, len(prompt) :].tolist()
    with prefixfast.load(tiny.make("gpt2")) as other, pytest.raises(ConfigError):
        generate(prompts, tuned, model=other, max_new_tokens=2)


def test_a_base_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="longcat_flash"):
        train(causal_lms.make("longcat_flash"), DATA, method="adapter", **HOW)


def test_a_command_generates_with_lora_of_peft(tmp_path, folder, cli):
    """The folder has no file of prefixfast."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4)).eval()
    with torch.no_grad():
        for p in (p for p in theirs.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    theirs.save_pretrained(tmp_path / "lora")
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "abc"}\n{"prompt": "de"}\n')
    texts = {}
    for name, given in (("with", ("--prefix", tmp_path / "lora")), ("without", ())):
        how = ("--model", folder, "--max-new-tokens", 6, "--min-new-tokens", 6, "--dtype", "float32")
        done = cli("generate", data, "-o", tmp_path / f"{name}.txt", *how, *given)
        assert done.code == 0, done.err
        texts[name] = (tmp_path / f"{name}.txt").read_text()
    tuned = TunedWeights.from_pretrained(tmp_path / "lora")
    ours = generate(["abc", "de"], tuned, model=folder, max_new_tokens=6, min_new_tokens=6, dtype="float32")
    assert [" ".join(g.text.split("\n")) for g in ours] == texts["with"].split("\n")[:2]
    assert texts["with"] != texts["without"]
