"""Bottleneck adapters: a dense model's logits and gradients, sizes, refusals, the base afterwards."""

import pytest
import torch

import causal_lms
import dense
import tiny
from composed import error
from prefixfast import ConfigError, load
from prefixfast.attention.plan import plain_plan
from prefixfast.model.tuned.adapter import applied_adapters, bottleneck_width, new_adapters
from prefixfast.model.tuned.blocks import decoder_blocks

LIMITS = {"gpt2": 1e-9, "llama": 1e-5}  # transformers computes Llama's norms and angles in fp32
TEXTS = [list(range(3, 12)), [5, 60, 61, 62], [7, 8]]


def random_adapters(base, width=5):
    """Adapters with a strong effect."""
    g = torch.Generator().manual_seed(1)
    return {
        n: (t + torch.randn(t.shape, generator=g, dtype=t.dtype) * 0.3).requires_grad_()
        for n, t in new_adapters(base, width, 0).items()
    }


def packed_logits(base, texts):
    plan = plain_plan([len(t) for t in texts], backend=base.backend)
    return base.forward(plan, torch.tensor([i for t in texts for i in t]))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_and_gradients_are_those_of_a_dense_model(family):
    hf = tiny.make(family, dtype=torch.float64)
    weights = {n: t.clone() for n, t in hf.state_dict().items()}
    with load(hf) as base:
        adapters = random_adapters(base)
        with applied_adapters(base, adapters):
            got = packed_logits(base, TEXTS)
        (got.square().sum()).backward()
        ours = {n: t.grad for n, t in adapters.items()}
        for t in adapters.values():
            t.grad = None
        expected = torch.cat([dense.logits(family, weights, torch.tensor(t), adapters) for t in TEXTS])
        expected.square().sum().backward()
        plain = torch.cat([dense.logits(family, weights, torch.tensor(t)) for t in TEXTS])
        assert error(got, expected) < LIMITS[family]
        assert error(packed_logits(base, TEXTS), plain) < LIMITS[family]
        assert error(plain, expected) > 0.1
        assert all(error(ours[n], t.grad) < 10 * LIMITS[family] for n, t in adapters.items())


@pytest.mark.parametrize("share", [0.1, 0.03, 1e-6])
def test_the_bottleneck_has_the_share_of_the_base(share):
    with load(tiny.make("qwen3")) as base:
        width = bottleneck_width(base, share)
        size = sum(p.numel() for p in base.hf.parameters())
        made = [sum(t.numel() for t in new_adapters(base, w, 0).values()) / size for w in (width, width + 1)]
        step = made[1] - made[0]
        assert abs(made[0] - share) <= step / 2 + 1e-9 or width == 1
        assert width > 1 or made[0] + step / 2 >= share


def test_the_initial_values_are_those_of_the_public_code():
    with load(tiny.make("gpt2")) as base:
        made, other = (new_adapters(base, 200, seed) for seed in (0, 1))
        assert {n for n in made if n.startswith("2.")} == {
            f"2.{p}.{k}" for p in ("norm", "down", "up") for k in ("weight", "bias")
        }
        for name, t in made.items():
            if name.endswith(("down.weight", "up.weight")):
                assert abs(t.std() / 0.02 - 1) < 0.05
                assert not torch.equal(t, other[name])
            else:
                assert torch.equal(t, torch.full_like(t, float(name.endswith("norm.weight"))))


def test_a_base_in_bf16_has_adapters_in_fp32_and_computes_in_bf16():
    with load(tiny.make("llama", dtype=torch.bfloat16)) as base:
        adapters = random_adapters(base)
        with applied_adapters(base, adapters):
            got = packed_logits(base, TEXTS)
        assert got.dtype == torch.bfloat16
        got.float().square().mean().backward()
        assert all(t.dtype == t.grad.dtype == torch.float32 for t in adapters.values())


def test_the_base_has_no_hooks_after_an_error():
    with load(tiny.make("gpt2")) as base:
        adapters, before = new_adapters(base, 3, 0), packed_logits(base, TEXTS)
        with pytest.raises(ZeroDivisionError), applied_adapters(base, adapters):
            raise ZeroDivisionError
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.hf.modules())
        assert torch.equal(packed_logits(base, TEXTS), before)
        wrong = {**adapters, "1.up.weight": adapters["1.up.weight"][:-1]}
        with pytest.raises(ConfigError, match=r"1\.up\.weight"), applied_adapters(base, wrong):
            pass
        with pytest.raises(ConfigError), applied_adapters(base, {}):
            pass


@pytest.mark.parametrize("kind", ["gemma3n_text", "longcat_flash"])
def test_a_base_whose_hidden_states_do_not_pass_through_blocks_is_refused(kind):
    with load(causal_lms.make(kind)) as base:
        with pytest.raises(ConfigError, match=kind):
            decoder_blocks(base)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.hf.modules())


@pytest.mark.parametrize("kind", ["phi", "cohere2", "mixtral", "gemma4_text", "opt"])
def test_blocks_of_further_families_are_found(kind):
    """A block whose attention does not read what the block before it returns would leave a gradient at zero."""
    with load(causal_lms.make(kind)) as base:
        adapters = random_adapters(base, 2)
        with applied_adapters(base, adapters):
            packed_logits(base, TEXTS).float().square().sum().backward()
        assert len(decoder_blocks(base)) == len(base.layers)
        assert all(bool(t.grad.abs().sum() > 0) for n, t in adapters.items() if n.endswith("up.weight"))
