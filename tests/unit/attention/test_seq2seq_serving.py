"""Prefill and decode of an encoder-decoder base through the scheduler, against attention over joined keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prefixfast import CapacityError, ConfigError, RequestError
from prefixfast._rust import Scheduler
from prefixfast.attention.hf_interface import TAG, SiteTag, prefixfast_attention
from prefixfast.attention.plan import Arena, Layout
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan, seq2seq_decode_plan, seq2seq_prefill_plan
from prefixfast.config.sites import Site
from prefixfast_kernels.tile_selection import Backend

ROWS, FOLDS = 64 + 16 * 40, [0, 0, 1, 1, 2]  # arena rows; fold of each encoder layer, two of which share a tensor
HEADS: dict[Site, tuple[int, int]] = {"enc": (4, 4), "self": (2, 8), "cross": (2, 8)}  # heads, head dim
LAYERS: dict[Site, int] = {"enc": 5, "self": 2, "cross": 2}
LENGTHS: list[dict[Site, int]] = [{"enc": 3, "self": 5, "cross": 2}, {"cross": 20}, {"enc": 18, "self": 1}]
PREFIXES, ENCODER_LENS, BEAMS = [[0], [1, 0], [], [2, 1], [2]], [6, 33, 1, 16, 17], [2, 1, 4, 1, 2]
LEFT_OUT = {(0, "enc", 2), (1, "cross", 1), (2, "self", 0)}  # (prefix, site, layer) that the prefix leaves out
REFERENCE = Backend("reference")


def above(rows: int) -> int:
    return -(-rows // 16) * 16


@dataclass
class Request:
    """A request with its tensors, by site and layer."""

    prefixes: list[int]
    encoder_len: int
    beams: int
    encoder: dict[tuple[Site, int], tuple[Tensor, Tensor]]  # keys and values of the encoder tokens


class Served:
    """A scheduler with an arena that holds the prefixes, at the steps after which every request is decoded."""

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(5)
        self.scheduler = Scheduler(ROWS, 12, 300, decode=(3, 4, 512, 1, 1, 1), encoder_folds=FOLDS)
        layers = [(torch.zeros(ROWS, 2, 8), torch.zeros(ROWS, 2, 8)) for _ in range(2)]
        encoder = [tuple(t.view(ROWS, *HEADS["enc"]) for t in layers[i % 2]) for i in range(LAYERS["enc"])]
        self.arena = Arena(layers, torch.zeros(12, 8, dtype=torch.int32), encoder_layers=encoder)
        self.prefix = {
            (number, site, layer): self.tensors(site, rows)
            for number, lengths in enumerate(LENGTHS)
            for site, rows in lengths.items()
            for layer in range(LAYERS[site])
            if (number, site, layer) not in LEFT_OUT
        }
        for number in range(len(LENGTHS)):
            self.scheduler.register_prefix(number, self.total(number), number, True, sites=self.sites(number))
        self.requests = [
            Request(prefixes, n, beams, {}) for prefixes, n, beams in zip(PREFIXES, ENCODER_LENS, BEAMS, strict=True)
        ]
        for id, r in enumerate(self.requests):
            self.scheduler.add(id, r.prefixes, 1, r.beams, 3, encoder_len=r.encoder_len)

    def tensors(self, site: Site, rows: int) -> tuple[Tensor, Tensor]:
        k, v = (torch.randn(rows, *HEADS[site], generator=self.random) for _ in range(2))
        return k, v

    def sites(self, number: int) -> list[tuple[int, int, list[bool] | None]]:
        lengths, offset, made = LENGTHS[number], 0, []
        for site in ("self", "cross", "enc"):
            has = [(number, site, layer) not in LEFT_OUT for layer in range(LAYERS[site])]
            made.append((offset, lengths.get(site, 0), None if all(has) else has))
            offset += above(lengths.get(site, 0))
        return made

    def total(self, number: int) -> int:
        return self.sites(number)[2][0] + 3 * LENGTHS[number].get("enc", 0)

    def load(self, number: int, first: int) -> None:
        """Copy a prefix to its arena rows."""
        for (n, site, layer), kv in self.prefix.items():
            if n == number:
                offset, rows, _ = self.sites(number)[("self", "cross", "enc").index(site)]
                start = first + offset + (FOLDS[layer] * rows if site == "enc" else 0)
                layers = self.arena.encoder_layers if site == "enc" else self.arena.layers
                for target, source in zip(layers[layer], kv, strict=True):
                    target[start : start + rows] = source
        self.scheduler.prefix_ready(number)

    def joined(self, request: Request, site: Site, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a request's prefixes in one layer, from left to right."""
        kv = [self.prefix[n, site, layer] for n in request.prefixes if (n, site, layer) in self.prefix]
        empty = torch.zeros(0, *HEADS[site])
        return torch.cat([empty, *(k for k, _ in kv)]), torch.cat([empty, *(v for _, v in kv)])


def layouts(**found: Any) -> dict[Site, Layout]:
    return {site: Layout(*layout) for site, layout in found.items()}  # type: ignore[misc]


def attention(plan: Seq2SeqPlan, site: Site, layer: int, *qkv: Tensor) -> Tensor:
    module = nn.Module()
    setattr(module, TAG, SiteTag(site, layer, None))
    heads = [t.transpose(0, 1)[None] for t in qkv]
    out, _ = prefixfast_attention(module, *heads, None, prefixfast=plan)  # type: ignore[arg-type]
    return out[0]


def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every query over all keys, ``[N, H, D]``."""
    scores = torch.einsum("nhd,mhd->hnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)


@pytest.fixture(scope="module")
def served() -> Served:
    served = Served()
    for number in range(len(LENGTHS)):
        placed = served.scheduler.load_prefix(number)
        assert placed is not None
        served.load(number, placed[0])
    return served


def test_prefill_and_decode_are_attention_over_joined_keys(served: Served) -> None:
    arena, scheduler = served.arena, served.scheduler
    out = np.zeros(scheduler.buffer_len, np.int32)
    header = scheduler.plan_step(out)
    assert sorted(header.prefill_ids) == list(range(len(PREFIXES)))
    found = layouts(enc=header.encoder, self=header.prefill, cross=header.cross)
    reach = max(header.prefill_reach, header.encoder_reach)
    plan = seq2seq_prefill_plan(torch.from_numpy(out), found, reach, arena, REFERENCE)
    order = [served.requests[id] for id in header.prefill_ids]
    total = sum(r.encoder_len for r in order)
    assert plan.at("enc").position_ids[0].tolist() == [t for r in order for t in range(r.encoder_len)]
    assert plan.position_ids[0].tolist() == [max(r.prefixes, default=0) for r in order]
    before = [k.clone() for k, _ in arena.layers]
    for layer in range(LAYERS["enc"]):
        q, (k, v) = served.tensors("enc", total)[0], served.tensors("enc", total)
        got = attention(plan, "enc", layer, q, k, v).split([r.encoder_len for r in order])
        for r, mine, *own in zip(
            order, got, *(t.split([r.encoder_len for r in order]) for t in (q, k, v)), strict=True
        ):
            pk, pv = served.joined(r, "enc", layer)
            want = expected(own[0], torch.cat([pk, own[1]]), torch.cat([pv, own[2]]))
            torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, k) for a, (k, _) in zip(before, arena.layers, strict=True)), "the encoder writes no rows"
    for layer in range(LAYERS["cross"]):
        q, (k, v) = served.tensors("cross", len(order))[0], served.tensors("cross", total)
        got = attention(plan, "cross", layer, q, k, v)
        ends = np.cumsum([r.encoder_len for r in order])
        for i, (r, end) in enumerate(zip(order, ends, strict=True)):
            own = r.encoder["cross", layer] = tuple(t[end - r.encoder_len : end] for t in (k, v))
            pk, pv = served.joined(r, "cross", layer)
            want = expected(q[i : i + 1], torch.cat([pk, own[0]]), torch.cat([pv, own[1]]))
            torch.testing.assert_close(got[i : i + 1], want, rtol=1e-5, atol=1e-5)
    scheduler.commit([])
    header = scheduler.plan_step(out)
    found = layouts(self=header.decode, cross=header.decode_cross)
    plan = seq2seq_decode_plan(torch.from_numpy(out), found, header.encoder_reach, 2, arena, REFERENCE)
    rows = [served.requests[id] for id in header.decode_ids for _ in range(served.requests[id].beams)]
    assert plan.encoder is None
    assert plan.decode is not None
    for layer in range(LAYERS["cross"]):
        q, dummy = served.tensors("cross", len(rows))[0], torch.full((1, *HEADS["cross"]), torch.nan)
        got = attention(plan, "cross", layer, q, dummy, dummy)
        for i, r in enumerate(rows):
            pk, pv = served.joined(r, "cross", layer)
            k, v = r.encoder["cross", layer]
            want = expected(q[i : i + 1], torch.cat([pk, k]), torch.cat([pv, v]))
            torch.testing.assert_close(got[i : i + 1], want, rtol=1e-5, atol=1e-5)
    scheduler.commit(header.decode_ids)
    for number in range(len(LENGTHS)):
        scheduler.forget_prefix(number)
    assert scheduler.free_rows == ROWS - 64


def test_sites_are_checked() -> None:
    scheduler = Scheduler(ROWS, 12, 300, encoder_folds=[0, 1])
    good = [(0, 20, None), (32, 16, None), (48, 8, None)]
    for error, change in [
        (ConfigError, {"sites": [(0, 20, None), (16, 16, None), (48, 8, None)]}),
        (ConfigError, {"sites": [(0, 20, None), (32, 16, None), (48, -8, None)]}),
        (ConfigError, {"sites": [(0, 20, None), (32, 16, None), (48, 8, [True])]}),
        (ConfigError, {"layers": [True, True]}),
        (ConfigError, {"place": 1}),
        (ConfigError, {"prefix": -1}),
        ((TypeError, ValueError), {"sites": good[:2]}),
    ]:
        with pytest.raises(error):
            scheduler.register_prefix(
                **{"prefix": 0, "rows": 64, "pos_start": 20, "slides": True, "sites": good, **change}
            )
    scheduler.register_prefix(0, 64, 20, True, sites=good)
    with pytest.raises(RequestError, match="encoder_len of request 1 is 0"):
        scheduler.add(1, [0], 1, 1, 2)
    with pytest.raises(CapacityError, match="tokens of the encoder") as caught:
        scheduler.add(1, [0], 1, 1, 2, encoder_len=289)
    assert (caught.value.limit, caught.value.needed, caught.value.available) == ("encoder_tokens", 290, 289)
    scheduler.add(1, [0], 1, 1, 2, encoder_len=288)
    for change in ({"encoder_folds": []}, {"encoder_folds": [0, 2]}, {"encoder_folds": [-1]}):
        with pytest.raises(ConfigError, match="encoder_folds"):
            Scheduler(ROWS, 12, 300, **change)
    with pytest.raises(ConfigError, match="pad_decode"):
        Scheduler(ROWS, 12, 300, encoder_folds=[0], pad_decode=True)
