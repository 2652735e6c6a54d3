"""The trained embeddings of virtual tokens, and the keys and values that the base model computes for them.

Once a step the base model computes the keys and values of all embeddings, with gradients. The packed forward passes of
the step read them as those of prefixes, so that their number does not change the cost of the embeddings.

Shape letters: n prefixes, P virtual tokens of a prefix, d hidden size, H key-value heads, D head dimension.

Source:
    Lester et al. 2021 (arXiv:2104.08691); the embedding-only ablation of Li & Liang 2021, section 7.2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from prefixfast.attention.plan import AttentionCall, LayerKV, plain_plan
from prefixfast.model.base import Model
from prefixfast.model.packed_forward import check_attached, model_inputs
from prefixfast.model.prefix_shape import by_source, own_layers
from prefixfast.model.text_kv import parameter_dtype
from prefixfast.training.parameters import split_rows


class EmbeddingParameters:
    """The trained embeddings of n prefixes of equal length.

    Args:
        model: Base model.
        tables: Initial embeddings ``[P, d]`` of each prefix.

    Attributes:
        layers: Layers in which the prefixes lie, ascending.
        length: Number of virtual tokens P of a prefix.
        leaves: Keys and values ``[n * P, H, D]`` by layer of the base model that the forward pass reads.
        params: Embeddings ``[n * P, d]``, a list of one tensor.
    """

    def __init__(self, model: Model, tables: Sequence[Tensor]) -> None:
        self.model, self.layers, self.length = model, own_layers(model.layers), len(tables[0])
        table = torch.cat([t.detach().to(model.device, parameter_dtype(model.dtype)) for t in tables])
        self.params = [table.requires_grad_()]
        self.leaves: list[LayerKV] = []
        self._plan = plain_plan([self.length] * len(tables), backend=model.backend, device=model.device)
        self._computed: list[Tensor] = []

    @property
    def num_trained(self) -> int:
        """Number of parameters that training adjusts for one prefix."""
        return self.length * self.params[0].shape[1]

    def refresh(self, steps: np.ndarray, *, dropout: bool = True) -> None:
        """Compute the leaves of the next forward pass, and discard gradients of an unfinished step.

        Args:
            steps: Number of the step of each prefix, which changes nothing.
            dropout: Whether dropout is applied, of which embeddings have none.
        """
        self.params[0].grad = None
        self._computed = self._compute()
        leaves = [t.detach().requires_grad_() for t in self._computed]
        by_layer = dict(zip(self.layers, zip(leaves[::2], leaves[1::2], strict=True), strict=True))
        first = by_layer[self.layers[0]]  # stands in for layers that read the keys of another layer
        self.leaves = by_source(self.model.layers, [by_layer.get(i, first) for i in range(len(self.model.layers))])

    def backward(self) -> None:
        """Carry the gradients of the leaves to the embeddings, once a step after the last micro-batch."""
        leaves = (t for i in self.layers for t in self.leaves[i])
        pairs = [(out, leaf.grad) for out, leaf in zip(self._computed, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
        self._computed = []

    @torch.no_grad()
    def current(self) -> list[Tensor]:
        """Current keys and values of all prefixes.

        Returns:
            Tensors ``[n * P, H, D]`` of ``layers``, in the order k0, v0, k1, ...
        """
        return self._compute()

    def split(self, flat: Sequence[Tensor], number: int) -> dict[str, Tensor]:
        """Keys and values of one prefix by name, on the CPU; they can be views of ``flat``.

        Args:
            flat: Tensors as `current` gives them.
            number: Number of the prefix.
        """
        return split_rows(self.layers, flat, self.length, number)

    def _compute(self) -> list[Tensor]:
        """Keys and values of the embeddings, from a forward pass that ends at the attention of the last own layer."""
        found: dict[int, LayerKV] = {}

        def probe(call: AttentionCall) -> None:
            if len(found) == len(self.layers):
                return  # gradient checkpointing computes a layer again
            if call.layer in self.layers:
                found[call.layer] = call.k, call.v
            if len(found) == len(self.layers):
                raise _StopForwardError

        model, table = self.model, self.params[0]
        check_attached(model.hf)
        with model.guard.running(), contextlib.suppress(_StopForwardError):
            model.hf.base_model(**model_inputs(replace(self._plan, probe=probe), table.to(model.dtype)))
        return [t.to(table.dtype) for i in self.layers for t in found[i]]


class _StopForwardError(Exception):
    """Ends a forward pass whose further layers are not needed."""
