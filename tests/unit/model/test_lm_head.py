"""The output layer: found in every family, with the losses of all logits, and not used if it does more."""

import pytest
import torch
import torch.nn.functional as F

import tiny
from prefixfast.attention.plan import plain_plan
from prefixfast.model.load import load


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_losses_are_those_of_all_logits(family):
    ids, at = torch.arange(3, 23), torch.tensor([0, 7, 12, 19])
    with load(tiny.make(family), dtype="float32") as base, torch.no_grad():
        assert base.head is not None
        plan = plain_plan([9, 11], backend=base.backend).with_logits_at(at)
        targets = torch.tensor([5, 6, 7, 8])
        expected = F.cross_entropy(base.forward(plan, ids), targets, reduction="none")
        assert torch.allclose(base.losses(plan, ids, targets), expected, rtol=1e-5, atol=1e-6)


def test_a_subclass_of_linear_is_not_used(caplog):
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 0.5

    model = tiny.make("llama")
    head = Scaled(*reversed(model.lm_head.weight.shape), bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with caplog.at_level("INFO"), load(model) as base:
        assert base.head is None
        plan = plain_plan([4], backend=base.backend).with_logits_at(torch.tensor([3]))
        losses = base.losses(plan, torch.tensor([5, 6, 7, 8]), torch.tensor([9]))
        assert losses.item() == pytest.approx(
            F.cross_entropy(base.forward(plan, torch.tensor([5, 6, 7, 8])), torch.tensor([9])).item()
        )
    assert "Scaled" in caplog.text


def test_a_head_with_a_hook_is_not_used(caplog):
    model = tiny.make("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: out + 1)
    with caplog.at_level("INFO"), load(model) as base:
        assert base.head is None
    assert "losses are computed from all logits" in caplog.text
