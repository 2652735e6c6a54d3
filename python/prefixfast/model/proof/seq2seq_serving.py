"""Prefill and decode steps of the proof of encoder-decoder models, through the scheduler and the plans of the engine.

Shape letters: P prefix rows, H heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prefixfast import _rust
from prefixfast.attention.plan import Arena, Layout, host_table
from prefixfast.attention.seq2seq_plan import seq2seq_decode_plan, seq2seq_prefill_plan
from prefixfast.config.sites import Site
from prefixfast.model.proof.seq2seq_cases import NEW, PackedSeq2Seq, Request, SitePrefix
from prefixfast.model.proof.serving import RESERVED_ROWS, ROW_UNIT

STEP_TOKENS = 64  # tokens of a step, so that the prompts are filled over several steps
ORDER: tuple[Site, ...] = ("self", "cross", "enc")  # order of the sites in the arena rows of a prefix


class Served(NamedTuple):
    """Logits of one token from the engine's plans.

    Attributes:
        request: Number of the request.
        beam: Number of the beam.
        token: Index of the token in the decoder's text.
        step: ``"prefill"`` or ``"decode"``.
        logits: Logits ``[V]``.
    """

    request: int
    beam: int
    token: int
    step: str
    logits: Tensor


@torch.no_grad()
def serve_seq2seq(
    packed: PackedSeq2Seq,
    requests: Sequence[Request],
    prefixes: Sequence[SitePrefix],
    beams: Sequence[Sequence[Tensor]],
) -> list[Served]:
    """Logits of all requests from prefill and decode steps.

    Args:
        packed: Attached model.
        requests: Requests. The last tokens of each are given to decode steps.
        prefixes: Prefixes.
        beams: Decoder tokens of each beam of each request, which are equal but for the last ones.
    """
    return _Engine(packed, requests, prefixes, beams).run()


class _Engine:
    """Scheduler and arena of one run."""

    def __init__(
        self,
        packed: PackedSeq2Seq,
        requests: Sequence[Request],
        prefixes: Sequence[SitePrefix],
        beams: Sequence[Sequence[Tensor]],
    ) -> None:
        self.packed, self.requests, self.beams = packed, requests, beams
        self.depth = len(packed.sites["self"])
        self.folds = [i // self.depth for i in range(len(packed.sites["enc"]))]
        self.prompts = [len(r.ids) - NEW for r in requests]
        decode_rows, longest = sum(map(len, beams)), max(len(r.ids) for r in requests) + NEW
        units = [self._run(p)[1] for p in prefixes] + [len(r.encoder_ids) for r in requests]
        units += [longest] * decode_rows
        self.arena = self._arena(RESERVED_ROWS + ROW_UNIT * sum(-(-n // ROW_UNIT) + 1 for n in units), decode_rows)
        self.scheduler = _rust.Scheduler(
            len(self.arena.layers[0][0]),
            decode_rows,
            STEP_TOKENS,
            tile_rows=packed.backend.sizes.tokens,
            decode=packed.backend.decode,
            encoder_folds=self.folds,
        )
        for number, prefix in enumerate(prefixes):
            sites, rows = self._run(prefix)
            self.scheduler.register_prefix(
                number, rows, prefix.pos_start, True, sites=[(*sites[site], None) for site in ORDER]
            )
            self._load(number, prefix)
        for i, r in enumerate(requests):
            used = [] if r.prefix is None else [r.prefix]
            self.scheduler.add(i, used, self.prompts[i], len(beams[i]), NEW, encoder_len=len(r.encoder_ids))
        self.done = list(self.prompts)  # decoder tokens of each request so far

    def run(self) -> list[Served]:
        """Logits of all tokens that the steps compute."""
        waiting, served = len(self.requests), list[Served]()
        while waiting:
            buffer = torch.empty(self.scheduler.buffer_len, dtype=torch.int32)
            header = self.scheduler.plan_step(buffer.numpy())
            if header.prefill is not None:
                served += self._prefill(buffer, header)
            if header.decode is not None:
                served += self._decode(buffer, header)
            ended = [i for i in header.decode_ids if self.done[i] == len(self.requests[i].ids)]
            self.scheduler.commit(ended)
            waiting -= len(ended)
        return served

    def _arena(self, rows: int, decode_rows: int) -> Arena:
        """Arena of zeros with the layers of the decoder, in whose tensors the encoder's prefix rows lie in turn."""
        device, dtype = self.packed.model.device, self.packed.dtype
        layers = []
        for s in self.packed.sites["self"]:
            k, v = (torch.zeros(rows, s.num_kv_heads, s.head_dim, dtype=dtype, device=device) for _ in "kv")
            layers.append((k, v))
        encoder = []
        for i, s in enumerate(self.packed.sites["enc"]):
            k, v = (t.view(rows, s.num_kv_heads, s.head_dim) for t in layers[i % self.depth])
            encoder.append((k, v))
        longest = max(len(r.ids) for r in self.requests) + NEW
        table = torch.zeros(decode_rows + 1, longest, dtype=torch.int32, device=device)
        return Arena(layers, table, encoder_layers=encoder)

    def _run(self, prefix: SitePrefix) -> tuple[Mapping[Site, tuple[int, int]], int]:
        """First row and number of rows of each site in the arena rows of a prefix, and the number of arena rows."""
        found, end = {}, 0
        for site in ORDER:
            start, rows = -(-end // ROW_UNIT) * ROW_UNIT, prefix.rows(site)
            found[site] = start, rows
            end = start + rows * (max(self.folds) + 1 if site == "enc" else 1)
        return found, end

    def _load(self, number: int, prefix: SitePrefix) -> None:
        place = self.scheduler.load_prefix(number)
        assert place is not None
        sites, _ = self._run(prefix)
        for site, layers in prefix.kv.items():
            first, rows = sites[site]
            arena = self.arena.encoder_layers if site == "enc" else self.arena.layers
            for i, kv in enumerate(layers):
                start = place[0] + first + (self.folds[i] * rows if site == "enc" else 0)
                for target, source in zip(arena[i], kv, strict=True):
                    target[start : start + rows] = source
        self.scheduler.prefix_ready(number)

    def _prefill(self, buffer: Tensor, header: _rust.StepHeader) -> Iterator[Served]:
        assert header.encoder is not None
        assert header.prefill is not None
        assert header.cross is not None
        device, numbers = self.packed.model.device, header.prefill_ids
        layouts: dict[Site, Layout] = {
            "enc": Layout(*header.encoder),
            "self": Layout(*header.prefill),
            "cross": Layout(*header.cross),
        }
        reach = max(header.prefill_reach, header.encoder_reach)
        plan = seq2seq_prefill_plan(buffer.to(device), layouts, reach, self.arena, self.packed.backend)
        ids = torch.cat([self.requests[i].ids[: self.prompts[i]] for i in numbers])
        logits = self.packed.logits(plan, ids, torch.cat([self.requests[i].encoder_ids for i in numbers]))
        for i, row in zip(numbers, logits, strict=True):
            yield Served(i, 0, self.prompts[i] - 1, "prefill", row)

    def _decode(self, buffer: Tensor, header: _rust.StepHeader) -> Iterator[Served]:
        assert header.decode is not None
        assert header.decode_cross is not None
        device = self.packed.model.device
        layouts: dict[Site, Layout] = {"self": Layout(*header.decode), "cross": Layout(*header.decode_cross)}
        longest = int(host_table(buffer.numpy(), layouts["self"].views[0]["lens"]).max())
        reach = max(header.decode_reach, header.encoder_reach)
        plan = seq2seq_decode_plan(buffer.to(device), layouts, reach, longest, self.arena, self.packed.backend)
        rows = [(i, beam) for i in header.decode_ids for beam in range(len(self.beams[i]))]
        ids = torch.stack([self.beams[i][beam][self.done[i]] for i, beam in rows])
        for (i, beam), row in zip(rows, self.packed.logits(plan, ids, None), strict=True):
            yield Served(i, beam, self.done[i], "decode", row)
        for i in header.decode_ids:
            self.done[i] += 1
