"""Models that share a config, or a part of one, are attached and detached in any order."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import pytest
import torch
import transformers

import tiny
from prefixfast import ConfigError, load
from prefixfast.attention.plan import plain_plan
from prefixfast.model.base import Model

IDS = torch.arange(3, 20)
ORDERS = [
    order
    for order in itertools.permutations(["open 0", "close 0", "open 1", "close 1", "open 2", "close 2"])
    if all(order.index(f"open {i}") < order.index(f"close {i}") for i in range(3))
    and order.index("open 0") < order.index("open 1")  # models 0 and 1 are alike
]


class Outer(transformers.LlamaForCausalLM):
    """A model whose config has a part that is another model's config."""

    def __init__(self, config: Any) -> None:
        super().__init__(config.own)
        self.config = config


class OuterConfig(transformers.LlamaConfig):
    model_type = "outer"

    @property
    def own(self) -> Any:
        return self.part


def models() -> list[Any]:
    """Two models with one config, and one whose config holds it."""
    config = transformers.LlamaConfig(**tiny.GROUPED)
    torch.manual_seed(0)
    outer = OuterConfig(**tiny.GROUPED)
    outer.part = config
    return [transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config), Outer(outer)]


def implementations(made: list[Any]) -> list[str]:
    return [m.config._attn_implementation for model in made for m in (model, model.model)]


def packed(base: Model) -> torch.Tensor:
    return base.forward(plain_plan([len(IDS)], backend=base.backend), IDS)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS[None]).logits[0]


@pytest.mark.parametrize("order", sorted(ORDERS), ids=" ".join)
def test_models_with_one_config_come_back_in_any_order(order):
    made = models()
    expected, before = [logits(m) for m in made], implementations(made)
    configs = [(m, m.config) for model in made for m in model.modules() if hasattr(m, "config")]
    opened: dict[int, Model] = {}
    for step in order:
        what, number = step.split()[0], int(step.split()[1])
        if what == "open":
            opened[number] = load(made[number])
        else:
            opened.pop(number).close()
        for i, base in opened.items():  # whoever is open computes
            torch.testing.assert_close(packed(base), expected[i], rtol=1e-4, atol=1e-5)
    assert implementations(made) == before
    assert all(m.config is config for m, config in configs)
    for model, own in zip(made, expected, strict=True):
        assert torch.equal(logits(model), own)


def test_a_model_that_is_freed_without_close_gives_its_config_back():
    made = models()[:2]
    first, second = load(made[0]), load(made[1])
    config = made[0].config
    del first, made[0]
    gc.collect()
    assert packed(second).isfinite().all()
    second.close()
    assert config._attn_implementation == made[0].config._attn_implementation == "sdpa"


def test_a_refused_model_leaves_the_config_to_the_one_that_runs():
    made = models()[:2]
    with load(made[0]) as base:
        made[1].model.layers[1].self_attn.is_causal = False
        with pytest.raises(ConfigError, match="is_causal"):
            load(made[1])
        assert packed(base).isfinite().all()
    assert implementations(made) == ["sdpa"] * 4


def test_the_proof_of_one_model_does_not_disturb_another(monkeypatch):
    """A family outside of the tested set runs its own forward at load, while another model computes."""
    config = transformers.Olmo2Config(**tiny.GROUPED)
    torch.manual_seed(0)
    first, second = (transformers.Olmo2ForCausalLM(config).eval() for _ in range(2))
    with load(first) as base:
        expected, seen = packed(base), []
        own = type(second).forward

        def forward(self: Any, *args: Any, **how: Any) -> Any:
            if self is second:
                seen.append(torch.equal(packed(base), expected))
            return own(self, *args, **how)

        monkeypatch.setattr(type(second), "forward", forward)
        load(second).close()
        assert seen
        assert all(seen)
