"""Output layer of an encoder-decoder model, with the factor on its input and the bias of its logits."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from prefixfast.errors import ConfigError
from prefixfast.model.dry_run import FAILURES
from prefixfast.model.lm_head import Head, is_plain, logits_bias
from prefixfast.model.packed_forward import two_rows
from prefixfast.model.seq2seq.dry_run import probe_plan, probe_tokens
from prefixfast.model.seq2seq.positions import packed_positions
from prefixfast.model.seq2seq.stacks import encoder_states, seq2seq_hidden


@torch.no_grad()
def find_seq2seq_head(model: PreTrainedModel) -> Head:
    """Output layer of an attached encoder-decoder model, which gives the model's own logits.

    T5 scales the hidden states. Which of the two factors a model has is found out by its logits.

    Raises:
        ConfigError: If the model's logits are not those of one linear layer.
    """
    layer, reason = model.get_output_embeddings(), "it has no output layer"
    if is_plain(layer):
        plan, (ids, encoder_ids) = probe_plan(model), probe_tokens(model)
        limit = 1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2
        try:
            states = encoder_states(model, plan, encoder_ids)
            with packed_positions(two_rows(plan.position_ids, 1)):
                expected: Tensor = model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=states),
                    decoder_input_ids=ids[None],
                    use_cache=False,
                    prefixfast=plan,
                ).logits[0]
            hidden = seq2seq_hidden(model, plan, ids, encoder_ids)
            for scale in (1.0, model.config.d_model**-0.5):
                head = Head(layer, 0.0, scale, logits_bias(model))
                if ((head.logits(hidden) - expected).abs().max() / expected.abs().max()).item() < limit:
                    return head
        except FAILURES as e:
            reason = f"its logits cannot be computed: {e}"
        else:
            reason = "its logits are not those of its output layer"
    elif layer is not None:
        reason = f"its output layer is {type(layer).__name__}, or has hooks"
    msg = f"cannot attach {type(model).__name__} ({model.config.model_type}): {reason}"
    raise ConfigError(msg)
