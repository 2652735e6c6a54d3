"""Logits of one text after any composition of prefixes, in one packed forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from prefixfast.attention.plan import PrefixUse, training_plan
from prefixfast.model.base import Model
from prefixfast.prefix.kv import concat_kv, row_table
from prefixfast.prefix.prefix import Prefix


@torch.no_grad()
def logits(base: Model, ids: Sequence[int], prefixes: Sequence[Prefix] = ()) -> torch.Tensor:
    """Logits ``[N, V]`` of tokens ``ids`` after ``prefixes``, composed left to right."""
    leaves, rows = concat_kv(prefixes, base.layers, base.dtype, base.device), row_table(prefixes, base)
    used = np.arange(len(prefixes), dtype=np.int32)
    plan = training_plan(
        np.array([len(ids)], np.int32),
        PrefixUse(np.array([0, len(prefixes)], np.int32), used),
        rows,
        leaves,
        backend=base.backend,
    )
    return base.forward(plan, torch.tensor(list(ids)))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference, divided by the largest absolute value of ``b``."""
    return ((a - b).abs().max() / b.abs().max()).item()
