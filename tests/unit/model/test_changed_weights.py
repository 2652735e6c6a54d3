"""Weights and adapters that change between two calls are used as they are in the second call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import prefixfast
import tiny
from prefixfast import BaseMismatchError, ConfigError, Engine, Prefix, load
from prefixfast.model.fingerprint import check_same_base
from prefixfast.model.prepack import prepack

PROMPTS = [[5, 6, 7, 8], [9, 10]]
HOW = {"max_new_tokens": 6, "min_new_tokens": 6, "logprobs": 1}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj", "lm_head"], "init_lora_weights": False}


def lora() -> Any:
    """A Llama with two LoRA adapters, of which the first one acts."""
    model = tiny.make("llama")
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(**LORA))
    peft.add_adapter("second", LoraConfig(**LORA))
    return peft.eval()


def other(t: torch.Tensor) -> torch.Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(7)) * 0.3


def layer(model: Any) -> Any:
    """A linear layer without adapters of a `lora` model."""
    return model.get_base_model().model.layers[1].mlp.gate_proj


def one_sign(model: Any) -> None:
    values = layer(model).weight.data
    at = values.abs().argmax()
    values.view(-1)[at] = -8 * values.view(-1)[at]


def optimizer_step(model: Any) -> None:
    weight = layer(model).weight
    weight.grad = other(weight)
    torch.optim.SGD([weight], lr=1.0).step()
    weight.grad = None


CHANGES: dict[str, Callable[[Any], object]] = {
    "merge": lambda m: m.merge_adapter(),
    "unmerge": lambda m: (m.merge_adapter(), m.unmerge_adapter(), m.set_adapter("second")),
    "set adapter": lambda m: m.set_adapter("second"),
    "disable": lambda m: m.base_model.disable_adapter_layers(),
    "data.copy_": lambda m: layer(m).weight.data.copy_(other(layer(m).weight)),
    "data +=": lambda m: layer(m).weight.data.add_(other(layer(m).weight)),
    "one value": one_sign,
    "data =": lambda m: setattr(layer(m).weight, "data", other(layer(m).weight)),
    "numpy": lambda m: layer(m).weight.detach().numpy().__setitem__(..., other(layer(m).weight).numpy()),
    "new parameter": lambda m: setattr(layer(m), "weight", nn.Parameter(other(layer(m).weight), requires_grad=False)),
    "load_state_dict": lambda m: layer(m).load_state_dict({"weight": other(layer(m).weight)}),
    "assign": lambda m: layer(m).load_state_dict({"weight": other(layer(m).weight)}, assign=True),
    "optimizer": optimizer_step,
    "adapter's own weight": lambda m: (
        m.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight.data.mul_(-3)
    ),
    "add adapter": lambda m: (m.add_adapter("third", LoraConfig(**LORA)), m.set_adapter("third"), m.eval()),
}


def results(engine: Engine) -> list[Any]:
    generated = engine.generate(PROMPTS, **HOW)
    scored = engine.score(PROMPTS, targets=[[3, 4], [5]])
    return [[g.token_ids, [t.logprob for t in g.logprobs]] for g in generated] + [s.token_logprobs for s in scored]


def flat(found: list[Any]) -> torch.Tensor:
    return torch.tensor([x for part in found for x in (part[1] if isinstance(part[0], list) else part)])


@pytest.mark.parametrize("submitted", [False, True], ids=["batch", "thread"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_next_call_uses_changed_weights(change, submitted):
    model = lora()
    with Engine(model, max_num_seqs=4, max_model_len=32) as engine:
        assert submitted or prepack(nn.Linear(8, 8)).why_not is not None or engine.model.packed.copies
        if submitted:
            engine.submit(PROMPTS[0], max_new_tokens=2).result(60)
        before = results(engine)
        with torch.no_grad():
            change(model)
        after = results(engine)
    with Engine(model, max_num_seqs=4, max_model_len=32, prepack=False) as fresh:
        expected = results(fresh)
    assert [a[0] for a in after[:2]] == [e[0] for e in expected[:2]]
    torch.testing.assert_close(flat(after), flat(expected), rtol=1e-4, atol=1e-4)
    if change is not CHANGES["merge"]:
        assert not torch.allclose(flat(before), flat(after), rtol=1e-2, atol=1e-2), "the change has an effect"


def test_what_runs_outside_of_an_engine_never_reads_a_copy():
    model = tiny.make("llama")
    with load(model) as base:
        with Engine(base, max_num_seqs=4, max_model_len=32) as engine:
            engine.generate(PROMPTS, **HOW)
        before = Prefix.from_text(base, [5, 6, 7]).kv
        model.model.layers[0].self_attn.k_proj.weight.data.neg_()
        after = Prefix.from_text(base, [5, 6, 7]).kv
        torch.testing.assert_close(after["self.0.k"], -before["self.0.k"])


def test_weights_that_can_no_longer_be_packed_are_read_as_they_are():
    model = tiny.make("llama")
    with Engine(model, max_num_seqs=4, max_model_len=32) as engine:
        engine.generate(PROMPTS, **HOW)
        for module in (model.model.layers[0].mlp.up_proj, model.lm_head):
            module.weight = nn.Parameter(other(module.weight).t().contiguous().t(), requires_grad=False)
        after = results(engine)
    with Engine(model, max_num_seqs=4, max_model_len=32, prepack=False) as fresh:
        torch.testing.assert_close(flat(after), flat(results(fresh)), rtol=1e-4, atol=1e-4)


def test_shared_prompts_are_computed_again_after_a_change():
    model, long = tiny.make("llama"), list(range(3, 60))
    batch = [[*long, 70], [*long, 71]]
    with Engine(model, max_num_seqs=4, max_model_len=96, share_prompts=8) as engine:
        engine.generate(batch, **HOW)
        model.model.embed_tokens.weight.data.mul_(-1)  # not packed
        model.model.layers[0].mlp.up_proj.weight.data.mul_(-1)
        shared = engine.generate(batch, **HOW)
    with Engine(model, max_num_seqs=4, max_model_len=96) as engine:
        alone = engine.generate(batch, **HOW)
    assert [g.token_ids for g in shared] == [g.token_ids for g in alone]


def test_a_replaced_output_layer_is_used():
    model = tiny.make("llama")
    with load(model) as base:
        with Engine(base, max_num_seqs=4, max_model_len=32) as engine:
            before = engine.score(PROMPTS, targets=[[3], [5]])
            model.set_output_embeddings(nn.Linear(32, tiny.VOCAB, bias=False).eval())
            after = engine.score(PROMPTS, targets=[[3], [5]])
            got = engine.generate(PROMPTS, **HOW)
        with torch.no_grad():
            expected = base.forward(
                prefixfast.attention.plan.plain_plan([4], backend=base.backend), torch.tensor(PROMPTS[0])
            )
    assert after[0].logprob == pytest.approx(float(expected[-1].log_softmax(-1)[3]), abs=1e-5)
    assert got[0].token_ids[0] == int(expected[-1].argmax())
    assert before[0].logprob != after[0].logprob


def test_an_adapter_in_training_mode_is_refused():
    """PEFT adds modules in training mode, in which their dropout acts."""
    model = tiny.make("llama")
    with Engine(model, max_num_seqs=2, max_model_len=32) as engine:
        engine.generate(PROMPTS, **HOW)
        model.add_adapter(LoraConfig(**LORA, lora_dropout=0.5))
        for call in (lambda: engine.generate(PROMPTS, **HOW), lambda: engine.score(PROMPTS, targets=[[3], [5]])):
            with pytest.raises(ConfigError, match=r"is in training mode; call eval\(\)"):
                call()
        model.eval()
        assert len(engine.generate(PROMPTS, **HOW)) == 2


# ---- the fingerprint ----


def fingerprints(model: Any, *states: Callable[[Any], object]) -> list[Any]:
    found = []
    with load(model) as base:
        for state in states:
            state(model)
            found.append(base.fingerprint)
    return found


def test_the_fingerprint_tells_acting_adapters_apart():
    model = lora()
    first, second, both_off, merged, unmerged, again = fingerprints(
        model,
        lambda m: None,
        lambda m: m.set_adapter("second"),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: (m.base_model.enable_adapter_layers(), m.merge_adapter()),
        lambda m: m.unmerge_adapter(),
        lambda m: m.set_adapter("default"),
    )
    kinds = [f["adapters"] for f in (first, second, both_off, merged)]
    assert len(set(kinds)) == 4
    assert both_off["adapters"] == "none"
    assert (again["adapters"], unmerged["adapters"]) == (first["adapters"], second["adapters"])
    check_same_base(first, again, "it")
    for there in (second, both_off, merged):
        with pytest.raises(BaseMismatchError, match="it was made for base"):
            check_same_base(there, first, "it")
    with pytest.raises(BaseMismatchError, match="other adapters of PEFT act in its layers"):
        check_same_base(second, first, "it")


def test_an_adapter_of_a_middle_layer_is_told_apart():
    """The digest of weights samples the first and the last layer."""
    found = []
    for seed in (1, 2):
        model = tiny.make("llama")
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, layers_to_transform=[1]))
        found += fingerprints(adapted.eval(), lambda m: None)
    assert found[0]["weights"] == found[1]["weights"]
    with pytest.raises(BaseMismatchError, match="other adapters"):
        check_same_base(found[0], found[1], "it")


def middle(dtype: torch.dtype) -> Any:
    """A Llama with LoRA in a middle layer, which the digest of weights does not sample."""
    torch.manual_seed(1)
    config = LoraConfig(**{**LORA, "target_modules": ["q_proj"]}, layers_to_transform=[1])
    return get_peft_model(tiny.make("llama", dtype=dtype), config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_base_with_a_live_adapter_and_its_base_are_told_apart(dtype):
    """A base in fp16 has no digest of weights at all."""
    (live,), (plain,) = (fingerprints(m.to(dtype), lambda m: None) for m in (middle(dtype), tiny.make("llama")))
    (merged,) = fingerprints(middle(dtype).merge_and_unload(), lambda m: None)
    assert live["weights"] == plain["weights"] == merged["weights"]
    for there, here in ((live, plain), (plain, live), (live, merged), (merged, live)):
        with pytest.raises(BaseMismatchError, match="other adapters of PEFT act in its layers"):
            check_same_base(there, here, "it")
    older = {k: v for k, v in plain.items() if k != "sample"}
    check_same_base(older, live, "it")
    check_same_base(plain, merged, "it")


def test_fingerprints_of_bases_without_adapters_and_of_older_versions_are_as_before():
    plain = fingerprints(tiny.make("llama"), lambda m: None)[0]
    assert sorted(plain) == ["config", "name", "sample", "tokenizer", "weights"]
    adapted = fingerprints(lora(), lambda m: None)[0]
    check_same_base({k: v for k, v in adapted.items() if k not in ("adapters", "sample")}, adapted, "it")
    with pytest.raises(BaseMismatchError):
        check_same_base(plain, adapted, "it")


def test_a_prefix_of_another_active_adapter_is_refused_by_a_loaded_base(tmp_path: Path):
    model = lora()
    with load(model) as base:
        prefix = Prefix.from_text(base, [5, 6, 7])
        prefix.save_pretrained(tmp_path)
        kept = Prefix.from_pretrained(tmp_path)
        with Engine(base, max_num_seqs=2, max_model_len=32) as engine:
            engine.generate(PROMPTS, kept, **HOW)
            model.set_adapter("second")
            with pytest.raises(BaseMismatchError, match="other adapters"):
                engine.generate(PROMPTS, kept, **HOW)
            model.set_adapter("default")
            engine.generate(PROMPTS, kept, **HOW)
            model.merge_adapter()
            with pytest.raises(BaseMismatchError, match="other adapters"):
                engine.generate(PROMPTS, kept, **HOW)
