"""Trained embeddings: the keys, values and gradients of transformers' forward of the embeddings before the text."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import causal_lms
import tiny
from composed import error
from prefixfast import load
from prefixfast.attention.plan import PlannedPrefix, PrefixUse, prefix_rows, training_plan
from prefixfast.training.embeddings import EmbeddingParameters
from prefixfast.training.resilience import gradient_checkpointing

LENGTH, USERS = 5, 3
TEXTS = [[1, *range(3, 20)], [1, 60, 61, 62], [1, 7]]  # the text of each user
FURTHER = ("phi", "granite", "cohere2")


def make(family, dtype=torch.float64):
    return tiny.make(family, dtype=dtype) if family in tiny.FAMILIES else causal_lms.make(family, dtype=dtype)


def tables(hf):
    g = torch.Generator().manual_seed(5)
    dim = hf.get_input_embeddings().weight.shape[1]
    return [torch.randn(LENGTH, dim, generator=g, dtype=torch.float64) * 0.5 for _ in range(USERS)]


def packed_losses(base, params):
    """Losses of all texts in one packed forward, each behind the prefix of its user."""
    params.refresh(np.zeros(USERS, np.int64))
    own = PlannedPrefix(tuple(range(len(base.layers))), LENGTH, LENGTH, True)
    rows = prefix_rows([own] * USERS, len(base.layers))
    use = PrefixUse(np.arange(USERS + 1, dtype=np.int32), np.arange(USERS, dtype=np.int32))
    lengths = np.array([len(t) - 1 for t in TEXTS], np.int32)
    plan = training_plan(lengths, use, rows, params.leaves, backend=base.backend)
    ids = torch.tensor([i for t in TEXTS for i in t[:-1]])
    targets = torch.tensor([i for t in TEXTS for i in t[1:]])
    return base.losses(plan.with_logits_at(torch.arange(len(ids))), ids, targets)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *FURTHER])
def test_losses_and_gradients_are_those_of_embeddings_before_the_text(family):
    own = make(family)
    embeddings = [t.clone().requires_grad_() for t in tables(own)]
    expected = []
    for table, text in zip(embeddings, TEXTS, strict=True):
        words = own.get_input_embeddings()(torch.tensor(text))
        logits = own(inputs_embeds=torch.cat([table, words])[None], use_cache=False).logits[0, LENGTH:-1]
        expected.append(F.cross_entropy(logits, torch.tensor(text[1:]), reduction="none"))
    torch.cat(expected).sum().backward()
    with load(make(family)) as base:
        params = EmbeddingParameters(base, tables(own))
        got = packed_losses(base, params)
        got.sum().backward()
        params.backward()
    assert params.num_trained == embeddings[0].numel()
    limit = 1e-5  # some families compute norms and angles in fp32
    assert error(got, torch.cat(expected)) < limit
    gradient = params.params[0].grad.unflatten(0, (USERS, LENGTH))
    for ours, theirs in zip(gradient, embeddings, strict=True):
        assert error(ours, theirs.grad) < 10 * limit


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for enabled in (False, True):
        with load(make("llama")) as base, gradient_checkpointing(base, enabled):
            params = EmbeddingParameters(base, tables(base.hf))
            packed_losses(base, params).sum().backward()
            params.backward()
            gradients.append(params.params[0].grad)
    assert torch.equal(*gradients)


def test_a_base_in_bf16_has_embeddings_in_fp32():
    with load(make("llama", torch.bfloat16)) as base:
        params = EmbeddingParameters(base, tables(base.hf))
        packed_losses(base, params).sum().backward()
        params.backward()
        (table,) = params.params
        assert (table.dtype, table.grad.dtype, len(table)) == (torch.float32, torch.float32, USERS * LENGTH)
        kept = params.split(params.current(), 1)
        assert {t.dtype for t in kept.values()} == {torch.float32}
        assert torch.equal(kept["self.0.k"], params.leaves[0][0].detach()[LENGTH : 2 * LENGTH])
