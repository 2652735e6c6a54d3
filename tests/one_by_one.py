"""Reference of a mixed batch: transformers' own forward, one request at a time, with the prefix in a `DynamicCache`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixfast import Engine, Prefix
from prefixfast.attention.plan import PrefixUse, training_plan
from prefixfast.model.base import Model
from prefixfast.model.text_kv import text_kv
from prefixfast.prefix.kv import concat_kv, row_table

LENGTHS = (7, 4, 1, 36, 6, 27)  # prompts, some longer than the sliding windows of tiny models
CHOICE = (0, 1, 2, 0, -1, 2)  # prefix of each prompt, -1 for none
PREFIXES = (5, 3, 20)
NEW = 4  # generated tokens
LayerKV = tuple[Tensor, Tensor]
Table = list[LayerKV | None]  # keys and values [P, H, D] by layer, None for a layer that reads those of another layer


@dataclass
class Differences:
    """Differences from the reference, relative to its largest value.

    Attributes:
        logits: Largest difference of a logit with prefixes, None if the model's cache cannot hold a prefix.
        gradients: Largest difference of a prefix gradient, None if the model's cache cannot hold a prefix.
        tokens: Number of requests whose greedy tokens differ.
        text: Largest difference of a logit after a prefix made of a text's tokens.
    """

    logits: float | None
    gradients: float | None
    tokens: int
    text: float

    @property
    def none(self) -> bool:
        """Whether every difference is rounding."""
        largest = max(self.logits or 0.0, self.gradients or 0.0, self.text)
        return largest < 1e-4 and self.tokens == 0


def prompts(vocab: int) -> list[Tensor]:
    """Random prompts."""
    g = torch.Generator().manual_seed(3)
    return [torch.randint(3, vocab, (n,), generator=g) for n in LENGTHS]


def random_tables(model: Model) -> list[Table]:
    """Random prefixes with a strong effect."""
    empty = concat_kv([], model.layers, model.dtype, model.device)
    tables = []
    for seed, rows in enumerate(PREFIXES):
        g = torch.Generator().manual_seed(seed + 1)

        def rand(like: Tensor, rows: int = rows, g: torch.Generator = g) -> Tensor:
            return torch.randn(rows, *like.shape[1:], generator=g) * 0.7

        tables.append([(rand(k), rand(v)) for k, v in empty])
    return [own_rows(model, table) for table in tables]


def own_rows(model: Model, table: Sequence[LayerKV]) -> Table:
    """The table without the layers that read the keys and values of another layer."""
    return [None if s.source is not None else kv for kv, s in zip(table, model.layers, strict=True)]


def as_prefix(table: Table, pos_start: int) -> Prefix:
    """A table as a prefix."""
    kv = {f"self.{i}.{x}": t for i, own in enumerate(table) if own for x, t in zip("kv", own, strict=True)}
    return Prefix(kv, pos_start=pos_start)


def num_rows(table: Table) -> int:
    """Number of rows of a table."""
    return len(next(kv for kv in table if kv is not None)[0])


def reference(model: PreTrainedModel, ids: Tensor, table: Table | None, pos_start: int | None = None) -> Tensor:
    """Logits ``[n, V]`` of one request by the model's own forward."""
    if table is None:
        return model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False).logits[0]
    rows, n = num_rows(table), len(ids)
    start = rows if pos_start is None else pos_start
    filled = [
        (None, None) if own is None else tuple(t.transpose(0, 1)[None].to(model.dtype) for t in own) for own in table
    ]
    return model(
        input_ids=ids[None],
        past_key_values=DynamicCache(filled),
        attention_mask=torch.ones(1, rows + n, dtype=torch.long),
        position_ids=torch.arange(start, start + n)[None],
    ).logits[0]


def packed(
    model: Model, ids: list[Tensor], prefixes: list[Prefix], choice: Any, grad: bool = False
) -> tuple[Tensor, list[LayerKV]]:
    """Logits ``[N, V]`` of all requests in one packed forward, and the prefix tensors."""
    leaves: list[LayerKV] = [
        (k.requires_grad_(grad), v.requires_grad_(grad))
        for k, v in concat_kv(prefixes, model.layers, model.dtype, model.device)
    ]
    used = [[c] if c >= 0 else [] for c in choice]
    use = PrefixUse(
        np.cumsum([0, *map(len, used)], dtype=np.int32), np.array([c for own in used for c in own], np.int32)
    )
    lengths = np.array([len(i) for i in ids], np.int32)
    plan = training_plan(lengths, use, row_table(prefixes, model), leaves, backend=model.backend)
    return model.forward(plan, torch.cat(ids)), leaves


def relative(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value; infinite if a value is not finite."""
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def compare(model: Model, own: PreTrainedModel) -> Differences:
    """Differences of a loaded model from a copy that is not attached.

    A model whose cache does not hold the keys and values of attention is compared with prefixes of texts only.
    """
    ids, tables = prompts(model.vocab_size), random_tables(model)
    if not takes_rows(own, ids[0], tables[0]):
        return Differences(None, None, _tokens_after_texts(model, own, ids), _text(model, own, ids))
    return Differences(
        _logits(model, own, ids, tables),
        _gradients(model, own, ids, tables),
        _tokens(model, own, ids, tables),
        _text(model, own, ids),
    )


@torch.no_grad()
def takes_rows(own: PreTrainedModel, ids: Tensor, table: Table) -> bool:
    """Whether a model's cache holds keys and values as attention gets them."""
    try:
        reference(own, ids, table)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError):
        return False
    return True


@torch.no_grad()
def _logits(model: Model, own: PreTrainedModel, ids: list[Tensor], tables: list[Table]) -> float:
    """Largest difference of the logits with prefixes, for both values of ``pos_start``."""
    worst = 0.0
    for zero in (False, True):
        starts = [0 if zero else num_rows(t) for t in tables]
        got, _ = packed(model, ids, [as_prefix(t, s) for t, s in zip(tables, starts, strict=True)], CHOICE)
        for part, text, c in zip(got.split(LENGTHS), ids, CHOICE, strict=True):
            expected = reference(own, text, None if c < 0 else tables[c], None if c < 0 else starts[c])
            worst = max(worst, relative(part, expected))
    return worst


def _gradients(model: Model, own: PreTrainedModel, ids: list[Tensor], tables: list[Table]) -> float:
    """Largest difference of the prefixes' gradients."""
    g = torch.Generator().manual_seed(9)
    weights = [torch.rand(n, generator=g) for n in LENGTHS]
    leaves: list[Table] = [
        [None if kv is None else (kv[0].clone().requires_grad_(), kv[1].clone().requires_grad_()) for kv in t]
        for t in tables
    ]

    def loss(logits: Tensor, text: Tensor, weight: Tensor) -> Tensor:
        return (F.cross_entropy(logits, text.roll(-1), reduction="none") * weight).sum()

    for text, c, weight in zip(ids, CHOICE, weights, strict=True):
        if c >= 0:
            loss(reference(own, text, leaves[c]), text, weight).backward()
    got, ours = packed(model, ids, [as_prefix(t, num_rows(t)) for t in tables], CHOICE, grad=True)
    sum(loss(p, t, w) for p, t, w in zip(got.split(LENGTHS), ids, weights, strict=True)).backward()
    largest = max(t.grad.abs().max().item() for table in leaves for kv in table for t in kv or () if t.grad is not None)
    worst, at = 0.0, 0
    for table in leaves:
        rows = num_rows(table)
        for layer, kv in enumerate(table):
            for side, leaf in zip(ours[layer], kv or (), strict=kv is not None):
                expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                worst = max(worst, (side.grad[at : at + rows] - expected).abs().max().item())
        at += rows
    return worst / largest


def _tokens(model: Model, own: PreTrainedModel, ids: list[Tensor], tables: list[Table]) -> int:
    """Number of requests with random prefixes whose greedy tokens differ."""
    prefixes = [as_prefix(t, num_rows(t)) for t in tables]
    return _wrong_tokens(
        model,
        own,
        ids,
        [None if c < 0 else prefixes[c] for c in CHOICE],
        lambda request, seen: reference(own, seen, None if CHOICE[request] < 0 else tables[CHOICE[request]]),
    )


def _tokens_after_texts(model: Model, own: PreTrainedModel, ids: list[Tensor]) -> int:
    """Number of requests with prefixes of a text whose greedy tokens differ."""
    text = ids[5]
    prefix = text_prefix(model, text)
    return _wrong_tokens(
        model,
        own,
        ids,
        [None if c < 0 else prefix for c in CHOICE],
        lambda request, seen: reference(own, seen if CHOICE[request] < 0 else torch.cat([text, seen]), None),
    )


@torch.no_grad()
def _wrong_tokens(
    model: Model,
    own: PreTrainedModel,
    ids: list[Tensor],
    chosen: Sequence[Prefix | None],
    expected: Callable[[int, Tensor], Tensor],
) -> int:
    """Number of requests with a greedy token that is not the most likely one, with chunked prefill.

    Args:
        model: Loaded model.
        own: Copy that is not attached.
        ids: Prompts.
        chosen: Prefix of each request.
        expected: Function of a request's number and its tokens that gives the reference's logits.
    """
    with Engine(model, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, kv_cache_memory=2**26) as engine:
        made = engine.generate([t.tolist() for t in ids], chosen, max_new_tokens=NEW, min_new_tokens=NEW)
    end = own.generation_config.eos_token_id
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    wrong = 0
    for request, out in enumerate(made):
        seen = ids[request]
        for token in out.token_ids:
            logits = expected(request, seen)[-1].clone()
            logits[ends] = -float("inf")
            if (logits.max() - logits[token]).item() > 1e-4 * logits[logits.isfinite()].abs().max().item():
                wrong += 1
                break
            seen = torch.cat([seen, torch.tensor([token])])
        wrong += len(out.token_ids) != NEW and not wrong
    return wrong


@torch.no_grad()
def _text(model: Model, own: PreTrainedModel, ids: list[Tensor]) -> float:
    """Largest difference of the logits after a prefix made of a text, from those of text and prompt together."""
    text, prompt = ids[5], ids[0]
    prefix = text_prefix(model, text)
    got, _ = packed(model, [prompt, ids[1]], [prefix], (0, 0))
    worst = 0.0
    for part, tail in zip(got.split([len(prompt), len(ids[1])]), (prompt, ids[1]), strict=True):
        worst = max(worst, relative(part, reference(own, torch.cat([text, tail]), None)[len(text) :]))
    return worst


def text_prefix(model: Model, text: Tensor) -> Prefix:
    """Prefix of the keys and values of a text."""
    return as_prefix(own_rows(model, text_kv(model, text.tolist(), len(text))), len(text))
