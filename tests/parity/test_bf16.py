"""In bf16, where rounding changes tokens, logits and prefix gradients are as near to fp64 as PEFT's in bf16 are."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import tiny
from parity.packed import Case, case, packed, unpacked
from prefixfast import Engine, load
from prefixfast.prefix import peft_format

# Errors relative to those of PEFT in bf16: the limits of the kernels' tests.
LOGITS, GRADIENTS = 2.0, 3.0


def make(family: str, dtype: torch.dtype):
    """A model whose weights are bf16 numbers, in any dtype."""
    return tiny.make(family).to(torch.bfloat16).to(dtype)


def rounded(c: Case) -> Case:
    """The same case with prefixes of bf16 numbers."""
    return Case(c.prompts, c.choice, [t.bfloat16() for t in c.tables])


@functools.cache
def results(family: str):
    """The case, and logits and gradients: exact, of PEFT in bf16."""
    c = rounded(case(lambda: make(family, torch.float32), vocab=tiny.VOCAB, longest=3 * tiny.WINDOW))
    g = torch.Generator().manual_seed(9)
    weights = [torch.rand(len(p), generator=g) for p in c.prompts]
    exact, theirs = (unpacked(lambda d=d: make(family, d), c, weights=weights) for d in (torch.float64, torch.bfloat16))
    return c, weights, exact, theirs


def ours(family: str, c: Case, weights, drop: int | None = None):
    """Logits, and gradients in PEFT's layout."""
    with load(make(family, torch.bfloat16)) as base:
        logits, leaves = packed(base, c, c.prefixes(base.hf), grad=True, drop=drop)
        targets = torch.cat([p.roll(-1) for p in c.prompts])
        (F.cross_entropy(logits, targets, reduction="none") * torch.cat(weights)).sum().backward()
        grads, at = [], 0
        for table in c.tables:
            names = ((f"self.{i}.{x}", t) for i, kv in enumerate(leaves) for x, t in zip("kv", kv, strict=True))
            rows = slice(at, at + len(table))
            part = {n: torch.zeros_like(t[rows]) if t.grad is None else t.grad[rows] for n, t in names}
            grads.append(peft_format.to_table(part).double())
            at += len(table)
    return logits.detach().double(), grads


def errors(found, exact) -> tuple[float, float]:
    """Root mean square errors of logits and of gradients."""
    (logits, grads), (exact_logits, exact_grads) = found, exact
    apart = torch.cat([(a.double() - b).flatten() for a, b in zip(grads, exact_grads, strict=True)])
    return (logits.double() - exact_logits).square().mean().sqrt().item(), apart.square().mean().sqrt().item()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_and_gradients_are_as_exact_as_pefts(family):
    c, weights, exact, theirs = results(family)
    limits = errors(theirs, exact)
    found = errors(ours(family, c, weights), exact)
    assert found[0] <= LOGITS * limits[0], (found, limits)
    assert found[1] <= GRADIENTS * limits[1], (found, limits)
    wrong = errors(ours(family, c, weights, drop=0), exact)
    assert wrong[0] > LOGITS * limits[0], "a dropped prefix is noticed"
    assert wrong[1] > GRADIENTS * limits[1], "and so are its gradients"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_scores_are_as_exact_as_pefts(family):
    """Log-probabilities of `score`, prefilled through the engine in bf16."""
    c, _, (exact, _), (theirs, _) = results(family)
    with Engine(make(family, torch.bfloat16), max_num_seqs=8, max_model_len=64) as engine:
        prefixes = c.prefixes(engine.model.hf)
        chosen = [None if i < 0 else prefixes[i] for i in c.choice]
        keep = [i for i, p in enumerate(c.prompts) if len(p) > 1]
        scores = engine.score(
            [c.prompts[i][:1].tolist() for i in keep],
            [chosen[i] for i in keep],
            targets=[c.prompts[i][1:].tolist() for i in keep],
        )
    lens = [len(p) for p in c.prompts]

    def logprobs(logits: torch.Tensor) -> torch.Tensor:
        parts = logits.double().log_softmax(-1).split(lens)
        return torch.cat([parts[i][:-1].gather(-1, c.prompts[i][1:, None])[:, 0] for i in keep])

    found = torch.tensor([x for s in scores for x in s.token_logprobs], dtype=torch.float64)
    limit = (logprobs(theirs) - logprobs(exact)).square().mean().sqrt()
    assert (found - logprobs(exact)).square().mean().sqrt() <= LOGITS * limit
