"""BART and its relatives: tables of positions, which packed sequences read at positions of their own.

The table is learned or sinusoidal. Its own forward counts the tokens of the packed sequence and fails beyond its last
row; that of M2M100 grows the table for good. The forward is therefore replaced, not hooked. A padding token has no
position in M2M100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.model.seq2seq.family import Family, Undo
from prefixfast.model.seq2seq.positions import current_positions
from prefixfast.model.seq2seq.site_modules import SiteModule


def _hook(model: PreTrainedModel, _: Sequence[SiteModule], undo: Undo) -> Callable[[], None]:
    for stack in (model.get_encoder(), model.get_decoder()):
        undo.append(_replace_forward(stack.embed_positions))
    return lambda: None


def _replace_forward(embedding: Any) -> Callable[[], None]:
    """Let an embedding read the positions of packed forwards; returns the function that restores it."""
    own = embedding.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        positions = current_positions()
        if positions is None:
            return own(*args, **kwargs)
        table, offset = _table(embedding)
        rows = positions + offset
        if _is_m2m100(embedding):
            ids, padding = args[0], embedding.padding_idx
            rows = rows.masked_fill(ids == padding, padding)
        return F.embedding(rows, table)

    embedding.__dict__["forward"] = forward

    def restore() -> None:
        del embedding.__dict__["forward"]

    return restore


def _table(embedding: Any) -> tuple[Tensor, int]:
    """Rows of an embedding of positions, and the row of position 0."""
    if _is_m2m100(embedding):
        return embedding.weights, embedding.padding_idx + 1
    return embedding.weight, getattr(embedding, "offset", 0)


def _is_m2m100(embedding: Any) -> bool:
    return hasattr(embedding, "make_weights")


def _num_positions(stack: Any) -> int:
    table, offset = _table(stack.embed_positions)
    return min(len(table) - offset, int(stack.config.max_position_embeddings))


BART = Family(_hook, _num_positions)
WRAPPING_BART = Family(_hook, _num_positions, wraps=True)
M2M100 = Family(_hook, _num_positions, skips_pads=True)
