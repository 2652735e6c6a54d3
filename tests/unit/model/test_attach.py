"""Attachment: refused models, the proof that every layer is reached, and models that are restored exactly."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import seq2seq
import tiny
from prefixfast import ConfigError, load
from prefixfast.attention.hf_interface import HARMLESS, prefixfast_attention
from prefixfast.attention.plan import plain_plan
from prefixfast.model.attach import attach
from prefixfast.model.packed_forward import packed_forward
from prefixfast_kernels.tile_selection import Backend

IDS = torch.arange(3, 20)[None]


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@torch.no_grad()
def packed(model, *texts: torch.Tensor) -> torch.Tensor:
    return packed_forward(model, plain_plan([len(t) for t in texts], backend=Backend("reference")), torch.cat(texts))


def state(model) -> dict[str, Any]:
    """Everything that attaching changes."""
    return {
        "implementation": [
            m.config._attn_implementation for m in model.modules() if isinstance(m, transformers.PreTrainedModel)
        ],
        "modules": [(n, id(m), m.training) for n, m in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()],
        "hooks": [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()],
        "own": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


def mixed_state(family: str) -> Any:
    """A model with some modules in training mode and some parameters frozen."""
    model = tiny.make(family)
    list(model.modules())[3].train()
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    return model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_detach_restores_everything(family):
    model = mixed_state(family)
    before = state(model)
    attach(model).detach()
    assert state(model) == before


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_after_detach_are_those_before(family):
    model = tiny.make(family)
    before = logits(model)
    handle = attach(model)
    packed(model, IDS[0])
    handle.detach()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_implementation_comes_back(implementation):
    model = tiny.make("llama")
    model.set_attn_implementation(implementation)
    attach(model).detach()
    assert model.config._attn_implementation == implementation


def test_an_attached_model_is_frozen_and_in_eval_mode():
    model = mixed_state("gpt2")
    handle = attach(model)
    assert not any(m.training for m in model.modules() if type(m) is not nn.GELU)
    assert not any(p.requires_grad for p in model.parameters())
    assert [type(m) for m in model.modules() if "gelu" in type(m).__name__.lower()] == [nn.GELU] * 3
    handle.detach()


def test_attaching_twice_needs_detaching_twice():
    model = mixed_state("gpt2")
    before = state(model)
    first, second = attach(model), attach(model)
    second.detach()
    assert packed(model, IDS[0]).isfinite().all()
    first.detach()
    assert state(model) == before


@pytest.mark.parametrize("of", [copy.deepcopy, pickle.dumps], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("make", "name"), [(tiny.make, "gpt2"), (seq2seq.make_seq2seq, "t5")])
def test_a_copy_of_an_attached_model_is_refused(make, name, of):
    hf = make(name)
    with load(hf) as model:
        for attached in (hf, model):
            with pytest.raises(ConfigError, match="not attached to copy or pickle"):
                of(attached)
    assert of(hf)


def test_a_model_can_be_attached_again():
    model = tiny.make("gpt2")
    before = logits(model)
    for _ in range(2):
        attach(model).detach()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"attention_mask": torch.ones_like(IDS)}], ids=str)
def test_an_attached_model_refuses_calls_without_a_plan(how):
    model = tiny.make("llama")
    handle = attach(model)
    with pytest.raises(RuntimeError, match="this model is attached to prefixfast"):
        model(input_ids=IDS, **how)
    handle.detach()
    assert logits(model).isfinite().all()


def test_layer_shapes_are_those_of_the_model():
    handle = attach(tiny.make("qwen3"))
    assert [(s.num_heads, s.num_kv_heads, s.head_dim) for s in handle.sites["self"]] == [(4, 2, 16)] * 3
    handle.detach()


# ---- refused models ----


def llama(**rope: Any) -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**tiny.GROUPED, rope_parameters={"rope_theta": 1e4, **rope})
    )


def longrope() -> Any:
    return llama(
        rope_type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=80
    )


def sized(name: str, head: str = "ForCausalLM", **more: Any) -> Callable[[], Any]:
    """Constructor of a tiny model of a family, by the name of its classes."""
    return lambda: getattr(transformers, name + head)(getattr(transformers, name + "Config")(**tiny.GROUPED, **more))


SPELT = {
    "vocab_size": tiny.VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 160,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
}
NEO = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "bos_token_id": 1,
}
OWN = "it computes attention in its own code, outside transformers' attention interface"
REFUSED = {
    "gptj": (lambda: transformers.GPTJForCausalLM(transformers.GPTJConfig(**SPELT, rotary_dim=4)), OWN),
    "gpt_neo": (lambda: transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**NEO, eos_token_id=2)), OWN),
    "bloom": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=tiny.VOCAB, hidden_size=32, n_layer=2, n_head=4)
        ),
        "needs ALiBi biases",
    ),
    "falcon": (sized("Falcon"), OWN),
    "mvp": (
        lambda: transformers.MvpForConditionalGeneration(transformers.MvpConfig(vocab_size=tiny.VOCAB, **BART)),
        OWN,
    ),
    "whisper": (
        lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(vocab_size=tiny.VOCAB, pad_token_id=0, **BART)
        ),
        "it is none of the encoder-decoder models bart, ",
    ),
    "upcast": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny.GPT2, reorder_and_upcast_attn=True)),
        "config.reorder_and_upcast_attn works with eager attention only",
    ),
    "cross attention": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny.GPT2, add_cross_attention=True)),
        "attends to an encoder's states",
    ),
    "dynamic rope": (
        lambda: llama(rope_type="dynamic", factor=2.0),
        "RoPE type 'dynamic' changes with the batch's length",
    ),
    "longrope": (longrope, "RoPE type 'longrope' changes with the batch's length"),
}
UNREACHED = "layers to call prefixfast's attention once, got calls from the layers"
NOT_REACHED = {
    "openai-gpt": lambda: transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=tiny.VOCAB, n_embd=32, n_layer=2, n_head=4)
    ),
    "xlnet": lambda: transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=tiny.VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=48)
    ),
}


def refused(model: Any) -> str:
    """Error message of `attach`, after a check that the model was restored."""
    model.eval()
    before = state(model)
    with pytest.raises(ConfigError, match="cannot attach") as caught:
        attach(model)
    assert state(model) == before
    return str(caught.value)


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_an_unsupported_model_is_refused_with_the_reason(make, reason):
    assert reason in refused(make())


@pytest.mark.parametrize("make", NOT_REACHED.values(), ids=NOT_REACHED)
def test_a_model_whose_attention_is_not_reached_is_refused(make):
    reason = refused(make())
    assert UNREACHED in reason or "a packed forward fails" in reason


# ---- families outside of VERIFIED ----

OTHERS = {
    "phi3": sized("Phi3", sliding_window=tiny.WINDOW),
    "olmo2": sized("Olmo2"),
    "granite": sized("Granite", attention_multiplier=0.3, residual_multiplier=0.5),
    "starcoder2": sized("Starcoder2", sliding_window=tiny.WINDOW),
    "mixtral": sized("Mixtral"),
}


def strong(model: Any) -> Any:
    """Weights that make the logits depend on the text."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * (0.12 if p.dim() > 1 else 0.02))
    return model.eval()


def own_and_packed(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two texts one by one and packed; one text is longer than the sliding window."""
    texts = [torch.randint(3, tiny.VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in (40, 7)]
    with torch.no_grad():
        own = torch.cat([model(input_ids=t[None]).logits[0] for t in texts])
    handle = attach(model)
    got = packed(model, *texts)
    handle.detach()
    return own, got


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_an_untested_family_gives_its_own_logits(make):
    torch.manual_seed(0)
    own, got = own_and_packed(strong(make()))
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-5)


def test_chunked_attention_is_right_or_refused():
    """Llama 4 hides keys beyond its chunk by the mask alone, which packed attention does not use."""
    more = {"attention_chunk_size": tiny.WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 48, "head_dim": 8}
    model = strong(transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**tiny.GROUPED, **more)))
    try:
        own, got = own_and_packed(model)
    except ConfigError:
        return
    torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-5)


# ---- planted faults: each is refused, and the model is restored ----


class Bypass(nn.Module):
    """An attention module that does not attend."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.replaced = replaced

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return hidden_states, None


class Twice(Bypass):
    """An attention module that attends twice."""

    def forward(self, hidden_states: torch.Tensor, **how: Any) -> Any:
        self.replaced(hidden_states=hidden_states, **how)
        return self.replaced(hidden_states=hidden_states, **how)


@pytest.mark.parametrize(("fault", "reached"), [(Bypass, [0, 2]), (Twice, [0, 1, 1, 2])])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_that_is_not_reached_once_is_refused(family, fault, reached):
    model = tiny.make(family)
    layer = model.model.layers[1]
    layer.self_attn = fault(layer.self_attn)
    expected = "expected each of its 3 layers to call prefixfast's attention once"
    assert f"{expected}, got calls from the layers {reached}" in refused(model)


def test_a_layer_with_another_number_is_refused():
    model = tiny.make("llama")
    model.model.layers[2].self_attn.layer_idx = 1
    assert "got calls from the layers [0, 1, 1]" in refused(model)


def test_an_error_in_the_dry_run_restores_the_model(monkeypatch):
    model = mixed_state("gpt2")
    before = state(model)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixfast.model.attach.dry_run", fail)
    with pytest.raises(KeyboardInterrupt):
        attach(model)
    assert state(model) == before


# ---- the attention function ----


class Module(nn.Module):
    layer_idx = 0


def call(**how: Any) -> torch.Tensor:
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    given = {"prefixfast": plain_plan([5], backend=Backend("reference")), **how}
    return prefixfast_attention(Module(), q, k, v, None, **given)[0]


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "head_mask", "alibi", "cu_seq_lens_q"])
def test_the_attention_function_refuses_unsupported_arguments(name):
    with pytest.raises(RuntimeError, match=f"Module passes {name} to attention, which prefixfast does not compute"):
        call(**{name: torch.ones(1)})


@pytest.mark.parametrize("name", [*sorted(HARMLESS), "s_aux"])
def test_the_attention_function_ignores_harmless_arguments(name):
    assert torch.equal(call(**{name: True if name in HARMLESS else None}), call())


def test_the_attention_function_refuses_dropout():
    with pytest.raises(RuntimeError, match=r"attention dropout is on: .* call model.eval\(\)"):
        call(dropout=0.1)


def test_the_attention_function_refuses_a_call_without_plan():
    with pytest.raises(RuntimeError, match="this model is attached to prefixfast"):
        call(prefixfast=None)


@pytest.mark.parametrize(("option", "value"), [("scaling", 0.1), ("softcap", 0.5), ("sliding_window", 2)])
def test_the_attention_function_uses_its_options(option, value):
    assert not torch.allclose(call(**{option: value}), call())


def test_a_probe_sees_every_call():
    seen: list[Any] = []
    call(prefixfast=replace(plain_plan([5], backend=Backend("reference")), probe=seen.append))
    assert [(c.layer, c.q.shape, c.k.shape) for c in seen] == [(0, (5, 2, 8), (5, 2, 8))]
