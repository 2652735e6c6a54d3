"""Quantized layers: those whose rows depend on each other are refused, and the others give their own results."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from prefixfast import ConfigError, Engine, load
from prefixfast.attention.plan import plain_plan
from quantized import quantized_llama

IDS = torch.arange(3, 20)


def int8(t: Tensor, dim: int | None) -> Tensor:
    """Values rounded to int8 with one scale for the tensor, or one for each row."""
    scale = (t.abs().max() if dim is None else t.abs().amax(dim, keepdim=True)) / 127
    return (t / scale).round().clamp(-127, 127) * scale


class Quantized(nn.Module):
    """A linear layer with int8 weights, whose input is quantized too.

    Args:
        layer: Layer.
        quantize: Function that quantizes the input.
    """

    def __init__(self, layer: nn.Linear, quantize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(int8(layer.weight.detach(), 1), requires_grad=False), layer.bias
        self.quantize = quantize

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantize(x), self.weight, self.bias)


def replaced(make: Callable[[nn.Linear], nn.Module]) -> Any:
    """A Llama whose second layer has other linear layers."""
    model = tiny.make("llama")
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.down_proj = make(mlp.gate_proj), make(mlp.down_proj)
    return model.eval()


def dynamic() -> Any:
    return torch.ao.quantization.quantize_dynamic(tiny.make("llama"), {nn.Linear}, dtype=torch.qint8)


BY_TENSOR = {
    "one scale": lambda: replaced(lambda layer: Quantized(layer, lambda x: int8(x, None))),
    "one scale in fp8": lambda: replaced(
        lambda layer: Quantized(layer, lambda x: (x / x.abs().max() * 448).to(torch.float8_e4m3fn).float() / 448)
    ),
    "normalized by all": lambda: replaced(lambda layer: Quantized(layer, lambda x: x - x.mean((0, 1)))),
    "torch.ao": dynamic,
}
BY_ROW = {
    "weights": lambda: replaced(lambda layer: Quantized(layer, lambda x: x)),
    "one scale for each token": lambda: replaced(lambda layer: Quantized(layer, lambda x: int8(x, -1))),
    "tensor subclass": quantized_llama,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("make", BY_TENSOR.values(), ids=BY_TENSOR)
def test_a_layer_whose_rows_depend_on_each_other_is_refused(make):
    model = make()
    with pytest.raises(ConfigError, match=r"cannot attach .* computes a token's output from other tokens too"):
        load(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("make", BY_ROW.values(), ids=BY_ROW)
def test_a_layer_with_independent_rows_gives_its_own_results(make):
    model = make()
    with torch.no_grad():
        own = model(IDS[None]).logits[0]
    with load(model) as base:
        assert base.fingerprint["weights"]
        with torch.no_grad():
            got = base.forward(plain_plan([len(IDS)], backend=base.backend), IDS)
        torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)
        with Engine(base, max_num_seqs=2, max_model_len=32) as engine:
            assert len(engine.generate([[5, 6, 7]], max_new_tokens=3, min_new_tokens=3)[0].token_ids) == 3
            assert engine.score([[5, 6]], targets=[[7]])[0].logprob < 0


def test_quantized_bases_have_other_fingerprints_for_other_weights():
    prints = []
    for factor in (1.0, 1.5):
        model = quantized_llama()
        model.lm_head.weight.data.scale.mul_(factor)
        with load(model) as base:
            prints.append(base.fingerprint["weights"])
    assert prints[0] != prints[1]


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_weights_of_torchao(name):
    from torchao import quantization

    model = tiny.make("llama")
    quantization.quantize_(model, getattr(quantization, name)())
    with load(model) as base, Engine(base, max_num_seqs=2, max_model_len=32) as engine:
        assert base.fingerprint["weights"]
        assert len(engine.generate([[5, 6, 7]], max_new_tokens=3)[0].token_ids) <= 3
