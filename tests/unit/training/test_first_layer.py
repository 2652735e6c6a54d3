"""Layers below the first one with prefix rows take part in no backward pass and keep no activations for one."""

from __future__ import annotations

import pytest

import prefixfast
import tiny

ROWS = [{"prompt": "a b", "completion": "c"}, {"prompt": "d", "completion": "e"}]


def watched(name: str, tokenizer, **options) -> list[bool]:
    """Whether the output of each decoder layer needs a gradient in a training step."""
    hf = tiny.make(name)
    with prefixfast.load(hf, tokenizer=tokenizer) as base:
        blocks = hf.transformer.h if name == "gpt2" else hf.model.layers
        needs: dict[int, bool] = {}
        handles = [
            block.register_forward_hook(
                lambda _m, _args, out, i=i: needs.__setitem__(
                    i, (out[0] if isinstance(out, tuple) else out).requires_grad or needs.get(i, False)
                )
            )
            for i, block in enumerate(blocks)
        ]
        prefixfast.train(base, ROWS, prefix_length=2, max_steps=1, progress=False, **options)
        for handle in handles:
            handle.remove()
        assert all(p.grad is None for p in hf.parameters())
    return [needs[i] for i in sorted(needs)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("reparameterization", ["none", "mlp"])
def test_only_layers_from_the_first_one_with_rows_need_gradients(name, first, reparameterization, tokenizer):
    found = watched(name, tokenizer, layers=[first], reparameterization=reparameterization)
    assert found == [i >= first for i in range(len(found))]
    assert len(found) > 2


def test_one_of_several_prefixes_with_rows_in_the_first_layer_makes_all_need_gradients(tokenizer):
    hf = tiny.make("gpt2")
    needs = []
    hf.transformer.h[0].register_forward_hook(lambda _m, _a, out: needs.append(out[0].requires_grad))
    with prefixfast.load(hf, tokenizer=tokenizer) as base:
        layers = {"low": {"layers": [0]}, "high": {"layers": [2]}}
        prefixfast.train(
            base, dict.fromkeys(layers, ROWS), overrides=layers, prefix_length=2, max_steps=1, progress=False
        )
    assert any(needs)
