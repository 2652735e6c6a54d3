"""The plans of one forward of an encoder-decoder base, one for each kind of attention.

Shape letters: S sequences, M encoder tokens, N decoder tokens, R decode rows, P prefix rows, H kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prefixfast.attention.plan import (
    NO_PREFIXES,
    Arena,
    AttentionCall,
    AttentionKind,
    Plan,
    PrefixUse,
    SitePrefixes,
    decode_plan,
    packed_plan,
    prefill_plan,
)
from prefixfast.attention.planner_tables import Layout, PrefixRows, decode_tables, packed_tables, section
from prefixfast.config.sites import SITES, Site
from prefixfast_kernels.tables import DecodeTables
from prefixfast_kernels.tile_selection import Backend

NO_SITE_PREFIXES: Final[Mapping[Site, SitePrefixes]] = {site: SitePrefixes(NO_PREFIXES, None) for site in SITES}


@dataclass(frozen=True)
class Seq2SeqPlan:
    """One packed forward or decode step of an encoder-decoder base.

    Attributes:
        decoder: Plan of the decoder's self-attention.
        cross: Plan of cross-attention.
        encoder: Plan of the encoder's self-attention, None in decode, where the encoder does not run.
    """

    decoder: Plan
    cross: Plan
    encoder: Plan | None = None

    def at(self, site: Site) -> Plan:
        """Plan of a kind of attention.

        Raises:
            RuntimeError: If the site is ``"enc"`` and the plan is that of a decode step.
        """
        if site == "self":
            return self.decoder
        if site == "cross":
            return self.cross
        if self.encoder is None:
            msg = (
                "the encoder runs in a decode step, and its plan is that of the decoder only; give a plan of a prefill"
            )
            raise RuntimeError(msg)
        return self.encoder

    @property
    def position_ids(self) -> Tensor:
        """Positions of the decoder's tokens, ``[1, N]`` or, in decode, ``[1, R]``."""
        return self.decoder.position_ids

    @property
    def backend(self) -> Backend:
        """Kernels that attention runs on."""
        return self.decoder.backend

    @property
    def logits_at(self) -> Tensor | None:
        """Indices of the decoder's tokens whose logits are computed, ``[n]``, or None for all tokens."""
        return self.decoder.logits_at

    @property
    def decode(self) -> Sequence[DecodeTables] | None:
        """Tables of the decoder's self-attention in a decode step, or None in a packed forward."""
        return self.decoder.decode

    def encoder_parts(self, most: int) -> list[tuple[slice, Seq2SeqPlan]]:
        """Plans of the encoder over some of its texts each, for attention that goes from sequence to sequence.

        Args:
            most: Largest number of tokens of a part that has several texts.

        Returns:
            Tokens and plan of each part, in order. Together they have every text once.
        """
        assert self.encoder is not None
        assert self.encoder.packed is not None
        segments, parts = self.encoder.packed[0].seg.tolist(), []
        first = 0
        for i, (row, rows, _, _) in enumerate(segments):
            is_last = i + 1 == len(segments)
            start = segments[first][0]
            if is_last or row + rows + segments[i + 1][1] - start > most:
                tokens = slice(start, row + rows)
                parts.append((tokens, replace(self, encoder=_texts(self.encoder, slice(first, i + 1), tokens))))
                first = i + 1
        return parts

    def with_logits_at(self, index: Tensor) -> Seq2SeqPlan:
        """The same plan with logits of the decoder's tokens ``index`` ``[n]`` only."""
        return replace(self, decoder=self.decoder.with_logits_at(index))

    def with_probe(self, probe: Callable[[AttentionCall], None]) -> Seq2SeqPlan:
        """The same plan with a function that is called after every attention of a packed forward."""
        encoder = None if self.encoder is None else replace(self.encoder, probe=probe)
        return Seq2SeqPlan(replace(self.decoder, probe=probe), replace(self.cross, probe=probe), encoder)


def _texts(plan: Plan, texts: slice, tokens: slice) -> Plan:
    """Plan of some sources. Its tables of blocks and tiles stay those of all sources."""
    assert plan.packed is not None
    packed = []
    for tables in plan.packed:
        seg = tables.seg[texts].clone()
        seg[:, [0, 2]] -= tokens.start
        borders = tables.use_indptr[texts.start : texts.stop + 1]
        packed.append(tables._replace(seg=seg, seg_pos=tables.seg_pos[texts], use_indptr=borders))
    return replace(plan, position_ids=plan.position_ids[:, tokens], packed=packed)


def seq2seq_training_plan(
    lengths: NDArray[np.int32],
    encoder_lengths: NDArray[np.int32],
    used: PrefixUse,
    prefixes: Mapping[Site, SitePrefixes],
    *,
    backend: Backend,
    device: torch.device | str = "cpu",
) -> Seq2SeqPlan:
    """Plan of a packed forward of an encoder and a decoder without an arena.

    The position of the first decoder token is the largest ``pos_start`` of its prefixes. Encoder tokens count from 0.

    Args:
        lengths: Number of decoder tokens of each sequence, int32 ``[S]``.
        encoder_lengths: Number of encoder tokens of each sequence, int32 ``[S]``.
        used: Prefixes that each sequence sees, the same for all sites. A prefix has 0 rows at a site that it leaves
            out.
        prefixes: Rows, keys and values of the prefixes at each site.
        backend: Kernels that attention runs on.
        device: Device of the model.
    """
    rows, kv = prefixes["enc"]
    from_zero = rows.table.copy()
    from_zero[:, :, 2] = 0
    encoder = SitePrefixes(PrefixRows(from_zero, rows.view_of), kv)
    return Seq2SeqPlan(
        packed_plan(lengths, used, prefixes["self"], AttentionKind(), backend=backend, device=device),
        packed_plan(
            lengths, used, prefixes["cross"], AttentionKind(False, encoder_lengths), backend=backend, device=device
        ),
        packed_plan(encoder_lengths, used, encoder, AttentionKind(False), backend=backend, device=device),
    )


def plain_seq2seq_plan(
    lengths: Sequence[int], encoder_lengths: Sequence[int], *, backend: Backend, device: torch.device | str = "cpu"
) -> Seq2SeqPlan:
    """Plan of sequences without prefixes.

    Args:
        lengths: Number of decoder tokens of each sequence.
        encoder_lengths: Number of encoder tokens of each sequence.
        backend: Kernels that attention runs on.
        device: Device of the model.
    """
    used = PrefixUse(np.zeros(len(lengths) + 1, np.int32), np.zeros(0, np.int32))
    return seq2seq_training_plan(
        np.array(lengths, np.int32),
        np.array(encoder_lengths, np.int32),
        used,
        NO_SITE_PREFIXES,
        backend=backend,
        device=device,
    )


def seq2seq_prefill_plan(
    tables: Tensor, layouts: Mapping[Site, Layout], reach: int, arena: Arena, backend: Backend
) -> Seq2SeqPlan:
    """Plan of the encoder tokens and the decoder's prompt tokens of an engine step.

    The arena row of each decoder token is written to the slot table. The rows of the encoder tokens, which
    cross-attention writes, are not in the slot table. Later decode steps see them as blocks.

    Args:
        tables: Buffer of the planner on the model's device, int32.
        layouts: Place of each table in the buffer, for each site.
        reach: Largest number of keys that one query can see.
        arena: Keys, values and slot table of the engine.
        backend: Kernels that attention runs on.
    """
    decoder = prefill_plan(tables, layouts["self"], reach, arena, backend)
    cross, encoder = layouts["cross"], layouts["enc"]
    slots = section(tables, cross.views[0]["slots"])
    return Seq2SeqPlan(
        decoder,
        Plan(
            decoder.position_ids,
            backend,
            reach,
            packed=[packed_tables(tables, view) for view in cross.views],
            view_of=cross.view_of,
            arena=arena,
            slots=slots,
            causal=False,
            square=False,
            num_keys=len(slots),
        ),
        Plan(
            section(tables, encoder.views[0]["position_ids"])[None],
            backend,
            reach,
            packed=[packed_tables(tables, view) for view in encoder.views],
            view_of=encoder.view_of,
            arena=Arena(arena.encoder_layers, arena.table),
            causal=False,
        ),
    )


def seq2seq_decode_plan(
    tables: Tensor, layouts: Mapping[Site, Layout], reach: int, max_len: int, arena: Arena, backend: Backend
) -> Seq2SeqPlan:
    """Plan of the next decoder token of every running row. The arena row of each token is written to the slot table.

    Args:
        tables: Buffer of the planner on the model's device, int32.
        layouts: Place of each table in the buffer, for the sites ``"self"`` and ``"cross"``.
        reach: Largest number of keys that one query can see.
        max_len: Length of the longest row of the step in decoder tokens.
        arena: Keys, values and slot table of the engine.
        backend: Kernels that attention runs on.
    """
    decoder = decode_plan(tables, layouts["self"], reach, max_len, arena, backend)
    cross = layouts["cross"]
    return Seq2SeqPlan(
        decoder,
        Plan(
            decoder.position_ids,
            backend,
            reach,
            decode=[decode_tables(tables, view) for view in cross.views],
            view_of=cross.view_of,
            arena=arena,
            causal=False,
            square=False,
        ),
    )
