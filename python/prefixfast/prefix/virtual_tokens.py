"""A prefix from the virtual tokens of a PEFT adapter: their keys and values in the base model.

PEFT puts the embeddings of a PROMPT_TUNING or P_TUNING adapter before those of the text. In a causal model nothing
behind a virtual token changes its keys and values, so that they are those of one forward of the embeddings alone.

Source:
    PEFT 0.21.2, ``forward`` of ``PeftModelForCausalLM`` in ``peft_model.py``.
    tests/unit/prefix/test_virtual_tokens.py checks that logits are equal.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention.plan import PrefixUse, plain_plan, training_plan
from prefixfast.config.json_types import JSON
from prefixfast.errors import BaseMismatchError, ConfigError, shown
from prefixfast.model.base import Model
from prefixfast.model.dry_run import FAILURES
from prefixfast.model.prefix_shape import own_layers
from prefixfast.model.proof.relative_error import relative_error
from prefixfast.model.shared_base import borrowed
from prefixfast.model.text_kv import tokens_kv
from prefixfast.prefix.kv import concat_kv, row_table
from prefixfast.prefix.names import PrefixFields
from prefixfast.prefix.peft_read import VirtualTokens
from prefixfast.prefix.record import PrefixData

TEXT = 8  # tokens after the virtual ones whose logits are compared
LIMIT, HALF_LIMIT = 1e-3, 5e-2  # relative errors of logits that are rounding


def virtual_tokens_prefix(
    model: str | Path | PreTrainedModel | Model, tokens: VirtualTokens
) -> tuple[dict[str, Tensor], PrefixFields]:
    """Tensors and fields of the prefix that is equivalent to an adapter's virtual tokens.

    Args:
        model: Base model of the adapter, as `load` takes it.
        tokens: Virtual tokens.

    Raises:
        BaseMismatchError: If the adapter was made for a base model of other sizes.
        ConfigError: If the base model has too few positions, or results of the prefix would not be those of PEFT.
    """
    with borrowed(model) as base:
        _check_sizes(base, tokens)
        training: dict[str, JSON] = {
            "imported_from": "peft",
            "peft_type": tokens.peft_type,
            "num_trained": tokens.table.numel(),
        }
        fields: PrefixFields = {"pos_start": len(tokens.table), "base": base.fingerprint, "training": training}
        tensors, reason = embedded_tensors(base, tokens.table.to(base.device, base.dtype), fields)
        if reason is not None:
            raise ConfigError(_not_exact(base, tokens, reason))
        return tensors, fields


def embedded_tensors(base: Model, table: Tensor, fields: PrefixFields) -> tuple[dict[str, Tensor], str | None]:
    """Tensors of the prefix of embeddings, and the reason why its results would not be theirs, None if they are.

    Args:
        base: Base model.
        table: Embeddings ``[P, E]`` in the base model's dtype.
        fields: Fields of the prefix.
    """
    tensors: dict[str, Tensor] = {}
    try:
        kv, own = tokens_kv(base, table), own_layers(base.layers)
        tensors = {f"self.{i}.{x}": t.cpu().contiguous() for i in own for x, t in zip("kv", kv[i], strict=True)}
        error = _difference(base, table, PrefixData(tensors, **fields))
    except FAILURES as e:
        return tensors, f"its forward of embeddings fails: {type(e).__name__}: {e}"
    if not error < (HALF_LIMIT if base.dtype.itemsize == 2 else LIMIT):
        return tensors, f"its results from token ids are not those from their embeddings (relative error {error:.0e})"
    return tensors, None


def _check_sizes(base: Model, tokens: VirtualTokens) -> None:
    """Raise an error if virtual tokens do not fit a base model."""
    if base.seq2seq is not None:
        msg = (
            f"{tokens.path}: the {tokens.peft_type} adapter is one of a decoder-only base, this base has an encoder; "
            "give the base that it was trained on"
        )
        raise BaseMismatchError(msg)
    embedding = base.hf.get_input_embeddings()
    length, dim = tokens.table.shape
    sizes = {
        "embeddings of {} numbers": (dim, int(getattr(embedding, "embedding_dim", embedding.weight.shape[1]))),
        "a base of {} layers": (tokens.num_layers, int(base.hf.config.get_text_config().num_hidden_layers)),
    }
    for what, (theirs, ours) in sizes.items():
        if theirs not in (None, ours):
            named = f" (it names {shown(tokens.base_name)})" if tokens.base_name else ""
            msg = (
                f"{tokens.path}: the {tokens.peft_type} adapter was made for {what.format(theirs)}, this base has "
                f"{ours}; give the base that it was trained on{named}"
            )
            raise BaseMismatchError(msg)
    if length >= base.max_positions:
        msg = (
            f"{tokens.path}: {length} virtual tokens leave no room in the base's {base.max_positions} positions; give "
            "an adapter with fewer virtual tokens"
        )
        raise ConfigError(msg)


@torch.no_grad()
def _difference(base: Model, table: Tensor, prefix: PrefixData) -> float:
    """Relative error of a text's logits after the prefix, against those after the embeddings ``[P, E]``.

    It is large for a base model that needs the ids of tokens besides their embeddings.
    """
    ids = _text(base, min(TEXT, base.max_positions - len(table)))
    use = PrefixUse(np.array([0, 1], np.int32), np.array([0], np.int32))
    rows, kv = row_table([prefix], base), concat_kv([prefix], base.layers, base.dtype, base.device)
    after = training_plan(np.array([len(ids)], np.int32), use, rows, kv, backend=base.backend, device=base.device)
    together = plain_plan([len(table) + len(ids)], backend=base.backend, device=base.device)
    with base.guard.running():
        words = base.hf.get_input_embeddings()(ids[None])[0].to(table.dtype)
        expected = base.forward(together, torch.cat([table, words]))[len(table) :]
        return relative_error(base.forward(after, ids), expected)


def _not_exact(base: Model, tokens: VirtualTokens, reason: str) -> str:
    """Message of an adapter that has no equivalent prefix."""
    return (
        f"{tokens.path}: a prefix would not give PEFT's results of this {tokens.peft_type} adapter with a "
        f"{type(base.hf).__name__}: {reason}; run it with PEFT, or train a prefix"
    )


def _text(base: Model, length: int) -> Tensor:
    """Random token ids ``[length]`` without the padding token, which some models hide."""
    ids = torch.randint(base.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    padding = getattr(base.hf.config.get_text_config(), "pad_token_id", None)
    ids[ids == (-1 if padding is None else padding)] = 1 if padding == 0 else 0
    return ids.to(base.device)
