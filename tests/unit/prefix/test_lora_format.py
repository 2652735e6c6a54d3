"""Folders of LoRA adapters: PEFT reads what is written, and what PEFT has trained is read with its results."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from composed import error
from prefixfast import DataError, load
from prefixfast.attention.plan import plain_plan
from prefixfast.model.tuned.lora import applied_lora, new_lora
from prefixfast.prefix.lora_format import lora_files, read_lora

IDS = torch.tensor([1, *range(3, 20)])
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {
    "default": {},
    "all linear layers": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "the output layer": {"target_modules": ["lm_head", "v_proj"]},
    "scaled by the root of the rank": {"use_rslora": True},
    "ranks by layer": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
}


def trained(folder, family="llama", **fields):
    """PEFT's model with an adapter after two steps, which is saved."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(tiny.make(family), LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1, **fields))
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        peft(input_ids=IDS[None], labels=IDS[None]).loss.backward()
        optimizer.step()
    peft.save_pretrained(folder, save_embedding_layers=False)
    return peft.eval()


def ours(family, tensors, fields):
    """Logits ``[N, V]`` and losses ``[N - 1]`` with an adapter."""
    with load(tiny.make(family)) as base:
        plan = plain_plan([len(IDS)], backend=base.backend)
        with applied_lora(base, tensors, fields), torch.no_grad():
            losses = base.losses(plan.with_logits_at(torch.arange(len(IDS) - 1)), IDS, IDS[1:])
            return base.forward(plan, IDS), losses


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_has_its_results(tmp_path, kind):
    theirs = trained(tmp_path, **KINDS[kind])
    found = read_lora(tmp_path)
    logits, losses = ours("llama", found.tensors, found.fields)
    expected = theirs(input_ids=IDS[None]).logits[0]
    assert error(logits, expected) < 1e-5
    assert error(losses, F.cross_entropy(expected[:-1], IDS[1:], reduction="none")) < 1e-5
    assert error(tiny.make("llama")(input_ids=IDS[None]).logits[0], expected) > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_peft_reads_what_is_written(tmp_path, family):
    with load(tiny.make(family)) as base:
        tensors, fields = new_lora(base, {"r": 4, "lora_alpha": 12}, 0)
    tensors = {
        n: (t + torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) * 0.2) for n, t in tensors.items()
    }
    for name, data in lora_files(tensors, fields, "some/base").items():
        (tmp_path / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = PeftModel.from_pretrained(tiny.make(family), tmp_path).eval()
    assert theirs.peft_config["default"].base_model_name_or_path == "some/base"
    expected = theirs(input_ids=IDS[None]).logits[0]
    found = read_lora(tmp_path)
    assert all(torch.equal(t, tensors[n]) for n, t in found.tensors.items())
    assert set(found.tensors) == set(tensors)
    assert found.base_name == "some/base"
    for by in (fields, found.fields):
        assert error(ours(family, tensors, by)[0], expected) < 1e-5


@pytest.mark.parametrize(
    "changed",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["w"]},
        {"layer_replication": [[0, 2]]},
        {"rank_pattern": {"(a+)+": 2}},
        {"alpha_pattern": {"q_proj": True}},
        {"r": 0},
        {"r": None},
        {"lora_alpha": "8"},
        {"peft_type": "IA3"},
        {"peft_type": ["LORA"]},
        {"task_type": "SEQ_CLS"},
        {"a field of a later version": 1},
        {"base_model_name_or_path": 3},
    ],
    ids=str,
)
def test_a_configuration_that_changes_more_is_refused(tmp_path, changed):
    trained(tmp_path)
    read_lora(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | changed
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(DataError) as caught:
        read_lora(tmp_path)
    assert CONFIG in str(caught.value)


def test_damaged_tensors_are_refused(tmp_path):
    trained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name, t = next(iter(tensors.items()))
    for wrong in (
        {},
        {name: t},
        {**tensors, name: t * torch.nan},
        {**tensors, name: t[0]},
        {**tensors, name: t.long()},
        {**tensors, "base_model.model.lm_head.weight": t + 0},
        {**tensors, "base_model.model.model.embed_tokens.lora_embedding_A": t + 0},
    ):
        save_file(wrong, tmp_path / WEIGHTS)
        with pytest.raises(DataError, match=WEIGHTS):
            read_lora(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(DataError):
        read_lora(tmp_path)
