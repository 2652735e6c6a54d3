"""Texts and prefixes of the proof of encoder-decoder models, and their packed forwards by the plan of training.

Shape letters: M encoder tokens, N decoder tokens, P prefix rows, H heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention.ops import Backend
from prefixfast.attention.plan import LayerKV, PlannedPrefix, PrefixUse, SitePrefixes, prefix_rows
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan, plain_seq2seq_plan, seq2seq_training_plan
from prefixfast.config.sites import SITES, Site
from prefixfast.model.dry_run import LayerShape
from prefixfast.model.lm_head import Head
from prefixfast.model.seq2seq.stacks import seq2seq_hidden

ENCODER_TEXT, DECODER_TEXT, SHORT = 20, 14, 4  # tokens of the long and of the short texts
PREFIX = 6  # tokens of the long decoder text that become a prefix
NEW = 2  # tokens of each request that decode steps compute
ROWS: Mapping[Site, int] = {"enc": 3, "self": 5, "cross": 2}  # rows of the random prefixes
SiteKV = Mapping[Site, list[LayerKV]]


@dataclass(frozen=True)
class SitePrefix:
    """A prefix of an encoder-decoder model.

    Attributes:
        kv: Keys and values ``[P, H, D]`` by layer of each of its sites.
        pos_start: Position of the first decoder token after it.
    """

    kv: SiteKV
    pos_start: int

    def rows(self, site: Site) -> int:
        """Number of rows P of a site, 0 without it."""
        return len(self.kv[site][0][0]) if site in self.kv else 0


@dataclass(frozen=True)
class Request:
    """A request of the proof.

    Attributes:
        name: Feature that the request shows, for messages.
        encoder_ids: Token ids of the encoder ``[M]``.
        ids: Token ids of the decoder ``[N]``.
        prefix: Number of its prefix, None without one.
    """

    name: str
    encoder_ids: Tensor
    ids: Tensor
    prefix: int | None = None


@dataclass(frozen=True)
class PackedSeq2Seq:
    """Attached encoder-decoder model with what its packed forwards need.

    Attributes:
        model: Attached model.
        sites: Heads of every layer by site.
        head: Output layer.
        backend: Kernels that attention runs on.
        dtype: Dtype of keys and values.
    """

    model: PreTrainedModel
    sites: Mapping[Site, Sequence[LayerShape]]
    head: Head
    backend: Backend
    dtype: torch.dtype

    def logits(self, plan: Seq2SeqPlan, ids: Tensor, encoder_ids: Tensor | None) -> Tensor:
        """Logits ``[n, V]`` of a packed forward or a decode step."""
        return self.head.logits(seq2seq_hidden(self.model, plan, ids, encoder_ids))

    @torch.no_grad()
    def texts(self, requests: Sequence[Request]) -> tuple[Tensor, SiteKV]:
        """Logits ``[N, V]`` of requests without prefixes, and keys and values of all tokens by layer of each site."""
        found: dict[Site, dict[int, LayerKV]] = {site: {} for site in SITES}
        plan = plain_seq2seq_plan(*_lengths(requests), backend=self.backend, device=self.model.device)
        plan = plan.with_probe(lambda call: found[call.site].update({call.layer: (call.k, call.v)}))
        logits = self.logits(plan, *_tokens(requests))
        return logits, {site: [kv[i] for i in range(len(kv))] for site, kv in found.items()}

    @torch.no_grad()
    def training(self, requests: Sequence[Request], prefixes: Sequence[SitePrefix]) -> Tensor:
        """Logits ``[N, V]`` of requests with their prefixes in one packed forward, by the plan of training."""
        used = [[] if r.prefix is None else [r.prefix] for r in requests]
        use = PrefixUse(
            np.cumsum([0, *map(len, used)], dtype=np.int32), np.array([n for own in used for n in own], np.int32)
        )
        decoder, encoder = (np.array(n, np.int32) for n in _lengths(requests))
        device = self.model.device
        by_site = {site: self._site_prefixes(site, prefixes) for site in SITES}
        plan = seq2seq_training_plan(decoder, encoder, use, by_site, backend=self.backend, device=device)
        return self.logits(plan, *_tokens(requests))

    def _site_prefixes(self, site: Site, prefixes: Sequence[SitePrefix]) -> SitePrefixes:
        depth = len(self.sites[site])
        rows = [PlannedPrefix(range(depth) if site in p.kv else (), p.rows(site), p.pos_start, True) for p in prefixes]
        own = [p.kv[site] for p in prefixes if site in p.kv]
        kv = [(torch.cat([kv[i][0] for kv in own]), torch.cat([kv[i][1] for kv in own])) for i in range(depth)]
        return SitePrefixes(prefix_rows(rows, depth), kv)


def _lengths(requests: Sequence[Request]) -> tuple[list[int], list[int]]:
    return [len(r.ids) for r in requests], [len(r.encoder_ids) for r in requests]


def _tokens(requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
    return torch.cat([r.ids for r in requests]), torch.cat([r.encoder_ids for r in requests])


def plain_requests(model: PreTrainedModel, pad: int) -> list[Request]:
    """Requests without prefixes: a long and a short one.

    Args:
        model: Model.
        pad: Id of the padding token, which some models hide.
    """
    g = torch.Generator().manual_seed(0)

    def text(stack: str, n: int) -> Tensor:
        size = len(getattr(model, f"get_{stack}")().embed_tokens.weight)
        ids = torch.randint(min(3, size - 1), size, (n,), generator=g)
        ids[ids == pad] = (pad + 1) % size
        return ids.to(model.device)

    long = Request("packed texts", text("encoder", ENCODER_TEXT), text("decoder", DECODER_TEXT))
    return [long, Request("packed texts", text("encoder", SHORT), text("decoder", SHORT - 1))]


def requests_with_prefixes(plain: Sequence[Request], text_kv: SiteKV) -> tuple[list[Request], list[SitePrefix]]:
    """Requests with a prefix at each kind of place and one without, and the prefixes.

    Prefix 0 is the first decoder tokens of the long text. The others are random.

    Args:
        plain: Requests of `plain_requests`.
        text_kv: Keys and values of all of their tokens by layer of each site, the first request's first.
    """
    long, short = plain
    text: SiteKV = {"self": [(k[:PREFIX], v[:PREFIX]) for k, v in text_kv["self"]]}
    prefixes = [
        SitePrefix(text, PREFIX),
        SitePrefix(random_kv(text_kv, SITES, 1), ROWS["self"]),
        SitePrefix(random_kv(text_kv, ("enc",), 2), 0),
        SitePrefix(random_kv(text_kv, ("self", "cross"), 3), 0),
    ]
    encoder, ids = long.encoder_ids, long.ids
    requests = [
        Request("a prefix of a text", encoder, ids[PREFIX:], 0),
        Request("a prefix at three sites", encoder[4:], ids[:7], 1),
        Request("a prefix of the encoder", encoder[:9], ids[3:9], 2),
        Request("a prefix of the decoder at position 0", encoder[2:9], ids[2:7], 3),
        Request("packed texts", short.encoder_ids, short.ids),
    ]
    return requests, prefixes


def random_kv(like: SiteKV, sites: Sequence[Site], seed: int) -> SiteKV:
    """Random keys and values ``[P, H, D]`` by layer of each site, as large as those of a text."""
    g = torch.Generator().manual_seed(seed)

    def rows(t: Tensor, count: int) -> Tensor:
        made = torch.randn(count, *t.shape[1:], generator=g).to(t.device, t.dtype)
        return made * t.float().pow(2).mean().sqrt().to(t.dtype)

    return {site: [(rows(k, ROWS[site]), rows(v, ROWS[site])) for k, v in like[site]] for site in sites}
