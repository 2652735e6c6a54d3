"""`PrefixAdamW` compared to torch's AdamW on each prefix alone, and the schedules compared to those of transformers."""

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from prefixfast.training.optimizer import PrefixAdamW, learning_rates
from prefixfast.training.prefix_tensor import PrefixTensor

N, ROWS, STEPS = 4, 3, 25


def gradients(seed: int, shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=g, dtype=torch.float64) * 3 for s in shapes]


def absent(step: int, prefix: int) -> bool:
    """Whether a prefix skips a step: prefix 2 every third step, prefix 3 after step 10."""
    return (prefix == 2 and step % 3 == 1) or (prefix == 3 and step > 10)


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_adamw_on_each_prefix_alone(max_norm, weight_decay):
    """Two tensors of 3 rows per prefix, one of 1 row, and one of 2 rows of two prefixes share the gradient norm."""
    shapes = [(N * ROWS, 2, 5), (N * ROWS, 2, 5), (N, 7), (4, 3)]
    params = [t.requires_grad_() for t in gradients(0, shapes)]
    held = [range(N)] * 3 + [[1, N - 1]]
    owners = [None] * 3 + [torch.tensor(held[3])]
    ours = PrefixAdamW(list(map(PrefixTensor, params, owners)), N, weight_decay=weight_decay)

    def rows_of(i, tensors):
        """Rows of one prefix in each tensor that has some."""
        parts = [t.unflatten(0, (len(own), -1))[own.index(i)] for t, own in zip(tensors, held, strict=True) if i in own]
        return [part.clone() for part in parts]

    own = [[p.requires_grad_() for p in rows_of(i, [t.detach() for t in params])] for i in range(N)]
    theirs = [torch.optim.AdamW(o, lr=1.0, weight_decay=weight_decay) for o in own]
    for step in range(STEPS):
        grads = gradients(step + 1, shapes)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        lr = torch.tensor([0.1 / (i + 1 + step) for i in range(N)], dtype=torch.float64)
        active = torch.tensor([not absent(step, i) for i in range(N)])
        norms, _ = ours.step(lr, active, max_norm)
        for i in range(N):
            if absent(step, i):
                continue
            for p, g in zip(own[i], rows_of(i, grads), strict=True):
                p.grad = g
            if max_norm:
                assert torch.allclose(norms[i], torch.nn.utils.clip_grad_norm_(own[i], max_norm))
            theirs[i].param_groups[0]["lr"] = float(lr[i])
            theirs[i].step()
    for i in range(N):
        for p, q in zip(rows_of(i, params), own[i], strict=True):
            assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_gradient_skips_its_prefix_only(bad):
    p = torch.ones(N * ROWS, 4, requires_grad=True)
    optimizer = PrefixAdamW([PrefixTensor(p)], N)
    p.grad = torch.ones_like(p)
    p.grad[ROWS, 1] = bad
    norms, updated = optimizer.step(torch.full((N,), 0.1), torch.ones(N, dtype=torch.bool), 1.0)
    assert updated.tolist() == [True, False, True, True]
    assert not norms[1].isfinite()
    assert torch.equal(p[ROWS : 2 * ROWS], torch.ones(ROWS, 4))
    assert bool(p.isfinite().all())
    assert p.grad is None


def test_a_tensor_without_a_gradient_keeps_its_moments():
    """Tensors of one shape share their storage; one that a step does not reach is left out of it."""
    params = [t.requires_grad_() for t in gradients(0, [(N, 3)] * 3)]
    ours = PrefixAdamW([PrefixTensor(p) for p in params], N)
    before = params[1].detach().clone()
    params[0].grad, params[2].grad = gradients(1, [(N, 3)] * 2)
    expected = torch.stack([params[0].grad, params[2].grad]).square().sum((0, 2)).sqrt()
    norms, _ = ours.step(torch.full((N,), 0.1), torch.ones(N, dtype=torch.bool))
    assert torch.allclose(norms, expected)
    assert torch.equal(params[1], before)
    state = ours.state()
    assert not state["mean.1"].any()
    assert bool(state["mean.2"].any())
    loaded = PrefixAdamW([PrefixTensor(p) for p in params], N)
    loaded.load(state)
    assert torch.equal(loaded.state()["square.2"], state["square.2"])


SCHEDULES = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 5])
def test_schedules_equal_those_of_transformers(kind, warmup):
    total = 20
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = SCHEDULES[kind](optimizer, warmup, total)
    for step in range(total):
        ours = learning_rates(torch.tensor([step]), torch.tensor([total]), peak=0.5, warmup=warmup, kind=kind)
        assert ours.item() == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_each_prefix_has_its_own_schedule():
    step, total = torch.tensor([3, 3, 12]), torch.tensor([20, 10, 20])
    peak, warmup = torch.tensor([0.5, 0.1, 0.2]), torch.tensor([0, 5, 5])
    ours = learning_rates(step, total, peak=peak, warmup=warmup, kind="linear")
    each = [
        learning_rates(step[i], total[i], peak=float(peak[i]), warmup=int(warmup[i]), kind="linear") for i in range(3)
    ]
    assert ours.tolist() == pytest.approx([float(x) for x in each], abs=1e-9)


def test_each_prefix_has_its_own_decay_and_clipping():
    decay, limit = (
        torch.tensor([0.0, 0.3, 0.3], dtype=torch.float64),
        torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64),
    )

    def run(decay, limit, only=None):
        p = gradients(0, [(3 * ROWS, 4)])[0].requires_grad_()
        optimizer = PrefixAdamW([PrefixTensor(p)], 3, weight_decay=decay)
        for step in range(4):
            p.grad = gradients(step + 1, [(3 * ROWS, 4)])[0]
            optimizer.step(torch.full((3,), 0.1), torch.ones(3, dtype=torch.bool), limit)
        return p.detach().view(3, ROWS, 4)

    together = run(decay, limit)
    for i in range(3):
        assert torch.equal(run(float(decay[i]), float(limit[i]))[i], together[i])
    assert not torch.equal(run(0.0, 0.0)[1], together[1])


def test_a_restored_state_continues_exactly():
    def step(p, optimizer, seed):
        p.grad = gradients(seed, [(N * ROWS, 4)])[0].float()
        optimizer.step(torch.full((N,), 0.1), torch.tensor([True, True, seed % 2 == 0, True]), 1.0)

    whole = gradients(0, [(N * ROWS, 4)])[0].float().requires_grad_()
    optimizer = PrefixAdamW([PrefixTensor(whole)], N, weight_decay=0.1)
    for seed in range(3):
        step(whole, optimizer, seed)
    saved = {n: t.clone() for n, t in optimizer.state().items()}
    again = whole.detach().clone().requires_grad_()
    other = PrefixAdamW([PrefixTensor(again)], N, weight_decay=0.1)
    other.load(saved)
    for seed in range(3, 6):
        step(whole, optimizer, seed)
        step(again, other, seed)
    assert torch.equal(whole, again)
