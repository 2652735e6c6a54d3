"""Attention that is not transformers' own causal attention is refused, and the model is left as it was."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import tiny
from prefixfast import ConfigError
from prefixfast.model.attach import attach

IDS = torch.arange(3, 20)[None]


@functools.wraps(sdpa_attention_forward)
def reversed_keys(module: Any, query: Any, key: Any, value: Any, *how: Any, **more: Any) -> Any:
    """Attention that looks like transformers' own by its name, and pairs keys with other values."""
    return sdpa_attention_forward(module, query, key, value.flip(2), *how, **more)


def sees_all(*_: Any, **__: Any) -> torch.Tensor:
    """A mask that hides nothing."""
    return torch.ones(1, 1, IDS.shape[1], IDS.shape[1], dtype=torch.bool)


def by_name(model: Any, _: pytest.MonkeyPatch) -> None:
    AttentionInterface.register("reversed keys", reversed_keys)
    AttentionMaskInterface.register("reversed keys", sdpa_mask)
    model.set_attn_implementation("reversed keys")


def in_the_global_table(_: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(AttentionInterface._global_mapping, "sdpa", reversed_keys)


def in_the_local_table(_: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", reversed_keys)


def in_the_mask_table(_: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping, "sdpa", sees_all)


def in_the_modeling_file(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama, "eager_attention_forward", reversed_keys)
    model.set_attn_implementation("eager")


def mask_of_the_modeling_file(_: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(modeling_llama, "create_causal_mask", sees_all)


def config_not_causal(model: Any, _: pytest.MonkeyPatch) -> None:
    model.config.is_causal = False


def module_not_causal(model: Any, _: pytest.MonkeyPatch) -> None:
    model.model.layers[1].self_attn.is_causal = False


def argument_not_causal(model: Any, _: pytest.MonkeyPatch) -> None:
    attention = model.model.layers[1].self_attn
    attention.forward = functools.partial(attention.forward, is_causal=False)


def forward_with_a_mask(model: Any, _: pytest.MonkeyPatch) -> None:
    attention = model.model.layers[1].self_attn
    own = attention.forward

    def forward(hidden_states: torch.Tensor, attention_mask: Any = None, **how: Any) -> Any:
        seen = torch.ones(hidden_states.shape[1], hidden_states.shape[1], dtype=torch.bool)
        return own(hidden_states=hidden_states, attention_mask=seen[None, None], **how)

    attention.forward = forward


CHANGES = {
    by_name: "'reversed keys' is not transformers' own",
    in_the_global_table: "attention function 'sdpa' is not transformers' own",
    in_the_local_table: "attention function 'sdpa' is not transformers' own",
    in_the_mask_table: "mask function 'sdpa' is not transformers' own",
    in_the_modeling_file: "has replaced transformers.models.llama.modeling_llama.eager_attention_forward",
    mask_of_the_modeling_file: "has replaced transformers.models.llama.modeling_llama.create_causal_mask",
    config_not_causal: "config.is_causal is False",
    module_not_causal: "LlamaAttention.is_causal is False",
    argument_not_causal: "LlamaAttention.is_causal is False",
    forward_with_a_mask: "passes a mask of its own",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_attention_that_would_be_lost_is_refused(change, monkeypatch):
    model = tiny.make("llama")
    with torch.no_grad():
        plain = model(IDS).logits
        change(model, monkeypatch)
        own = model(IDS).logits
        assert change is module_not_causal or not torch.allclose(own, plain), "the change has an effect"
        implementation = model.config._attn_implementation
        with pytest.raises(ConfigError, match="cannot attach LlamaForCausalLM") as caught:
            attach(model)
        assert CHANGES[change] in str(caught.value)
        assert model.config._attn_implementation == implementation
        assert torch.equal(model(IDS).logits, own)


def test_bidirectional_attention_of_a_listed_family_is_refused():
    config = transformers.Gemma3TextConfig(**tiny.GEMMA, use_bidirectional_attention=True)
    with pytest.raises(ConfigError, match="is_causal is False"):
        attach(transformers.Gemma3ForCausalLM(config).eval())


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_functions_of_transformers_are_accepted(name):
    model = tiny.make("llama")
    model.config._attn_implementation_internal = name
    attach(model).detach()
    assert model.config._attn_implementation == name


def test_a_frozen_argument_of_a_function_of_transformers_is_accepted(monkeypatch):
    """The hub's attention is registered as partials of functions of transformers."""
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "sdpa", functools.partial(sdpa_attention_forward, dropout=0)
    )
    attach(tiny.make("llama")).detach()
