"""Attach an unmodified transformers model to prefixfast's packed attention, and restore it on detach.

Attaching freezes the model, switches every sub-model to the attention implementation ``"prefixfast"`` and replaces
NewGELU, which is eight operations, by one operator. A dry run shows that every layer reaches prefixfast's attention
function, and a proof compares the results with those of the model's own forward. This module has no code for single
architectures. The encoder-decoder ones that need code have it in `prefixfast.model.seq2seq.families`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, SupportsIndex

import torch
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation

from prefixfast.config.sites import BySite, Site
from prefixfast.errors import ConfigError
from prefixfast.model.attention_switch import configs_of, own_implementation, private_configs, switch
from prefixfast.model.dry_run import FAILURES, LayerShape, dry_run
from prefixfast.model.guard import BaseGuard
from prefixfast.model.own_attention import foreign_attention
from prefixfast.model.process import note_computing
from prefixfast.model.proof.infix import InfixSupport
from prefixfast.model.proof.prove import prove
from prefixfast.model.proof.seq2seq import prove_seq2seq
from prefixfast.model.row_independence import dependent_rows, recorded_rows
from prefixfast.model.seq2seq.dry_run import seq2seq_dry_run
from prefixfast.model.seq2seq.families import FAMILIES
from prefixfast.model.seq2seq.site_modules import set_tags, site_modules
from prefixfast.model.seq2seq.supported import check_seq2seq_supported
from prefixfast.model.supported_models import check_supported
from prefixfast.model.weights import unusable_weights


@dataclass
class Handle:
    """Attachment of a model. Every `attach` needs a `detach`; the last one restores the model.

    The handle is an attribute of the model, so a model without other references is freed together with its handle.

    Attributes:
        model: Attached model.
        sites: Head counts of every attention layer by site, in the order of the layers.
        infix: Place of prefixes before the last prompt token, or the reason why the model takes none.
        undo: Functions that restore the model, to be called from last to first.
        users: Number of `attach` calls without their `detach`.
        blocks: Transformer blocks, once they were checked.
        guard: Guard that keeps changes of the model and runs of other threads apart.
        refresh: Function that reads again what was made of the weights.
    """

    model: PreTrainedModel
    sites: Mapping[Site, tuple[LayerShape, ...]]
    infix: InfixSupport
    undo: list[Callable[[], None]]
    users: int = 1
    blocks: list[torch.nn.Module] | None = None
    guard: BaseGuard = field(default_factory=BaseGuard)
    refresh: Callable[[], None] = lambda: None

    def detach(self) -> None:
        """Detach once; the last user restores attention, activations, training flags and ``requires_grad``."""
        with _LOCK:
            self.users -= 1
            if self.users == 0:
                _run(self.undo)
                self.model.__dict__.pop(KEY, None)


KEY = "_prefixfast_handle"
NO_INFIX = "its prompt is the source, which the encoder reads, so that no prompt token stands right before the answer"
_LOCK = threading.RLock()


def _after_fork() -> None:
    global _LOCK
    _LOCK = threading.RLock()  # another thread of the parent can hold the old one


os.register_at_fork(after_in_child=_after_fork)


def attach(model: PreTrainedModel) -> Handle:
    """Attach a model.

    Args:
        model: Causal language model, or encoder-decoder model with a language head, that calls transformers' attention
            interface.

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
        (check_seq2seq_supported if model.config.is_encoder_decoder else check_supported)(model)
        note_computing()
        if (reason := unusable_weights(model) or foreign_attention(model)) is not None:
            msg = f"cannot attach {type(model).__name__} ({model.config.model_type}): {reason}"
            raise ConfigError(msg)
        own = [own_implementation(config) for config in configs_of(model)]
        undo = _freeze(model)
        try:
            undo += [switch(model)]
            with private_configs(model):
                undo += _replace_gelu(model)
                if model.config.is_encoder_decoder:
                    handle = _seq2seq_handle(model, undo)
                else:
                    handle = _decoder_handle(model, own, undo)
            undo += _refuse_copies(model)
        except BaseException:
            _run(undo)
            raise
        model.__dict__[KEY] = handle
        return handle


def _decoder_handle(model: PreTrainedModel, own: Sequence[str | None], undo: list[Callable[[], None]]) -> Handle:
    """Handle of a decoder-only model, after its proof.

    Args:
        model: Switched model.
        own: Attention implementation of each config before the switch.
        undo: Functions that restore the model.
    """
    with _independent_rows(model):
        layers, windows = dry_run(model)
    return Handle(model, BySite({"self": layers}), prove(model, layers, windows, own), undo)


def _seq2seq_handle(model: PreTrainedModel, undo: list[Callable[[], None]]) -> Handle:
    """Handle of an encoder-decoder model, after its proof.

    Args:
        model: Switched model.
        undo: Functions that restore the model.
    """
    modules, kind = site_modules(model), model.config.model_type
    undo.append(set_tags(modules))
    try:
        refresh = FAMILIES[kind].hook(model, modules, undo)
    except FAILURES as e:
        reason = f"its positions are not those of the type {kind}: {type(e).__name__}: {e}"
        msg = f"cannot attach {type(model).__name__} ({kind}): {reason}"
        raise ConfigError(msg) from e
    with _independent_rows(model):
        sites = seq2seq_dry_run(model, modules)
    prove_seq2seq(model, sites)
    return Handle(model, sites, InfixSupport(refusal=NO_INFIX), undo, refresh=refresh)


@contextlib.contextmanager
def _independent_rows(model: PreTrainedModel) -> Iterator[None]:
    """Context manager of a forward, after which a model whose layers mix the rows of a batch is refused."""
    with recorded_rows(model) as rows:
        yield
    if (reason := dependent_rows(rows)) is not None:
        msg = f"cannot attach {type(model).__name__} ({model.config.model_type}): {reason}"
        raise ConfigError(msg)


def _run(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


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


def _refuse_copies(model: PreTrainedModel) -> list[Callable[[], None]]:
    """Refuse deep copies and pickles, whose forward would need a handle; returns functions that allow them again."""
    name = type(model).__name__

    def refuse(protocol: SupportsIndex) -> NoReturn:
        msg = f"{name}: expected a model that is not attached to copy or pickle; do it before load, or close the base"
        raise ConfigError(msg)

    attributes, method = vars(model), "__reduce_ex__"  # which both read from the object
    attributes[method] = refuse
    return [lambda: attributes.pop(method, None)]


def _replace_gelu(model: PreTrainedModel) -> list[Callable[[], None]]:
    """Replace NewGELU modules by torch's tanh GELU; returns functions that restore them."""
    undo: list[Callable[[], None]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is NewGELUActivation:
                setattr(parent, name, torch.nn.GELU(approximate="tanh").eval())

                def restore(parent: Any = parent, name: str = name, child: Any = child) -> None:
                    setattr(parent, name, child)

                undo.append(restore)
    return undo
