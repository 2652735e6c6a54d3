"""Packed forwards of an attached encoder-decoder model, stack by stack.

The stacks are called themselves: the whole model would run the encoder in every decode step.
Shape letters: M encoder tokens, N decoder tokens, d hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention.seq2seq_plan import Seq2SeqPlan
from prefixfast.model.packed_forward import check_attached, two_rows
from prefixfast.model.seq2seq.cross_cache import CrossCache
from prefixfast.model.seq2seq.positions import packed_positions

# Tokens of an encoder's forward on a CPU. Their feed-forward states stay in the caches, and their memory is reused.
PART_TOKENS = 1024


def seq2seq_hidden(model: PreTrainedModel, plan: Seq2SeqPlan, ids: Tensor, encoder_ids: Tensor | None) -> Tensor:
    """Last hidden states of the decoder in one packed forward pass of an attached model.

    Args:
        model: Attached encoder-decoder model.
        plan: Attention plans of the tokens.
        ids: Token ids of the decoder, int64 ``[N]``.
        encoder_ids: Token ids of the encoder, int64 ``[M]``. None in a decode step.

    Returns:
        Hidden states ``[n, d]`` at the tokens ``plan.logits_at``, or ``[N, d]`` of all tokens if that is None.

    Raises:
        ConfigError: If the model is detached or in training mode.
    """
    check_attached(model)
    assert (encoder_ids is None) == (plan.encoder is None), "the encoder runs in every forward but decode steps"
    cache = None
    if encoder_ids is None:
        assert plan.cross.arena is not None
        row = plan.cross.arena.layers[0][0][:1].transpose(0, 1)[None]
        states = row.new_zeros(1, 1, model.config.d_model)
        cache = CrossCache(len(plan.cross.arena.layers), row)
    else:
        states = encoder_states(model, plan, encoder_ids)
    with packed_positions(two_rows(plan.position_ids, 1)):
        hidden: Tensor = model.get_decoder()(
            input_ids=two_rows(ids[None], 1),
            encoder_hidden_states=states,
            past_key_values=cache,
            use_cache=False,
            return_dict=True,
            prefixfast=plan,
        ).last_hidden_state[0]
    return hidden[: len(ids)] if plan.logits_at is None else hidden[plan.logits_at]


def encoder_states(model: PreTrainedModel, plan: Seq2SeqPlan, encoder_ids: Tensor) -> Tensor:
    """States of the encoder ``[1, M, d]``; a single token's are there twice on a CPU without gradients.

    Args:
        model: Attached encoder-decoder model.
        plan: Attention plans of the tokens.
        encoder_ids: Token ids, int64 ``[M]``.
    """
    assert plan.encoder is not None
    if plan.encoder.arena is not None and plan.backend.name == "torch" and model.device.type == "cpu":
        parts = plan.encoder_parts(PART_TOKENS)
        if len(parts) > 1:
            found = [_states(model, own, encoder_ids[tokens])[:, : tokens.stop - tokens.start] for tokens, own in parts]
            return torch.cat(found, 1)
    return _states(model, plan, encoder_ids)


def _states(model: PreTrainedModel, plan: Seq2SeqPlan, encoder_ids: Tensor) -> Tensor:
    """States of the encoder in one forward."""
    assert plan.encoder is not None
    with packed_positions(two_rows(plan.encoder.position_ids, 1)):
        states: Tensor = model.get_encoder()(
            input_ids=two_rows(encoder_ids[None], 1), return_dict=True, prefixfast=plan
        ).last_hidden_state
    return states
