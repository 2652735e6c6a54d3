"""Attach an unmodified transformers model to prefixfast's packed attention, and restore it on detach.

Attaching freezes the model, switches every sub-model to the attention implementation ``"prefixfast"`` and replaces
NewGELU, which is eight operations, by one operator. A dry run proves that every layer reaches prefixfast's attention
function. This module has no code for single architectures.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from prefixfast.attention import ops
from prefixfast.attention.hf_interface import NAME
from prefixfast.attention.plan import AttentionCall, Plan, plain_plan
from prefixfast.errors import ConfigError

logger = logging.getLogger(__name__)

# Architectures whose parity with PEFT is tested in tests/parity. Others are attached if their logits stay the same.
VERIFIED = frozenset(
    {"gpt2", "llama", "qwen2", "qwen3", "mistral", "opt", "gpt_neox", "gemma", "gemma2", "gemma3_text"}
)
OWN_ATTENTION = "it computes attention in its own code, outside transformers' attention interface"
# Reasons by model type.
REFUSED = {
    **dict.fromkeys(("gptj", "gpt_neo", "codegen", "falcon", "xglm"), OWN_ATTENTION),
    **dict.fromkeys(("bloom", "mpt"), OWN_ATTENTION + " and needs ALiBi biases"),
}


@dataclass(frozen=True)
class LayerShape:
    """Head counts of one attention layer.

    Attributes:
        num_heads: Number of query heads HQ.
        num_kv_heads: Number of key-value heads H.
        head_dim: Head dim D.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass
class Handle:
    """Attachment of a model. Every `attach` needs a `detach`; the last one restores the model.

    The handle is an attribute of the model, so a model without other references is freed together with its handle.

    Attributes:
        model: Attached model.
        layers: Head counts of every attention layer, in the order of the layers.
        undo: Functions that restore the model, to be called from last to first.
        users: Number of `attach` calls without their `detach`.
    """

    model: PreTrainedModel
    layers: tuple[LayerShape, ...]
    undo: list[Callable[[], None]]
    users: int = 1

    def detach(self) -> None:
        """Detach once; the last user restores attention, activations, training flags and ``requires_grad``."""
        with _LOCK:
            self.users -= 1
            if self.users == 0:
                _run(self.undo)
                self.model.__dict__.pop(KEY, None)


KEY = "_prefixfast_handle"
_LOCK = threading.RLock()


def attach(model: PreTrainedModel) -> Handle:
    """Attach a decoder-only model.

    Args:
        model: Causal language model that calls transformers' attention interface.

    Returns:
        Handle of the attachment. A model that is attached already returns the same handle.

    Raises:
        ConfigError: If the model is unsupported. The model is then as it was before.
    """
    with _LOCK:
        found = model.__dict__.get(KEY)
        if isinstance(found, Handle) and found.model is model:
            found.users += 1
            return found
        check_supported(model)
        verified = model.config.model_type in VERIFIED
        undo = _freeze(model)
        try:
            before = None if verified else _logits(model)
            undo += _switch(model) + _replace_gelu(model)
            layers, after = _dry_run(model)
            if before is not None:
                _compare(model, before, after)
        except BaseException:
            _run(undo)
            raise
        model.__dict__[KEY] = handle = Handle(model, layers, undo)
        return handle


def check_supported(model: PreTrainedModel) -> None:
    """Raise `ConfigError` if the configuration of a model is known to be unsupported."""
    config = model.config
    kind = config.model_type
    reason = None
    if config.is_encoder_decoder:
        reason = "encoder-decoder models are not supported yet"
    elif kind in REFUSED:
        reason = REFUSED[kind]
    elif getattr(config, "reorder_and_upcast_attn", False):
        reason = (
            "config.reorder_and_upcast_attn works with eager attention only; set it to False if the model was not "
            "trained with it in half precision"
        )
    elif getattr(config.get_text_config(), "attention_chunk_size", None):
        reason = "config.attention_chunk_size: prefixfast does not compute chunked attention"
    elif getattr(config, "add_cross_attention", False):
        reason = "config.add_cross_attention needs an encoder's states, which a prefix-tuned decoder does not have"
    elif dynamic := {t for t in _rope_types(config) if t in ("dynamic", "longrope")}:
        reason = (
            f"RoPE type {dynamic.pop()!r} changes with the batch's length, so packed requests would change each "
            "other; use 'default', 'linear' or 'yarn'"
        )
    if reason:
        msg = f"cannot attach {type(model).__name__} ({kind}): {reason}"
        raise ConfigError(msg)


def packed_forward(model: PreTrainedModel, plan: Plan, ids: Tensor) -> Tensor:
    """Logits of one packed forward pass of an attached model.

    Args:
        model: Attached model.
        plan: Attention plan of the tokens.
        ids: Token ids, int64 ``[N]``.

    Returns:
        Logits ``[n, V]`` at the tokens ``plan.logits_at``, or ``[N, V]`` of all tokens if that is None.

    Raises:
        ConfigError: If the model is detached or in training mode.
    """
    check_attached(model)
    tokens = ids[None]
    keep = {} if plan.logits_at is None else {"logits_to_keep": plan.logits_at}
    # Without a mask, GPT-2 searches the batch for padding, which is a host synchronization. The mask is not used.
    out = model(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        position_ids=plan.position_ids,
        use_cache=False,
        prefixfast=plan,
        **keep,
    )
    return out.logits[0]


def check_attached(model: PreTrainedModel) -> None:
    """Raise `ConfigError` if a model is detached or in training mode.

    The attention of a detached model would ignore the plan without an error.
    """
    if model.config._attn_implementation != NAME or model.training:
        state = (
            "in training mode, call eval()"
            if model.training
            else "detached, or its attention was switched; load it again"
        )
        msg = f"this {type(model).__name__} cannot run a packed forward: it is {state}"
        raise ConfigError(msg)


def _run(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _rope_types(config: Any) -> set[str]:
    """RoPE types of a config; Gemma 3 nests one dictionary per kind of layer."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)] or [rope]
    return {str(r.get("rope_type", r.get("type", "default"))) for r in nested}


def _freeze(model: PreTrainedModel) -> list[Callable[[], None]]:
    """Switch to evaluation mode without gradients; returns functions that restore the model."""
    training = [m for m in model.modules() if m.training]
    grads = [p for p in model.parameters() if p.requires_grad]

    def restore() -> None:
        for module in training:
            module.training = True
        for parameter in grads:
            parameter.requires_grad_(True)

    model.eval()
    model.requires_grad_(False)
    return [restore]


def _switch(model: PreTrainedModel) -> list[Callable[[], None]]:
    """Set the attention implementation on every sub-model.

    Setting it on the top model alone does not reach sub-models with their own config in all versions of transformers.
    """
    undo: list[Callable[[], None]] = []
    seen: set[int] = set()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if isinstance(module, PreTrainedModel) and id(config) not in seen:
            seen.add(id(config))
            old = config._attn_implementation

            def restore(config: Any = config, old: Any = old) -> None:
                config._attn_implementation_internal = old

            undo.append(restore)
            config._attn_implementation_internal = NAME
    return undo


def _replace_gelu(model: PreTrainedModel) -> list[Callable[[], None]]:
    """Replace NewGELU modules by torch's tanh GELU; returns functions that restore them."""
    undo: list[Callable[[], None]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is NewGELUActivation:
                setattr(parent, name, torch.nn.GELU(approximate="tanh"))

                def restore(parent: Any = parent, name: str = name, child: Any = child) -> None:
                    setattr(parent, name, child)

                undo.append(restore)
    return undo


def _probe_ids(model: PreTrainedModel) -> Tensor:
    return torch.arange(1, 9, device=model.device) % model.config.get_text_config().vocab_size


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=_probe_ids(model)[None], use_cache=False).logits[0]


@torch.no_grad()
def _dry_run(model: PreTrainedModel) -> tuple[tuple[LayerShape, ...], Tensor]:
    """Head counts of all layers as the attention function gets them, and the logits of a short text."""
    ids = _probe_ids(model)
    seen: list[tuple[int, int, int, int]] = []

    def probe(call: AttentionCall) -> None:
        seen.append((call.layer, call.q.shape[1], call.k.shape[1], call.q.shape[2]))

    plan = replace(plain_plan([len(ids)], backend=ops.Backend("reference"), device=model.device), probe=probe)
    try:
        logits = packed_forward(model, plan, ids)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as e:
        msg = f"cannot attach {type(model).__name__} ({model.config.model_type}): a packed forward fails: {e}"
        raise ConfigError(msg) from e
    expected = model.config.get_text_config().num_hidden_layers
    reached = sorted(layer for layer, *_ in seen)
    if reached != list(range(expected)):
        msg = (
            f"cannot attach {type(model).__name__}: expected each of its {expected} layers to call prefixfast's "
            f"attention once, got calls from the layers {reached}"
        )
        raise ConfigError(msg)
    return tuple(LayerShape(*shape) for _, *shape in sorted(seen)), logits


def _compare(model: PreTrainedModel, before: Tensor, after: Tensor) -> None:
    """Raise `ConfigError` if logits before and after attaching differ by more than rounding."""
    error = (before.float() - after.float()).abs().max().item() / before.float().abs().max().item()
    limit = 1e-3 if model.dtype in (torch.float32, torch.float64) else 3e-2
    if not error < limit:
        name = f"{type(model).__name__} ({model.config.model_type})"
        msg = f"cannot attach {name}: its logits change by {error:.1e} (limit {limit:.0e}) under prefixfast's attention"
        raise ConfigError(msg)
    logger.info(
        "%s is not in the tested set; its logits are unchanged under prefixfast's attention (relative error %.1e)",
        model.config.model_type,
        error,
    )
