"""LoRA layers: initial values, logits and gradients of PEFT, and the base's own modules after."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

import causal_lms
import tiny
from composed import error
from prefixfast import ConfigError, load
from prefixfast.attention.plan import plain_plan
from prefixfast.model.tuned.lora import applied_lora, new_lora

TEXTS = [list(range(3, 12)), [5, 60, 61, 62], [7, 8]]
RANK, ALPHA, SEED = 4, 12, 7


def peft_model(hf, **fields):
    """PEFT's own model, with its initial values from the same seed."""
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(hf, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, **fields)).eval()


def noise(name, t):
    """Values of a trained B, which is zero at the start."""
    g = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(t.shape, generator=g).to(t) * 0.3


def snapshot(hf):
    """What a base must have back: modules, tensors, flags, attributes, hooks."""
    return (
        [(name, id(m), m.training, sorted(vars(m)), len(m._forward_hooks)) for name, m in hf.named_modules()],
        [(name, id(p), p.data_ptr(), p.requires_grad, p._version) for name, p in hf.named_parameters()],
        list(hf.state_dict()),
        sorted(vars(hf)),
    )


def packed_logits(base):
    plan = plain_plan([len(t) for t in TEXTS], backend=base.backend)
    return base.forward(plan, torch.tensor([i for t in TEXTS for i in t]))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt", "gemma2"])
def test_initial_values_logits_and_gradients_are_those_of_peft(family):
    theirs = peft_model(tiny.make(family))
    own = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    with load(tiny.make(family)) as base:
        tensors, fields = new_lora(base, {"r": RANK, "lora_alpha": ALPHA}, SEED)
        names = {n: f"base_model.model.{n.replace('.weight', '.default.weight')}" for n in tensors}
        assert set(names.values()) == set(own)
        assert all(torch.equal(tensors[n], own[names[n]]) for n in tensors)
        with torch.no_grad():
            for n, t in tensors.items():
                t.add_(noise(n, t))
                own[names[n]].copy_(t)
        plain = packed_logits(base)
        with applied_lora(base, tensors, fields):
            got = packed_logits(base)
        got.square().sum().backward()
    expected = torch.cat([theirs(input_ids=torch.tensor([t])).logits[0] for t in TEXTS])
    expected.square().sum().backward()
    assert error(got, expected) < 1e-5
    assert error(plain, expected) > 1e-2
    assert all(error(t.grad, own[names[n]].grad) < 1e-4 for n, t in tensors.items())


def test_a_family_that_peft_does_not_know_has_lora_in_all_linear_layers():
    with load(causal_lms.make("olmo2")) as base:
        tensors, fields = new_lora(base, {"r": RANK, "lora_alpha": ALPHA}, SEED)
        linear = {n for n, m in base.hf.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"}
        assert {n.rsplit(".", 2)[0] for n in tensors} == linear
        with applied_lora(base, tensors, fields):
            pass


def test_the_base_has_its_own_modules_back_also_after_errors():
    hf = tiny.make("gpt2").train()
    hf.transformer.wpe.weight.requires_grad_(False)
    at_first = snapshot(hf)
    with load(hf) as base:
        attached, logits = snapshot(hf), packed_logits(base)
        tensors, fields = new_lora(base, {"r": RANK, "lora_alpha": ALPHA}, SEED)
        assert snapshot(hf) == attached
        with applied_lora(base, tensors, fields):
            assert snapshot(hf) != attached
            packed_logits(base)
        assert snapshot(hf) == attached
        with pytest.raises(ZeroDivisionError), applied_lora(base, tensors, fields):
            raise ZeroDivisionError
        assert snapshot(hf) == attached
        name, t = next(iter(tensors.items()))
        for wrong in ({**tensors, name: t[:, :-1]}, {n: u for n, u in tensors.items() if n != name}, {"x": t}):
            with pytest.raises(ConfigError, match=r"LoRA"), applied_lora(base, wrong, fields):
                pass
            assert snapshot(hf) == attached
        with pytest.raises(ConfigError), applied_lora(base, tensors, {**fields, "target_modules": ["absent"]}):
            pass
        assert snapshot(hf) == attached
        assert torch.equal(packed_logits(base), logits)
    assert snapshot(hf) == at_first


def test_a_base_with_adapters_of_its_own_is_refused():
    theirs = peft_model(tiny.make("llama"))
    with load(theirs) as base, pytest.raises(ConfigError, match="merge_and_unload"):
        new_lora(base, {"r": RANK, "lora_alpha": ALPHA}, SEED)


def test_a_base_in_bf16_has_lora_in_fp32_and_computes_as_peft():
    theirs = peft_model(tiny.make("llama", dtype=torch.bfloat16))
    own = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    with load(tiny.make("llama", dtype=torch.bfloat16)) as base:
        tensors, fields = new_lora(base, {"r": RANK, "lora_alpha": ALPHA}, SEED)
        with torch.no_grad():
            for n, t in tensors.items():
                t.add_(noise(n, t))
                own[f"base_model.model.{n}"].copy_(t)
        plain = packed_logits(base)
        with applied_lora(base, tensors, fields):
            got = packed_logits(base)
        got.float().square().mean().backward()
        assert got.dtype == torch.bfloat16
        assert all(t.dtype == t.grad.dtype == torch.float32 for t in tensors.values())
    expected = torch.cat([theirs(input_ids=torch.tensor([t])).logits[0] for t in TEXTS])
    assert error(got, expected) < 0.05 < error(plain, expected)


def test_weights_are_packed_without_the_lora_layers():
    """The first generation with LoRA packs the weights of the base for all later ones."""
    one, two = (tiny.make("llama", dtype=torch.bfloat16) for _ in range(2))
    with load(one) as base, load(two) as other:
        tensors, fields = new_lora(base, {"r": RANK, "lora_alpha": ALPHA}, SEED)
        with applied_lora(base, tensors, fields):
            packed = base.prepack()
        plain = other.prepack()
        assert (packed.why_not, packed.nbytes, len(packed.modules)) == (None, plain.nbytes, len(plain.modules))
