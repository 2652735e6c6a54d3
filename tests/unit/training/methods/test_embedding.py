"""Method ``embedding``: PEFT's PROMPT_TUNING after steps, many prefixes at once, resume, refusals and generation."""

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

import causal_lms
import prefixfast
import tiny
from cut_runs import Cut, CutAt
from prefixfast import ConfigError, Prefix, generate, train
from prefixfast.training.estimate import estimate
from token_rows import distance, rows

DATA = {"a": rows(0, 6), "b": rows(1, 4), "c": rows(2, 5)}
HOW = {"method": "embedding", "prefix_length": 4, "init": "random", "batch_size": 3, "max_steps": 6, "dtype": "auto"}


def peft_run(hf, own, initial, steps, rate):
    """PROMPT_TUNING on whole batches of all rows with torch's AdamW."""
    peft = get_peft_model(hf, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(initial)))
    table = peft.prompt_encoder["default"].embedding.weight
    table.data = initial.to(hf.dtype)
    width = max(len(r["input_ids"]) for r in own)
    ids, labels, mask = (
        torch.tensor([r[key] + [pad] * (width - len(r[key])) for r in own])
        for key, pad in (("input_ids", 0), ("labels", -100), ("mask", 0))
    )
    optimizer = torch.optim.AdamW([table], lr=rate, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        peft(input_ids=ids, labels=labels, attention_mask=mask).loss.backward()
        optimizer.step()
    return peft


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_prefix_is_that_of_peft_after_steps(tmp_path, family):
    own = [{**r, "mask": [1] * len(r["input_ids"])} for r in DATA["a"]]
    initial = torch.randn(4, 32, generator=torch.Generator().manual_seed(7))
    how = {"lr_scheduler_type": "constant", "weight_decay": 0.01, "max_grad_norm": 0, "learning_rate": 0.05, "seed": 7}
    ours = train(tiny.make(family), DATA["a"], **{**HOW, "batch_size": 6}, **how)
    theirs = {}
    for steps in (0, 6):
        peft_run(tiny.make(family), own, initial, steps, 0.05).save_pretrained(tmp_path / str(steps))
        theirs[steps] = Prefix.from_pretrained(tmp_path / str(steps), model=tiny.make(family))
    assert distance(ours, theirs[6]) < 1e-4
    assert distance(theirs[0], theirs[6]) > 1e-2
    assert ours.training["num_trained"] == initial.numel()


def test_many_prefixes_at_once_equal_those_alone():
    model = tiny.make("qwen3", dtype=torch.float64)
    together = train(model, DATA, eval_data={n: rows(9, 3) for n in DATA}, eval_steps=2, **HOW)
    for name, own in DATA.items():
        alone = train(model, own, eval_data=rows(9, 3), eval_steps=2, **HOW)
        assert distance(alone, together[name]) < 1e-9
        assert abs(alone.training["metrics"]["eval_loss"] - together.metrics[name]["eval_loss"]) < 1e-9
    assert distance(together["a"], together["b"]) > 1e-3


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    how = {**HOW, "save_steps": 1, "eval_steps": 2, "eval_data": {n: rows(9, 3) for n in DATA}}
    with prefixfast.load(tiny.make("gpt2")) as model:
        whole = train(model, DATA, output_dir=tmp_path / "whole", **how)
        for cut in (2, 4):
            with pytest.raises(Cut):
                train(model, DATA, output_dir=tmp_path / "cut", resume=True, callbacks=[CutAt(cut)], **how)
        run = train(model, DATA, output_dir=tmp_path / "cut", resume=True, **how)
        assert {n: p.digest for n, p in run.items()} == {n: p.digest for n, p in whole.items()}


def test_a_dry_run_counts_the_embeddings():
    found = estimate(tiny.make("llama"), DATA, **HOW)
    assert (found.trained_numbers, found.stored_numbers) == (4 * 32, 4 * 3 * 2 * 2 * 8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"reparameterization": "mlp"},
        {"layers": [0]},
        {"frozen_rows": 1},
        {"prefix_dropout": 0.1},
        {"pos_start": "zero"},
        {"lora_rank": 2},
        {"init": "zero"},
    ],
    ids=str,
)
def test_options_that_embeddings_do_not_have_are_refused(wrong):
    name = next(iter(wrong))
    with pytest.raises(ConfigError, match=name):
        train(tiny.make("gpt2"), DATA["a"], **{**HOW, **wrong})


def test_other_prefixes_and_bases_that_need_token_ids_are_refused():
    prefix = train(tiny.make("gpt2"), DATA["a"], **HOW)
    for wrong in ({"init": prefix}, {"on_top_of": prefix}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            train(tiny.make("gpt2"), DATA["a"], **{**HOW, **wrong})
    with pytest.raises(ConfigError, match="embedding"):
        train(causal_lms.make("gemma4_text"), DATA["a"], **HOW)


def test_a_base_in_bf16_trains_and_generates_with_beams():
    with prefixfast.load(tiny.make("llama", dtype=torch.bfloat16)) as model:
        prefix = train(model, DATA["a"], eval_data=DATA["a"], **{**HOW, "max_steps": 30})
        assert {t.dtype for t in prefix.kv.values()} == {torch.float32}
        metrics = prefix.training["metrics"]
        assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.3
        prompts = [r["input_ids"][:2] for r in DATA["a"]]
        greedy, beams = (
            [g.token_ids for g in generate(prompts, prefix, model=model, max_new_tokens=4, num_beams=n)] for n in (1, 3)
        )
        assert len(greedy) == len(beams) == len(prompts)
