"""Linear output layer of a base model, which gives losses of target tokens without storing all logits.

Shape letters: N packed tokens, n target tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixfast.attention import ops
from prefixfast.attention.plan import Plan, plain_plan
from prefixfast.model.packed_forward import check_attached, model_inputs, packed_forward, two_rows
from prefixfast.model.trained_head import trained_losses

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """Linear output layer.

    Attributes:
        layer: Module of the layer.
        softcap: Soft cap of the logits, 0 for none.
        scale: Factor on the hidden states.
        bias: Bias of the logits ``[V]`` beside that of the layer, or None.
    """

    layer: nn.Linear
    softcap: float
    scale: float = 1.0
    bias: Tensor | None = None

    def is_of(self, model: PreTrainedModel) -> bool:
        """Whether this is still the output layer of a model, as `find_head` found it."""
        own = logits_bias(model)
        is_same = own is self.bias or (own is not None and self.bias is not None and own.is_set_to(self.bias))
        return is_same and model.get_output_embeddings() is self.layer and is_plain(self.layer)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[n, V]`` of hidden states ``[n, d]``."""
        out = self.layer(two_rows(self._scaled(hidden), 0))[: len(hidden)]
        # The bias of most models is 0, and to add it takes 4 % of the layer's time on a CPU. On a GPU the check would
        # be a host wait.
        if self.bias is not None and (self.bias.device.type != "cpu" or self.bias.any()):
            # in place without gradients, since another tensor [n, V] costs as much as the sum
            out = out.add_(self.bias) if out.is_inference() else out + self.bias
        return self.softcap * torch.tanh(out / self.softcap) if self.softcap else out

    def losses(self, hidden: Tensor, targets: Tensor, backend: str) -> Tensor:
        """Negative log-likelihood of target tokens, in nats; differentiable in ``hidden``.

        A layer whose weight requires a gradient gets one.

        Args:
            hidden: Hidden states ``[n, d]``.
            targets: Ids of the target tokens, int64 ``[n]``.
            backend: Name of the backend.

        Returns:
            Losses ``[n]`` in fp32 (fp64 for hidden states in fp64).
        """
        hidden, biases = self._scaled(hidden), [b for b in (self.layer.bias, self.bias) if b is not None]
        bias = biases[0] + biases[1] if len(biases) > 1 else next(iter(biases), None)
        if self.layer.weight.requires_grad and torch.is_grad_enabled():
            return trained_losses(hidden, self.layer.weight, bias, targets, self.softcap)
        return ops.cross_entropy(hidden, self.layer.weight, bias, targets, self.softcap, backend)

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.scale == 1.0 else hidden * self.scale


def packed_hidden(model: PreTrainedModel, plan: Plan, ids: Tensor) -> Tensor:
    """Last hidden states of one packed forward pass of an attached model.

    Args:
        model: Attached model.
        plan: Attention plan of the tokens.
        ids: Token ids, int64 ``[N]``.

    Returns:
        Hidden states ``[n, d]`` at the tokens ``plan.logits_at``, or ``[N, d]`` of all tokens if that is None.

    Raises:
        ConfigError: If the model is detached or in training mode.
    """
    check_attached(model)
    hidden: Tensor = model.base_model(**model_inputs(plan, ids)).last_hidden_state[0]
    return hidden[: len(ids)] if plan.logits_at is None else hidden[plan.logits_at]


def is_plain(layer: nn.Module | None) -> bool:
    """Whether a layer is a linear layer without hooks whose weight is a plain tensor."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight.data) is Tensor
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def logits_bias(model: PreTrainedModel) -> Tensor | None:
    """Bias ``[V]`` that an encoder-decoder model adds to its logits, None for none."""
    bias = getattr(model, "final_logits_bias", None)
    return bias[0] if isinstance(bias, Tensor) else None


@torch.no_grad()
def find_head(model: PreTrainedModel) -> Head | None:
    """Output layer of an attached model, None if the model's logits are not those of one linear layer.

    The reason for None is logged.
    """
    layer = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None) or 0.0
    ids = torch.arange(1, 9, device=model.device) % model.config.get_text_config().vocab_size
    plan = plain_plan([len(ids)], backend=ops.Backend("reference"), device=model.device)
    reason = f"its output layer is {type(layer).__name__}"
    if is_plain(layer):
        try:
            head = Head(layer, float(cap))
            expected, got = packed_forward(model, plan, ids), head.logits(packed_hidden(model, plan, ids))
            error = ((got - expected).abs().max() / expected.abs().max()).item()
        except (RuntimeError, TypeError, ValueError, AttributeError) as e:
            reason = f"its hidden states cannot be computed: {e}"
        else:
            if error < (1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2):
                return head
            reason = f"its logits are not those of its output layer (relative difference {error:.0e})"
    logger.info("%s: losses are computed from all logits at once: %s", type(model).__name__, reason)
    return None
