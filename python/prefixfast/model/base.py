"""`Model`: an attached Hugging Face model and its tokenizer, as one object that training and generation share."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention import ops
from prefixfast.attention.plan import Plan
from prefixfast.errors import ConfigError
from prefixfast.model.attach import Handle, LayerShape, packed_forward
from prefixfast.model.fingerprint import fingerprint
from prefixfast.model.lm_head import Head, packed_hidden
from prefixfast.model.prepack import Packed, prepack
from prefixfast.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(eq=False)
class Model:
    """An attached base, made by `load`.

    Attributes:
        hf: The Hugging Face model, frozen.
        backend: Which kernels attention runs on.
        handle: The attachment.
        tokenizer: None if the base came as an object without one.
        head: Its output layer, None if it is no plain one.
        closed: Whether it was given back.
        packed: Weights laid out for this CPU; see `prepack`.
    """

    hf: PreTrainedModel
    backend: ops.Backend
    handle: Handle
    tokenizer: Tokenizer | None
    head: Head | None
    closed: bool = False
    packed: Packed | None = None

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.hf.dtype

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """Heads of every attention layer."""
        return self.handle.layers

    @property
    def max_positions(self) -> int:
        """Positions that the base was built for."""
        return int(self.hf.config.get_text_config().max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return int(self.hf.get_input_embeddings().weight.shape[0])

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """See `prefixfast.model.fingerprint`."""
        return fingerprint(self.hf, None if self.tokenizer is None else self.tokenizer.digest_text)

    def forward(self, plan: Plan, ids: Tensor) -> Tensor:
        """One packed forward.

        Args:
            plan: Which tokens belong together, and what they see.
            ids: Tokens int64 ``[N]``.

        Returns:
            Logits ``[n, V]`` in the compute dtype, at ``plan.logits_at``, or of all ``N``.
        """
        return packed_forward(self.hf, plan, ids)

    def losses(self, plan: Plan, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of targets, in nats, from one packed forward.

        Args:
            plan: As in `forward`, with ``logits_at`` ``[n]``.
            ids: Tokens int64 ``[N]``.
            targets: Int64 ``[n]``.

        Returns:
            Losses ``[n]`` in fp32 (fp64 for a base in fp64).
        """
        if self.head is not None:
            return self.head.losses(packed_hidden(self.hf, plan, ids), targets, self.backend.name)
        logits = self.forward(plan, ids)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")

    def prepack(self) -> Packed:
        """Lay the weights out for this CPU, once; they stay so until `close`. Returns what was done, or why not (`Packed`)."""
        if self.packed is None:
            self.packed = prepack(self.hf)
        return self.packed

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ConfigError: If there is none.
        """
        if self.tokenizer is None:
            msg = "this base has no tokenizer: give token ids, or load(model, tokenizer=...)"
            raise ConfigError(msg)
        return self.tokenizer

    def check_prefix(self, prefix: Any, what: str = "the prefix") -> None:
        """Call `prefixfast.check_fits`, which has replaced this method of version 0.1.0.

        Args:
            prefix: Prefix, or its entry in a store.
            what: Name of the prefix in the error's message.

        Raises:
            BaseMismatchError: If the prefix does not fit this base.
        """
        from prefixfast import check_fits

        warnings.warn(
            "Model.check_prefix was renamed: use prefixfast.check_fits(model, prefix)", FutureWarning, stacklevel=2
        )
        check_fits(self, prefix, what)

    def opened(self) -> Model:
        """This model.

        Raises:
            ConfigError: If it was closed.
        """
        if self.closed:
            msg = "this base was closed: load it again"
            raise ConfigError(msg)
        return self

    def close(self) -> None:
        """Give the Hugging Face model back as it was; a second call does nothing."""
        if not self.closed:
            self.closed = True
            if self.packed is not None:
                self.packed.undo()
                self.packed = None
            self.handle.detach()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
