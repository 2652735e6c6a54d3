"""Packed forwards of the proof, through the plan of training.

Shape letters: N packed tokens, H kv heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention.ops import Backend
from prefixfast.attention.plan import Arena, LayerKV, PlannedPrefix, PrefixUse, plain_plan, prefix_rows, training_plan
from prefixfast.model.dry_run import LayerShape
from prefixfast.model.packed_forward import packed_forward
from prefixfast.model.proof.cases import Cases


@dataclass(frozen=True)
class PackedModel:
    """Attached model with its layers.

    Attributes:
        model: Attached model.
        shapes: Heads of every layer.
        backend: Kernels that attention runs on.
        dtype: Dtype of keys and values.
    """

    model: PreTrainedModel
    shapes: Sequence[LayerShape]
    backend: Backend
    dtype: torch.dtype

    def arena(self, rows: int, table: Tensor) -> Arena:
        """Arena of zeros. A layer that reads the keys of another layer has the tensors of that layer.

        Args:
            rows: Number of rows.
            table: Slot table.
        """

        def zeros(s: LayerShape) -> Tensor:
            dim = max(s.head_dim, s.value_dim)
            return torch.zeros(rows, s.num_kv_heads, dim, dtype=self.dtype, device=self.model.device)

        own = [(zeros(s), zeros(s)) if s.source is None else None for s in self.shapes]
        layers = [own[i if s.source is None else s.source] for i, s in enumerate(self.shapes)]
        return Arena([kv for kv in layers if kv is not None], table)

    @torch.no_grad()
    def texts(self, texts: Sequence[Tensor], starts: Sequence[int] | None = None) -> tuple[Tensor, list[LayerKV]]:
        """Logits ``[N, V]`` of packed sequences without prefixes, and the keys and values ``[N, H, D]`` by layer.

        Args:
            texts: Token ids of each sequence.
            starts: Position of the first token of each sequence, None for 0.
        """
        lengths = [len(ids) for ids in texts]
        plan = plain_plan(lengths, backend=self.backend, device=self.model.device)
        if starts is not None:
            shift = torch.tensor(starts).repeat_interleave(torch.tensor(lengths))
            plan = replace(plan, position_ids=plan.position_ids + shift.to(plan.position_ids))
        arena = self.arena(sum(lengths), torch.empty(0, dtype=torch.int32))
        slots = torch.arange(sum(lengths), dtype=torch.int32, device=self.model.device)
        logits = packed_forward(self.model, replace(plan, arena=arena, slots=slots), torch.cat(list(texts)))
        layers = [
            (k[..., : s.head_dim], v[..., : s.value_dim]) for (k, v), s in zip(arena.layers, self.shapes, strict=True)
        ]
        return logits, layers

    @torch.no_grad()
    def training(self, cases: Cases, kv: Sequence[Sequence[LayerKV]]) -> Tensor:
        """Logits ``[N, V]`` of all sequences but the first in one packed forward, by the plan of training.

        Args:
            cases: Sequences. The first one has no prefix and is in `texts`.
            kv: Keys and values ``[P, H, D]`` by layer of each prefix.
        """
        layers = tuple(range(len(self.shapes)))
        rows = prefix_rows([PlannedPrefix(layers, p.rows, p.pos_start, True) for p in cases.prefixes], len(layers))
        prefix = [tuple(torch.cat([own[i][side] for own in kv]) for side in (0, 1)) for i in layers]
        used = [[] if c.prefix is None else [c.prefix] for c in cases.all[1:]]
        use = PrefixUse(
            np.cumsum([0, *map(len, used)], dtype=np.int32), np.array([n for own in used for n in own], np.int32)
        )
        lengths = np.array([len(c.ids) for c in cases.all[1:]], np.int32)
        pairs = [(k, v) for k, v in prefix]
        plan = training_plan(lengths, use, rows, pairs, backend=self.backend, device=self.model.device)
        return packed_forward(self.model, plan, torch.cat([c.ids for c in cases.all[1:]]))
