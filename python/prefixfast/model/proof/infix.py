"""`InfixSupport`, how a model takes prefixes before the last prompt token, shown by a text whose middle is one.

The rows of an infix are the keys and values of the middle tokens of a text. The first tokens are the source, which does
not see the rows in the text either. The other tokens must have the logits that they have in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prefixfast.attention.plan import (
    FIXED_INFIX,
    INFIX,
    LayerKV,
    PlannedPrefix,
    PrefixUse,
    prefix_rows,
    training_plan,
)
from prefixfast.model.dry_run import FAILURES
from prefixfast.model.packed_forward import packed_forward
from prefixfast.model.proof.cases import make_cases
from prefixfast.model.proof.packed import PackedModel
from prefixfast.model.proof.relative_error import relative_error

FAR, FAR_LIMIT = 2**16, 5e-2  # largest position that is tried, and the relative error that is rounding there
FEWEST = 3  # tokens of a text with a source, an infix and a rest


@dataclass(frozen=True)
class InfixSupport:
    """Treatment of prefixes before the last prompt token by a model.

    Attributes:
        place: Place of such a prefix in a plan. `FIXED_INFIX` for scores that depend on distances alone (RoPE): the
            stored keys keep the positions 0 to P - 1, and the source ends at position -1. `INFIX` for learned
            positions: the source starts at position 0.
        refusal: Reason why the model takes none, None if it takes them.
    """

    place: int = INFIX
    refusal: str | None = None

    @property
    def has_fixed_positions(self) -> bool:
        """Whether the stored keys of such a prefix have the positions 0 to P - 1."""
        return self.place == FIXED_INFIX


def infix_support(packed: PackedModel, windows: Sequence[int], limit: float) -> InfixSupport:
    """Treatment of prefixes before the last prompt token by a model.

    Args:
        packed: Attached model.
        windows: Sliding window of each layer in tokens, 0 for none.
        limit: Largest relative error that is rounding.
    """
    if any(windows):
        return InfixSupport(refusal="its layers have sliding windows, whose distances are not shown to be right")
    try:
        return _shown_support(packed, limit)
    except FAILURES as e:
        return InfixSupport(refusal=f"a forward with one fails: {type(e).__name__}: {e}")


def _shown_support(packed: PackedModel, limit: float) -> InfixSupport:
    config = packed.model.config.get_text_config()
    positions = int(config.max_position_embeddings)
    ids = make_cases(packed.model, ()).plain[0].ids[: positions - 1]
    count = len(ids)
    if count < FEWEST:
        return InfixSupport(refusal=f"it has {positions} positions only")
    source = count // 3
    both, text_kv = packed.texts([ids, ids], [0, 1])
    expected, shifted = both.split(count)
    place = INFIX
    if relative_error(shifted, expected) < limit:
        # Negative positions are tried only here, since a table of learned positions has none.
        both, text_kv = packed.texts([ids, ids], [-source, min(positions, FAR) - count])
        near, far = (relative_error(logits, expected) for logits in both.split(count))
        if not (near < limit and far < FAR_LIMIT):
            return InfixSupport(
                refusal=f"its scores depend on more than distances (relative error {max(near, far):.0e})"
            )
        place = FIXED_INFIX
    elif getattr(config, "rope_parameters", None):
        return InfixSupport(refusal="its scores depend on more than the distances of RoPE")
    rest = slice(2 * source, None)
    got = _with_infix(packed, torch.cat([ids[:source], ids[rest]]), source, place, text_kv)
    error = relative_error(got, torch.cat([expected[:source], expected[rest]]))
    return InfixSupport(place, None if error < limit else f"its logits with one are wrong (relative error {error:.0e})")


@torch.no_grad()
def _with_infix(packed: PackedModel, ids: Tensor, source: int, place: int, text_kv: Sequence[LayerKV]) -> Tensor:
    """Logits ``[N, V]`` of tokens, of which the first ``source`` stand before an infix of as many rows of a text."""
    layers = range(len(packed.shapes))
    rows = prefix_rows([PlannedPrefix(layers, source, source, True, place)], len(layers))
    plan = training_plan(
        np.array([len(ids)], np.int32),
        PrefixUse(np.array([0, 1], np.int32), np.zeros(1, np.int32)),
        rows,
        [(k[source : 2 * source], v[source : 2 * source]) for k, v in text_kv],
        backend=packed.backend,
        device=packed.model.device,
        last_prompt_token=np.array([source], np.int32),
    )
    return packed_forward(packed.model, plan, ids)
