"""`Model`, an attached Hugging Face model with its tokenizer, which training and generation share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention import ops
from prefixfast.attention.plan import Plan
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan
from prefixfast.config.engine import BaseMismatch
from prefixfast.config.sites import Site
from prefixfast.errors import ConfigError, warn_renamed
from prefixfast.model.attach import Handle
from prefixfast.model.cpu_forwards import CpuForwards
from prefixfast.model.dry_run import LayerShape
from prefixfast.model.fingerprint import Fingerprint, fingerprint
from prefixfast.model.guard import BaseGuard
from prefixfast.model.kv_layout import kv_layout
from prefixfast.model.lm_head import Head, find_head, packed_hidden
from prefixfast.model.packed_forward import check_eval, packed_forward
from prefixfast.model.prefix_shape import PrefixShape
from prefixfast.model.prepack import Packed, prepack
from prefixfast.model.seq2seq.facts import seq2seq_facts
from prefixfast.model.seq2seq.families import FAMILIES
from prefixfast.model.seq2seq.head import find_seq2seq_head
from prefixfast.model.seq2seq.stacks import seq2seq_hidden
from prefixfast.model.seq2seq.tokens import Seq2Seq
from prefixfast.model.tokenizer import Tokenizer
from prefixfast.model.weights import recorded_state

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(eq=False, repr=False)
class Model:
    """Attached base model, made by `load`.

    Attributes:
        hf: Hugging Face model, frozen.
        backend: Attention kernels and their tile sizes.
        handle: Attachment of the Hugging Face model to prefixfast's attention.
        tokenizer: Tokenizer, None if the base model was given as an object and no tokenizer was found.
        head: Output layer, None if the logits are not those of one linear layer.
        closed: Whether `close` was called.
        packed: Result of `prepack`, None before the first call.
        quantization: Quantization of the weights, also of those that were dequantized when they were loaded. None if
            they are not known to be quantized.
        allow_base_mismatch: ``"quantized"`` if prefixes are accepted whose base model has the same weights before
            quantization, None if no mismatch is accepted.
        seq2seq: Tokens and positions of an encoder-decoder base, None for a decoder-only one.
        whole_fingerprint: Fingerprint from before the weights were divided over processes, None for a whole model.
    """

    hf: PreTrainedModel
    backend: ops.Backend
    handle: Handle
    tokenizer: Tokenizer | None
    head: Head | None
    closed: bool = False
    packed: Packed | None = None
    quantization: str | None = None
    allow_base_mismatch: BaseMismatch | None = None
    seq2seq: Seq2Seq | None = None
    whole_fingerprint: Fingerprint | None = None
    _cpu_forwards: CpuForwards | None = None
    _fingerprint: tuple[object, Fingerprint] | None = None

    def __repr__(self) -> str:
        """One line: class and name of the base model, dtype, device, number of layers, backend."""
        dtype = str(self.dtype).removeprefix("torch.")
        about = f"dtype={dtype}, device={str(self.device)!r}, layers={len(self.layers)}, backend={self.backend.name!r}"
        name = str(getattr(self.hf, "name_or_path", "") or "")
        return f"Model({type(self.hf).__name__}, name={name!r}, {about})"

    @property
    def device(self) -> torch.device:
        """Device of the base model."""
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self.hf.dtype

    @property
    def sites(self) -> Mapping[Site, tuple[LayerShape, ...]]:
        """Head counts of every attention layer by site; a decoder-only base has the site ``self`` alone."""
        return self.handle.sites

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """Head counts of every attention layer; of the decoder's self-attention in an encoder-decoder base."""
        return self.sites["self"]

    @property
    def guard(self) -> BaseGuard:
        """Guard of the base model, which keeps trained weights of one thread out of the runs of the others."""
        return self.handle.guard

    @property
    def max_positions(self) -> int:
        """Number of positions of the base model, of the decoder in an encoder-decoder base."""
        if self.seq2seq is not None:
            return FAMILIES[self.hf.config.model_type].positions(self.hf.get_decoder())
        return int(self.hf.config.get_text_config().max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Number of rows of the input embedding, of the encoder's in an encoder-decoder base."""
        return int(self.hf.get_input_embeddings().weight.shape[0])

    @property
    def fingerprint(self) -> Fingerprint:
        """Architecture and digests of tokenizer, weights and acting adapters, by which a prefix recognizes its base.

        Raises:
            ConfigError: If trained weights act in the base model in this thread.
        """
        with self.guard.running():
            self.guard.check_unchanged()
            if self.whole_fingerprint is not None:
                return self.whole_fingerprint
            state, kept = recorded_state(self.hf), self._fingerprint
            if kept is None or kept[0] != state:
                found = fingerprint(self.hf, None if self.tokenizer is None else self.tokenizer.digest_text)
                layout = None if self.seq2seq is not None else kv_layout(self.hf, self.layers)
                self._fingerprint = kept = state, found if layout is None else {**found, "kv_layout": layout}
            return kept[1]

    def forward(self, plan: Plan | Seq2SeqPlan, ids: Tensor, encoder_ids: Tensor | None = None) -> Tensor:
        """One packed forward pass.

        Args:
            plan: Attention plan: sequences of the tokens, and the prefixes that each sequence sees.
            ids: Token ids, int64 ``[N]``, of the decoder in an encoder-decoder base. A decoder-only base also takes
                embeddings of the tokens, ``[N, E]``.
            encoder_ids: Token ids of the encoder, int64 ``[M]``. None for a decoder-only base, and in a decode step,
                where the encoder does not run.

        Returns:
            Logits ``[n, V]`` at the tokens ``plan.logits_at``, or ``[N, V]`` of all tokens, in the compute dtype.

        Raises:
            ConfigError: If the Hugging Face model is detached or in training mode.
        """
        if isinstance(plan, Seq2SeqPlan):
            assert self.head is not None
            return self.head.logits(self.hidden(plan, ids, encoder_ids))
        return packed_forward(self.hf, plan, ids)

    def hidden(self, plan: Plan | Seq2SeqPlan, ids: Tensor, encoder_ids: Tensor | None = None) -> Tensor:
        """Last hidden states of one packed forward pass.

        Args:
            plan: Attention plan.
            ids: Token ids, as `forward` takes them.
            encoder_ids: Token ids of the encoder, as `forward` takes them.

        Returns:
            Hidden states ``[n, d]`` at the tokens ``plan.logits_at``, or ``[N, d]`` of all tokens, in the compute
            dtype.

        Raises:
            ConfigError: If the Hugging Face model is detached or in training mode.
        """
        if isinstance(plan, Seq2SeqPlan):
            return seq2seq_hidden(self.hf, plan, ids, encoder_ids)
        return packed_hidden(self.hf, plan, ids)

    def losses(
        self, plan: Plan | Seq2SeqPlan, ids: Tensor, targets: Tensor, encoder_ids: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy of target tokens, in nats, from one packed forward pass.

        Args:
            plan: Attention plan with ``logits_at`` ``[n]``, the tokens that predict the targets.
            ids: Token ids, int64 ``[N]``.
            targets: Ids of the target tokens, int64 ``[n]``.
            encoder_ids: Token ids of the encoder, as `forward` takes them.

        Returns:
            Losses ``[n]`` in fp32 (fp64 for a base model in fp64).

        Raises:
            ConfigError: If the Hugging Face model is detached or in training mode.
        """
        if self.head is not None:
            return self.head.losses(self.hidden(plan, ids, encoder_ids), targets, self.backend.name)
        logits = self.forward(plan, ids, encoder_ids)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")

    def prepack(self) -> Packed:
        """Copy the weights into the layout of this CPU's matrix products; the copies stay until `close`.

        Returns:
            Size of the copies, or the reason why there are none. Further calls return the same object.
        """
        if self.packed is None:
            self.packed = prepack(self.hf)
            if self.packed.why_not is None:
                self._make_cpu_forwards()
        return self.packed

    def _make_cpu_forwards(self) -> CpuForwards:
        if self._cpu_forwards is None:
            self._cpu_forwards = CpuForwards(self.hf)
        return self._cpu_forwards

    @contextlib.contextmanager
    def training_layers(self) -> Iterator[None]:
        """Context manager in which layers without products run in Rust on CPUs, differentiable in their inputs."""
        if self.device.type != "cpu":
            yield
            return
        forwards = self._make_cpu_forwards()
        forwards.begin(training=True)
        try:
            yield
        finally:
            forwards.end(training=True)

    def _follow_changes(self) -> None:
        """Forget what a change of the model since the last call has made wrong: weights, output layer, tokens."""
        self._fingerprint = None
        if self.seq2seq is not None:
            self.seq2seq = seq2seq_facts(self.hf)
        self.handle.refresh()
        if self.head is not None and not self.head.is_of(self.hf):
            self.head = (find_head if self.seq2seq is None else find_seq2seq_head)(self.hf)

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Context manager in which requests run. Weights that were changed before it are used as they are now.

        It waits while trained weights of another thread act in the base model, and these wait for its end.

        Raises:
            ConfigError: If a module is in training mode, for example a LoRA layer that was added after `load`.
        """
        with self.guard.running():
            check_eval(self.hf)
            self._follow_changes()
            used = [x for x in (self.packed, self._cpu_forwards) if x is not None]
            with contextlib.ExitStack() as stack:
                for each in used:
                    each.begin()
                    stack.callback(each.end)
                yield

    def require_tokenizer(self) -> Tokenizer:
        """Tokenizer of the base model.

        Raises:
            ConfigError: If there is none.
        """
        if self.tokenizer is None:
            msg = "this base has no tokenizer: give token ids, or load(model, tokenizer=...)"
            raise ConfigError(msg)
        return self.tokenizer

    def need_tokenizer(self) -> Tokenizer:
        """Tokenizer of the base model; a name of version 0.1.0 for `require_tokenizer`."""
        warn_renamed("Model.need_tokenizer", "Model.require_tokenizer")
        return self.require_tokenizer()

    def check_prefix(self, prefix: PrefixShape, what: str = "the prefix") -> None:
        """Check that a prefix fits this base model; a name of version 0.1.0 for `prefixfast.check_fits`.

        Args:
            prefix: Prefix, or its entry in a store.
            what: Name of the prefix in the error's message.

        Raises:
            BaseMismatchError: If the prefix does not fit this base model.
        """
        from prefixfast import check_fits

        warn_renamed("Model.check_prefix", "prefixfast.check_fits(model, prefix)")
        check_fits(self, prefix, what)

    def opened(self) -> Model:
        """This model, if it was not closed.

        Raises:
            ConfigError: If this model was closed.
        """
        if self.closed:
            msg = "this base was closed: load it again"
            raise ConfigError(msg)
        with self.guard.running():
            self._follow_changes()
        return self

    def close(self) -> None:
        """Restore the Hugging Face model; a second call does nothing."""
        if not self.closed:
            self.closed = True
            if self.packed is not None:
                self.packed.undo()
                self.packed = None
            if self._cpu_forwards is not None:
                self._cpu_forwards.undo()
                self._cpu_forwards = None
            self.handle.detach()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def display_name(model: Model) -> str:
    """Name of a base model, or its class if it has no name."""
    return str(getattr(model.hf, "name_or_path", "") or type(model.hf).__name__)


def compute_line(model: Model) -> str:
    """Compute dtype and device, as logs show them: ``computing in bfloat16 on cpu``."""
    return f"computing in {str(model.dtype).removeprefix('torch.')} on {model.device}"


def describe_weights(model: Model) -> str:
    """Quantization of a base model's weights, and whether prefixes of the base before quantization are accepted."""
    accepted = "; prefixes of the base before quantization are accepted" if model.allow_base_mismatch else ""
    return ("not quantized" if model.quantization is None else f"quantized: {model.quantization}") + accepted
