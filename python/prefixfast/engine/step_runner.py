"""`StepRunner`, the model's forward of each prefill and decode step, and the choice of the next tokens.

Shape letters: n rows of a step, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefixfast import _rust
from prefixfast.attention.plan import Arena, Layout, Plan, decode_plan, host_table, prefill_plan
from prefixfast.attention.seq2seq_plan import Seq2SeqPlan, seq2seq_decode_plan, seq2seq_prefill_plan
from prefixfast.config.sites import Site
from prefixfast.engine.cuda_graphs import DecodeGraphs, DecodeResult
from prefixfast.engine.decode_batch import DecodeBatch, StepTokens
from prefixfast.engine.request import Request
from prefixfast.engine.transfer import to_device
from prefixfast.model.base import Model

UNBOUNDED = 2**30  # reach of a captured step, in which any sliding window can hide keys


class StepRunner:
    """Runs the steps that the scheduler has planned.

    Args:
        model: Base model.
        arena: Keys, values and slot table of the engine.
        batch: State of the decode rows.
        max_model_len: Largest number of prompt and generated tokens of a request.
        counts: Counters of the engine, which the steps update.
    """

    def __init__(
        self, model: Model, arena: Arena, batch: DecodeBatch, max_model_len: int, counts: Counter[str]
    ) -> None:
        self.model, self.arena, self.batch, self.max_model_len, self.counts = model, arena, batch, max_model_len, counts
        self.graphs: DecodeGraphs | None = None

    def capture(self, *, compiled: bool) -> None:
        """Run decode steps as CUDA graphs from now on.

        Args:
            compiled: Whether `torch.compile` compiles the captured steps.
        """
        padding = {"row": len(self.batch.next_token) - 1, "slot": len(self.arena.layers[0][0]) - 1, "lens": 1}
        self.graphs = DecodeGraphs(self._run_static, padding, self.model.device, compiled=compiled)

    def close(self) -> None:
        """Release the arena and the CUDA graphs."""
        self.graphs = None
        self.arena = Arena([], torch.empty(0, dtype=torch.int32))

    def prefill(
        self, buffer: Tensor, header: _rust.StepHeader, requests: Mapping[int, Request]
    ) -> tuple[list[StepTokens], dict[int, int], dict[int, Exception]]:
        """Run the prompt tokens of a step in one packed forward, and choose the first tokens of complete prompts.

        An encoder-decoder base also runs the encoder on the texts of the requests, which are never cut.

        Args:
            buffer: The scheduler's buffer on the host, int32.
            header: The scheduler's plan, with a prefill.
            requests: Requests by number.

        Returns:
            First tokens of the requests whose prompt is complete, the first decode row of each of them by number, and
            the errors of those that could not be started.
        """
        assert header.prefill is not None
        layout = Layout(*header.prefill)
        plan = self._prefill_plan(buffer, header, layout)
        chunk = host_table(buffer.numpy(), layout.views[0]["chunk"]).tolist()
        chunks = list(zip(header.prefill_ids, chunk, strict=True))
        ids = np.concatenate([requests[number].ids[start : start + n] for number, (_, _, start, n) in chunks])
        texts = [t for number in header.prefill_ids if (t := requests[number].encoder_ids) is not None]
        encoder_ids = to_device(np.concatenate(texts), self.model.device) if texts else None
        logits = self.model.forward(plan, to_device(ids, self.model.device), encoder_ids)
        continued = isinstance(plan, Plan) and plan.key_slots is not None
        self.counts.update(prefill_tokens=len(ids) + sum(map(len, texts)), continued_prefills=int(continued))
        first_rows: dict[int, int] = {}
        failed: dict[int, Exception] = {}
        rows, places = [], []
        complete = [(number, row) for number, (row, _, start, n) in chunks if start + n == len(requests[number].ids)]
        for place, (number, row) in enumerate(complete):
            try:
                rows.append(self.batch.start(number, requests[number], row))
            except Exception as e:  # for example of a logits processor's parameters
                failed[number] = e
                continue
            first_rows[number] = row
            places.append(place)
        if not rows:
            return [], {}, failed
        if failed:
            logits = logits[to_device(np.array(places), logits.device)]
        counts = [len(r) for r in rows]
        if max(counts) > 1:  # all beams or samples of a request start from the same logits
            logits = logits[to_device(np.repeat(np.arange(len(rows)), counts), logits.device)]
        length = max(len(requests[number].ids) for number in header.prefill_ids)
        return self.batch.choose_tokens(logits, np.concatenate(rows), length), first_rows, failed

    def _prefill_plan(self, buffer: Tensor, header: _rust.StepHeader, layout: Layout) -> Plan | Seq2SeqPlan:
        """Plan of a prefill, whose tables are copied to the device."""
        layouts = _layouts(layout, {"cross": header.cross, "enc": header.encoder})
        tables = _copied(buffer, layouts, self.model.device)
        if self.model.seq2seq is None:
            return prefill_plan(tables, layouts["self"], header.prefill_reach, self.arena, self.model.backend)
        reach = max(header.prefill_reach, header.encoder_reach)
        return seq2seq_prefill_plan(tables, layouts, reach, self.arena, self.model.backend)

    def decode(self, buffer: Tensor, header: _rust.StepHeader) -> list[StepTokens]:
        """Generate one token for each running row.

        Args:
            buffer: The scheduler's buffer on the host, int32.
            header: The scheduler's plan, with a decode.
        """
        assert header.decode is not None
        layout = Layout(*header.decode)
        first, host = layout.views[0], buffer.numpy()
        lens, rows = host_table(host, first["lens"]), host_table(host, first["row"]).astype(np.int64)
        rows = rows[rows < len(self.batch.next_token) - 1]  # without padding rows
        all_greedy = bool(self.batch.is_greedy[rows].all())
        self.counts.update(decode_steps=1, decoded_rows=len(rows))
        if self.graphs is not None:
            logits, tokens = self.graphs.step(buffer, layout, choose_tokens=all_greedy)
        else:
            layouts = _layouts(layout, {"cross": header.decode_cross})
            tables, reach = _copied(buffer, layouts, self.model.device), header.decode_reach
            logits, tokens = self._run(tables, layouts, choose_tokens=all_greedy, reach=reach, max_len=int(lens.max()))
        if tokens is not None:
            return [self.batch.send(tokens[: len(rows)], rows, 1)]
        return self.batch.choose_tokens(logits[: len(rows)], rows, int(lens.max()))

    def _run_static(self, tables: Tensor, layout: Layout, choose_tokens: bool) -> DecodeResult:
        layouts: dict[Site, Layout] = {"self": layout}
        return self._run(tables, layouts, choose_tokens=choose_tokens, reach=UNBOUNDED, max_len=self.max_model_len)

    def _run(
        self, tables: Tensor, layouts: Mapping[Site, Layout], *, choose_tokens: bool, reach: int, max_len: int
    ) -> DecodeResult:
        """Run the part of a decode step that a CUDA graph captures.

        Args:
            tables: Tables of the step on the device, int32.
            layouts: Layout of the tables of each site.
            choose_tokens: Whether to choose tokens by greedy search.
            reach: Largest number of keys that one query sees.
            max_len: Largest number of tokens of a row, prefixes not counted.

        Returns:
            Logits ``[n, V]``, and the tokens ``[n]`` if chosen, `NO_TOKEN` where none is possible.
        """
        arena, backend = self.arena, self.model.backend
        plan: Plan | Seq2SeqPlan
        if self.model.seq2seq is None:
            plan = decode_plan(tables, layouts["self"], reach, max_len, arena, backend)
        else:
            plan = seq2seq_decode_plan(tables, layouts, reach, max_len, arena, backend)
        assert plan.decode is not None
        rows = plan.decode[0].row.long()
        logits = self.model.forward(plan, self.batch.next_token[rows])
        if not choose_tokens:
            return logits, None
        tokens = self.batch.greedy.step(logits, rows).tokens
        self.batch.next_token[rows] = tokens.clamp(min=0)
        return logits, tokens


def _layouts(own: Layout, others: Mapping[Site, tuple[Any, Any] | None]) -> dict[Site, Layout]:
    """Layout of the tables of each site that a step has: those of the decoder's self-attention, and others."""
    found: dict[Site, Layout] = {"self": own}
    return found | {site: Layout(*layout) for site, layout in others.items() if layout is not None}


def _copied(buffer: Tensor, layouts: Mapping[Site, Layout], device: torch.device) -> Tensor:
    """Tables of a step on the device."""
    return buffer[: max(layout.end for layout in layouts.values())].to(device, non_blocking=True)
