"""`HFCache`: transformers' own, unmodified ``generate`` on the packed forward, each row with prefixes of its own that lie in memory once.

Hooks on the attached model turn every forward that carries this cache into a packed prefill or a decode step of the arena, and its logits back.

Shape letters: B rows of the batch (with beams one a beam), T tokens of the padded prompt, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from prefixfast.attention.plan import Layout, Plan, decode_plan, host_table, prefill_plan
from prefixfast.config import EngineConfig
from prefixfast.engine.kv_arena import RESERVED_ROWS, bytes_of_row
from prefixfast.engine.loop import Loop
from prefixfast.engine.request import assign
from prefixfast.errors import CapacityError, ConfigError
from prefixfast.model.base import Model
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.prefix import Prefix

UNIT = 16  # arena rows are handed out by so many
Prefixes = Prefix | Sequence[Prefix | Sequence[Prefix] | None] | None


class HFCache(Cache):
    """Give it to ``model.hf.generate(..., past_key_values=cache)``: all of transformers' ways to generate then see the prefixes.

    Sampling, beams, processors and stopping criteria are transformers'; a batch is padded on the left and has its ``attention_mask``. For one call of
    ``generate``; close it (it is a context manager) to free its memory.

    Args:
        model: The base, loaded with `load`.
        prefixes: One for all rows, or one entry for each row of ``input_ids`` (None, a prefix, or several that compose from left to right).
        num_beams: Rows that ``generate`` makes of each one: its beams, or its ``num_return_sequences`` without beams.
        max_len: Longest prompt and generation, prefixes not counted.

    Raises:
        ConfigError: For prefixes that do not fit the batch, a batch padded on the right, or a forward that is neither a whole prompt nor one more token
            (a used cache, ``prefill_chunk_size``).
        BaseMismatchError: For a prefix of another base.

    Example:
        >>> tokens = {"input_ids": torch.tensor([[87, 72, 68]] * 2), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
        >>> with HFCache(base, [prefix, None], max_len=32) as cache:
        ...     base.hf.generate(**tokens, past_key_values=cache, max_new_tokens=5, do_sample=False).shape
        torch.Size([2, 8])
    """

    is_compileable = False

    def __init__(self, model: Model, prefixes: Prefixes = None, *, num_beams: int = 1, max_len: int = 1024) -> None:
        super().__init__(layers=[])
        self.model, self.prefixes, self.num_beams, self.max_len = (
            model,
            prefixes,
            num_beams,
            min(max_len, model.max_positions),
        )
        self.loop: Loop | None = None
        self.length, self.rows = 0, np.zeros(0, np.int64)  # tokens so far, and the decode row of each row of the batch
        self.order = torch.zeros(0, dtype=torch.int64)  # rows of the batch in the order of the last forward
        me = weakref.ref(self)

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            own: Any = me()
            mine = own is not None and own is kwargs.get("past_key_values")
            return ((), own._packed(args, kwargs)) if mine else None

        def after(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            own: Any = me()
            return (
                own._unpacked(out)
                if own is not None and own._plan is not None and kwargs.get("prefixfast") is own._plan
                else None
            )

        self._plan: Plan | None = None
        hooks = (
            model.hf.register_forward_pre_hook(before, with_kwargs=True),
            model.hf.register_forward_hook(after, with_kwargs=True),
        )
        self._loops: list[Loop] = []
        self._detach = weakref.finalize(self, _free, hooks, self._loops)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, prefixes not counted."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No limit (-1) for any ``layer_idx``, as transformers says it for a cache that grows.

        Returns:
            -1.
        """
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows continue others: rows of the slot table are permuted, no key or value moves."""
        assert self.loop is not None
        rows = torch.from_numpy(self.rows).to(beam_idx.device)
        table = self.loop.arena.table
        table[rows, : self.length] = table[rows[beam_idx], : self.length]

    def crop(self, max_length: int) -> None:
        """Not possible here.

        Raises:
            NotImplementedError: Always; what assisted generation needs.
        """
        msg = "HFCache cannot take tokens back: assisted generation is not supported"
        raise NotImplementedError(msg)

    def close(self) -> None:
        """Free the memory and take the hooks off."""
        self._detach()
        self.loop = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _packed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the packed forward in place of those of ``generate``."""
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            msg = "HFCache needs input_ids, got inputs_embeds"
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

    def _unpacked(self, out: Any) -> Any:
        logits = out.logits[0]
        out.logits = torch.empty_like(logits).index_copy_(0, self.order.to(logits.device), logits)[:, None]
        out.past_key_values, self._plan = self, None
        return out

    def _prefill(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Plan]:
        count, padded = ids.shape
        seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if seen.shape != ids.shape or not bool(seen[:, -1].all()) or bool((seen[:, 1:] < seen[:, :-1]).any()):
            msg = f"attention_mask: expected one of {list(ids.shape)}, padded on the left, got {list(seen.shape)}; tokenizer.padding_side = 'left'"
            raise ConfigError(msg)
        lengths = seen.sum(1).tolist()
        if padded > self.max_len:
            msg = f"the prompt has {padded} tokens and max_len is {self.max_len}"
            raise CapacityError(msg)
        self.loop = loop = self._make(lengths)
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
        self.own = np.array(lengths)
        return torch.cat([ids[row][seen[row]] for row in header.prefill_ids]), plan

    def _decode(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Plan]:
        loop = self.loop
        assert loop is not None
        if ids.shape[1] != 1 or (mask is not None and mask.shape[1] != self.length + 1):
            msg = (
                f"HFCache holds {self.length} tokens and takes one more at a time, got {ids.shape[1]} (mask of {None if mask is None else mask.shape[1]}): "
                "use a new cache for each generate, without prefill_chunk_size"
            )
            raise ConfigError(msg)
        if self.length + 1 > self.max_len or ids.shape[0] != len(self.rows):
            msg = f"HFCache: {self.length} of {self.max_len} tokens are there for {len(self.rows)} rows, got one more for {ids.shape[0]}; raise max_len"
            raise CapacityError(msg)
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

    def _make(self, lengths: list[int]) -> Loop:
        """An arena with the prefixes in it and one request for each row of the batch."""
        count = len(lengths)
        chosen = self._chosen(count)
        distinct = {p.digest: p for ps in chosen for p in ps}.values()
        need = [sum(-(-p.length // UNIT) for p in distinct), *(-(-(self.max_len + UNIT) // UNIT) for _ in lengths)]
        memory = bytes_of_row(self.model) * (RESERVED_ROWS + UNIT * sum(need))
        config = EngineConfig(
            max_num_seqs=count, max_num_batched_tokens=sum(lengths) + count, kv_cache_memory=memory, enforce_eager=True
        )
        loop = Loop(self.model, config, self.max_len, [])
        self._loops.append(loop)
        for prefix in distinct:
            loop.residency.keep(prefix, True)
        while loop.residency.loader.under_way:
            for failed in loop.residency.arrived(wait=True):
                assert failed.error is not None
                raise failed.error
        for row, (length, ps) in enumerate(zip(lengths, chosen, strict=True)):
            loop.scheduler.add(row, [loop.residency.number(p) for p in ps], length, 1, self.max_len - length + 1)
        return loop

    def _chosen(self, count: int) -> list[tuple[Prefix, ...]]:
        """Prefixes of every row; with beams each request's are those of its beams."""
        given = list(self.prefixes) if isinstance(self.prefixes, Sequence) else self.prefixes
        requests = len(given) if isinstance(given, list) else count
        if isinstance(given, list) and requests * self.num_beams != count:
            msg = f"prefixes: expected one for all, or {count} rows / num_beams {self.num_beams} entries, got {requests}; num_beams is that of generate"
            raise ConfigError(msg)
        chosen = assign([[]] * requests, given, None)
        for prefix in {id(p): p for ps in chosen for p in ps}.values():
            check_fits(self.model, prefix)
        return [ps for ps in chosen for _ in range(count // requests)]  # type: ignore[misc]


def _free(hooks: Sequence[Any], loops: list[Loop]) -> None:
    """Also when the cache is dropped without being closed."""
    for hook in hooks:
        hook.remove()
    while loops:
        loops.pop().close()
