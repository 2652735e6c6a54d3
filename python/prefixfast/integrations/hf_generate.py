"""`HFCache`, which runs transformers' unmodified ``generate`` on the packed forward, with prefixes for each row.

Each prefix lies in memory once. Hooks on the attached model turn every forward with this cache into a packed prefill or
a decode step over a KV arena, and its logits back into those that ``generate`` expects.

Shape letters: B rows of the batch (one per beam), T tokens of the padded prompt.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import Seq2SeqLMOutput

from prefixfast.attention.plan import Layout, Plan, decode_plan, host_table, prefill_plan
from prefixfast.config import EngineConfig
from prefixfast.engine.arena_sites import ROW_UNIT, prefix_run
from prefixfast.engine.kv_arena import RESERVED_ROWS, bytes_per_row
from prefixfast.engine.loop import Loop
from prefixfast.engine.request_prefixes import assign_prefixes, attended, is_weights
from prefixfast.engine.search import reorder_slot_table
from prefixfast.errors import CapacityError, ConfigError, shown
from prefixfast.integrations.hf_seq2seq import NO_TOKENS, Forwards, beam_decode, beam_prefill, check_texts, texts_of
from prefixfast.model.base import Model
from prefixfast.prefix.compatibility import check_composition, check_fits
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import StoredPrefix

RowPrefixes: TypeAlias = Prefix | Sequence[Prefix | Sequence[Prefix] | None] | None


class HFCache(Cache):
    """Cache for ``model.hf.generate(..., past_key_values=cache)`` that makes generation see the prefixes.

    Sampling, beams, logits processors and stopping criteria are those of transformers. A batch is padded on the left,
    for an encoder-decoder base on the right, and has an ``attention_mask``. A cache serves one call of ``generate``.
    Close the cache to free its memory, or use it as a context manager.

    Args:
        model: Base model from `load`.
        prefixes: One prefix for all rows, or one entry for each row of ``input_ids`` (None, a prefix, or a sequence of
            prefixes from left to right).
        num_beams: Number of rows that ``generate`` makes of each row of ``input_ids``: its ``num_beams``, or its
            ``num_return_sequences`` without beams.
        max_len: Largest number of prompt and generated tokens, prefix rows not counted; for an encoder-decoder base of
            the decoder's tokens.

    Raises:
        ConfigError: For prefixes that do not fit the batch, a batch padded on the other side, or a forward that is
            neither a whole prompt nor one more token (a used cache, ``prefill_chunk_size``); for an encoder-decoder
            base a decoder prompt of more than the start token. If the base was closed.
        BaseMismatchError: For a prefix of another base model.
        CapacityError: For a prompt or a text longer than ``max_len``, or a text of more tokens than the encoder has
            positions.

    Example:
        >>> tokens = {"input_ids": torch.tensor([[87, 72, 68]] * 2)}
        >>> tokens["attention_mask"] = torch.ones(2, 3, dtype=torch.long)
        >>> with HFCache(base, [prefix, None], max_len=32) as cache:
        ...     base.hf.generate(**tokens, past_key_values=cache, max_new_tokens=5, do_sample=False).shape
        torch.Size([2, 8])
    """

    is_compileable = False

    def __init__(self, model: Model, prefixes: RowPrefixes = None, *, num_beams: int = 1, max_len: int = 1024) -> None:
        super().__init__(layers=[])
        for name, number in (("num_beams", num_beams), ("max_len", max_len)):
            if type(number) is not int or number < 1:
                msg = f"HFCache: {name}: expected a number of at least 1, got {shown(number)}"
                raise ConfigError(msg)
        self.model, self.prefixes, self.num_beams = model, prefixes, num_beams
        self.max_len = min(max_len, model.max_positions)
        self.loop: Loop | None = None
        self.length = 0  # tokens so far
        self.rows = np.zeros(0, np.int64)  # decode row of each row of the batch
        self.order = torch.zeros(0, dtype=torch.int64)  # rows of the batch in the order of the last packed forward
        weak_self = weakref.ref(self)  # the hooks must not keep a dropped cache alive

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            cache: Any = weak_self()
            is_own = cache is not None and cache is kwargs.get("past_key_values")
            return ((), cache._pack_arguments(args, kwargs)) if is_own else None

        def after(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            cache: Any = weak_self()
            is_own = cache is not None and cache._plan is not None and kwargs.get("prefixfast") is cache._plan
            return cache._unpack_output(out) if is_own else None

        self._plan: Plan | None = None
        self._states: Tensor | None = None  # what the encoder of an encoder-decoder base returned
        self._loops: list[Loop] = []
        if model.seq2seq is None:
            pre = model.hf.register_forward_pre_hook(before, with_kwargs=True)
            undo = [pre.remove, model.hf.register_forward_hook(after, with_kwargs=True).remove]
        else:
            undo = [Forwards.open(model.hf).close]
        self._finalizer = weakref.finalize(self, _free, undo, self._loops)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens so far, prefix rows not counted.

        Args:
            layer_idx: Number of a layer; all layers have the same length.
        """
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Largest length of the cache: -1, which transformers reads as no limit.

        Args:
            layer_idx: Number of a layer; all layers give the same result.
        """
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row of the batch continue another one. Slots are permuted, and no key or value is copied.

        Args:
            beam_idx: Row that each row continues ``[B]``.
        """
        assert self.loop is not None
        rows = torch.from_numpy(self.rows).to(beam_idx.device)
        reorder_slot_table(self.loop.arena.table, rows, rows[beam_idx], self.length)

    def crop(self, max_length: int) -> None:
        """Not supported.

        Args:
            max_length: Number of tokens to keep.

        Raises:
            NotImplementedError: Always. Assisted generation calls this method.
        """
        msg = "HFCache cannot remove tokens, so assisted generation is not supported"
        raise NotImplementedError(msg)

    def close(self) -> None:
        """Free the memory, and remove the hooks. A second call does nothing."""
        self._finalizer()
        self.loop = None

    def _serves(self, hf: PreTrainedModel) -> bool:
        """Whether the cache runs the forwards of a model itself, as those of an encoder-decoder base.

        Args:
            hf: Hugging Face model.
        """
        return self.model.hf is hf and self.model.seq2seq is not None and self._finalizer.alive

    def _forward(self, kwargs: dict[str, Any]) -> Seq2SeqLMOutput:
        """Output of an encoder-decoder base with logits ``[B, 1, V]`` of the next tokens.

        Args:
            kwargs: Keyword arguments of the model's forward.
        """
        self._check_open()
        ids, outputs = kwargs.get("decoder_input_ids"), kwargs.get("encoder_outputs")
        if ids is None or outputs is None:
            msg = "HFCache: expected a forward of generate, got one without encoder_outputs and decoder_input_ids"
            raise ConfigError(msg)
        if not self.length:
            mask = kwargs.get("decoder_attention_mask")
            if ids.shape[1] != 1 or (mask is not None and not bool(mask.all())):
                msg = (
                    f"HFCache: expected the decoder to begin with its start token, got {ids.shape[1]} decoder tokens; "
                    "leave decoder_input_ids and decoder_attention_mask out"
                )
                raise ConfigError(msg)
            self._states = outputs[0]
            texts = texts_of(self._states, kwargs.get("attention_mask"), self.num_beams)
            check_texts(self.model, texts)
            self.loop = self._make_loop([1] * len(texts), [len(text) for text in texts])
            logits, self.rows = beam_prefill(self.model, self.loop, texts, ids)
            self.length = 1
        else:
            if outputs[0] is not self._states:
                msg = "HFCache: expected the texts of the first call, got others; use a new cache for each generate"
                raise ConfigError(msg)
            loop = self._check_decode(ids, None)
            logits = beam_decode(self.model, loop, ids[:, -1], self.rows)
            self.length += 1
        return Seq2SeqLMOutput(logits=logits[:, None], past_key_values=self)

    def _check_open(self) -> None:
        """Raise `ConfigError` if the base was closed, whose forward would not see the prefixes."""
        if self.model.closed:
            msg = "HFCache: this base was closed: load it again, and make a new cache"
            raise ConfigError(msg)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pack_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the packed forward in place of those of ``generate``."""
        self._check_open()
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            msg = "HFCache: expected input_ids, got inputs_embeds"
            raise ConfigError(msg)
        mask = kwargs.get("attention_mask")
        tokens, self._plan = self._decode(ids, mask) if self.length else self._prefill(ids, mask)
        keep = {} if self._plan.logits_at is None else {"logits_to_keep": self._plan.logits_at}
        packed = {
            "input_ids": tokens[None],
            "attention_mask": torch.ones_like(tokens)[None],
            "position_ids": self._plan.position_ids,
        }
        return {**packed, **keep, "use_cache": False, "return_dict": True, "prefixfast": self._plan}

    def _unpack_output(self, out: Any) -> Any:
        """Output of the packed forward with logits ``[B, 1, V]`` in the order of the batch."""
        logits = out.logits[0]
        out.logits = torch.empty_like(logits).index_copy_(0, self.order.to(logits.device), logits)[:, None]
        out.past_key_values, self._plan = self, None
        return out

    def _prefill(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Plan]:
        """Packed tokens and plan of the prompts ``[B, T]``."""
        count, padded = ids.shape
        if not padded:
            raise ConfigError(NO_TOKENS)
        seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if seen.shape != ids.shape or not bool(seen[:, -1].all()) or bool((seen[:, 1:] < seen[:, :-1]).any()):
            msg = (
                f"attention_mask: expected one of {list(ids.shape)}, padded on the left, got {list(seen.shape)}; set "
                "tokenizer.padding_side = 'left'"
            )
            raise ConfigError(msg)
        lengths = seen.sum(1).tolist()
        if padded > self.max_len:
            msg = f"HFCache: expected a prompt of at most max_len={self.max_len} tokens, got {padded}; raise max_len"
            raise CapacityError(msg)
        self.loop = loop = self._make_loop(lengths)
        buffer = torch.empty(loop.scheduler.buffer_len, dtype=torch.int32)
        header = loop.scheduler.plan_step(buffer.numpy())
        assert header.prefill is not None
        layout = Layout(*header.prefill)
        assert len(header.prefill_ids) == count
        chunk = host_table(buffer.numpy(), layout.views[0]["chunk"])
        self.order = torch.tensor(header.prefill_ids)
        self.rows = np.zeros(count, np.int64)
        self.rows[header.prefill_ids] = chunk[:, 0]
        plan = prefill_plan(buffer.to(self.model.device), layout, header.prefill_reach, loop.arena, self.model.backend)
        loop.scheduler.commit([])
        self.length = padded
        return torch.cat([ids[row][seen[row]] for row in header.prefill_ids]), plan

    def _decode(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Plan]:
        """Tokens and plan of one more token per row ``[B, 1]``."""
        loop = self._check_decode(ids, mask)
        buffer = torch.empty(loop.scheduler.buffer_len, dtype=torch.int32)
        header = loop.scheduler.plan_step(buffer.numpy())
        assert header.decode is not None
        layout = Layout(*header.decode)
        self.order = torch.tensor(header.decode_ids)
        longest = int(host_table(buffer.numpy(), layout.views[0]["lens"]).max())
        plan = decode_plan(
            buffer.to(self.model.device), layout, header.decode_reach, longest, loop.arena, self.model.backend
        )
        loop.scheduler.commit([])
        self.length += 1
        return ids[self.order.to(ids.device), -1], plan

    def _check_decode(self, ids: Tensor, mask: Tensor | None) -> Loop:
        """Loop of the cache, if ``ids`` ``[B, 1]`` are one more token per row.

        Raises:
            ConfigError: For other numbers of tokens or rows.
            CapacityError: For more than ``max_len`` tokens.
        """
        loop = self.loop
        assert loop is not None
        if ids.shape[1] != 1 or (mask is not None and mask.shape[1] != self.length + 1):
            mask_len = None if mask is None else mask.shape[1]
            msg = (
                f"HFCache: expected one token after the {self.length} in the cache, got {ids.shape[1]} and an "
                f"attention_mask of {mask_len}; use a new cache for each generate, without prefill_chunk_size"
            )
            raise ConfigError(msg)
        if self.length + 1 > self.max_len or ids.shape[0] != len(self.rows):
            msg = (
                f"HFCache: expected at most max_len={self.max_len} tokens for {len(self.rows)} rows, got "
                f"{self.length + 1} for {ids.shape[0]}; raise max_len"
            )
            raise CapacityError(msg)
        return loop

    def _make_loop(self, lengths: list[int], encoder_lengths: list[int] | None = None) -> Loop:
        """Loop with the prefixes in its KV arena and one request for each row of the batch, or for each text.

        Args:
            lengths: Number of prompt tokens of each request.
            encoder_lengths: Number of tokens of each source of an encoder-decoder base, whose beams are one request.
        """
        beams = 1 if encoder_lengths is None else self.num_beams
        count = len(lengths) * beams
        assigned = self._row_prefixes(count)[::beams]
        distinct = {p.digest: p for own in assigned for p in own}.values()
        runs = [prefix_run(p, self.model.sites).rows for p in distinct] + (encoder_lengths or [])
        units = sum(-(-n // ROW_UNIT) for n in runs) + count * -(-(self.max_len + ROW_UNIT) // ROW_UNIT)
        tokens = sum(lengths) + count
        config = EngineConfig(
            max_num_seqs=count,
            # All texts are prefilled in one step, of which decode rows could take three quarters.
            max_num_batched_tokens=tokens if encoder_lengths is None else 4 * (tokens + sum(encoder_lengths)),
            kv_cache_memory=bytes_per_row(self.model) * (RESERVED_ROWS + ROW_UNIT * units),
            enforce_eager=True,
        )
        loop = Loop(self.model, config, self.max_len, [])
        self._loops.append(loop)
        cache = loop.prefix_cache
        for prefix in distinct:
            cache.set_pinned(prefix, True)
        while cache.loader.num_loading:
            for failed in cache.finish_loads(wait=True):
                assert failed.error is not None
                raise failed.error
        each = zip(lengths, encoder_lengths or [0] * len(lengths), assigned, strict=True)
        for number, (length, encoder_len, own) in enumerate(each):
            numbers, new = [cache.number_of(p) for p in own], self.max_len - length + 1
            loop.scheduler.add(number, numbers, length, beams, new, encoder_len=encoder_len)
        return loop

    def _row_prefixes(self, count: int) -> list[tuple[Prefix | StoredPrefix, ...]]:
        """Prefixes of each row of the batch. The beams of a request share its prefixes."""
        each = list(self.prefixes) if isinstance(self.prefixes, Sequence) else None
        requests = count if each is None else len(each)
        if each is not None and requests * self.num_beams != count:
            msg = (
                f"prefixes: expected one for all, or {count} rows / num_beams {self.num_beams} entries, got "
                f"{requests}; set num_beams to that of generate"
            )
            raise ConfigError(msg)
        if is_weights(self.prefixes):
            msg = "prefixes: expected prefixes, got TunedWeights, which this cache cannot use; give them to generate"
            raise ConfigError(msg)
        found = assign_prefixes([[]] * requests, self.prefixes if each is None else each, None)
        assigned = [attended(own) for own in found]
        for prefix in {id(p): p for own in assigned for p in own}.values():
            check_fits(self.model, prefix)
        for own in assigned:
            check_composition(self.model, [p.position for p in own])
        return [own for own in assigned for _ in range(count // requests)]


def _free(undo: Sequence[Callable[[], None]], loops: list[Loop]) -> None:
    """Remove the hooks and close the loops, also of a cache that is dropped without `HFCache.close`."""
    for remove in undo:
        remove()
    while loops:
        loops.pop().close()
