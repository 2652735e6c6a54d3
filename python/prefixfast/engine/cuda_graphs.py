"""Decode steps on static memory: one captured CUDA graph for each power-of-two number of rows, replayed on whatever tables a step has.

The scheduler pads the tables (`pad_decode`), so that their layout says only how many rows a step has at most (and which layers the
known prefixes leave out); rows that stand for nothing point at a row of the slot table and of all per-row state that no request gets.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixfast.attention.plan import Layout, section
from prefixfast.config import EngineConfig
from prefixfast.model.base import Model

logger = logging.getLogger(__name__)
Result = tuple[Tensor, Tensor | None]  # logits, and tokens where they are chosen inside
Run = Callable[[Tensor, Layout, bool], Result]  # tables on the device, where they lie, whether to choose
COMPILER = "inductor"
_CAPTURE = threading.Lock()  # a process can capture one graph at a time


def why_not(model: Model, config: EngineConfig) -> str | None:
    """Why decode steps of this engine are not captured; None: they are."""
    if config.enforce_eager:
        return "enforce_eager=True"
    if model.device.type != "cuda":
        return "graphs are for GPUs"
    return None if model.backend.decode.users else "only the triton kernels read their tables on the device"


@dataclass
class _Static:
    """One graph and its memory."""

    layout: Layout
    tables: Tensor
    graph: torch.cuda.CUDAGraph | None = None
    out: Result | None = None


class DecodeGraphs:
    """Runs decode steps, each bucket's captured when it is first met.

    Args:
        run: The step; must not read a tensor on the host.
        dead: Entries of rows that stand for nothing, by table; 0 in all others.
        device: Where the model runs; without CUDA the step is called, on the same static memory.
        compiled: Compile what is captured with ``torch.compile``.
    """

    def __init__(self, run: Run, dead: Mapping[str, int], device: torch.device, *, compiled: bool = False) -> None:
        self.own, self.dead, self.device = run, dead, device
        self.compiled = torch.compile(run, backend=COMPILER, dynamic=False, fullgraph=True) if compiled else None
        self.capture = device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.capture else None
        self.stream = torch.cuda.Stream(device) if self.capture else None
        self.made: dict[tuple[int, bool], _Static] = {}

    def step(self, planned: Tensor, places: Layout, *, choose: bool) -> Result:
        """Run one step.

        Args:
            planned: The scheduler's buffer on the host, int32, pinned on a machine with a GPU.
            places: Where the step's tables lie in it.
            choose: Choose tokens inside.

        Returns:
            What ``run`` returns for the padded rows; overwritten by the next step of the bucket.
        """
        first = min(offset for view in places.views for offset, _, _ in view.values())
        layout = Layout(
            [
                {name: (offset - first, rows, cols) for name, (offset, rows, cols) in view.items()}
                for view in places.views
            ],
            places.view_of,
        )
        key = layout.views[0]["row"][1], choose
        static = self.made.get(key)
        if (
            static is None or static.layout != layout
        ):  # a request with more prefixes, or in other layers, than any before moves the tables
            static = self.made[key] = self._make(layout, choose=choose)
        static.tables.copy_(planned[first : first + len(static.tables)], non_blocking=True)
        if static.graph is not None:
            static.graph.replay()
        else:
            self._call(static, choose=choose)
        assert static.out is not None
        return static.out

    def _make(self, layout: Layout, *, choose: bool) -> _Static:
        """Static memory for a layout, and the graph, captured on rows that all stand for nothing."""
        tables = torch.zeros(layout.end, dtype=torch.int32)
        for view in layout.views:
            for name, value in self.dead.items():
                section(tables, view[name]).fill_(value)
            section(tables, view["work"])[:, 0] = -1  # no block and no row: nothing to do
        static = _Static(layout, tables.to(self.device))
        if not self.capture:
            return static
        try:
            with _CAPTURE, torch.cuda.device(self.device):
                static.graph, static.out = self._captured(static, choose=choose)
        except RuntimeError as e:
            logger.warning("decode steps are called, not captured: %s", e)
            self.capture = False
        return static

    def _captured(self, static: _Static, *, choose: bool) -> tuple[torch.cuda.CUDAGraph, Result]:
        side, current = self.stream, torch.cuda.current_stream()
        assert side is not None
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):  # compiles, and lets libraries allocate what they keep
                self._run(static, choose=choose)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # one stream for all captures, so that they share memory; the loader's thread goes on meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
            out = self._run(static, choose=choose)
        logger.info(
            "captured a decode step of %d rows%s",
            static.layout.views[0]["row"][1],
            "" if choose else ", tokens chosen outside",
        )
        return graph, out

    def _call(self, static: _Static, *, choose: bool) -> None:
        made = self._run(static, choose=choose)
        if static.out is None:
            static.out = made
            return
        for kept, new in zip(static.out, made, strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)

    def _run(self, static: _Static, *, choose: bool) -> Result:
        if self.compiled is not None:
            try:
                with torch._dynamo.config.patch(
                    recompile_limit=512
                ):  # one for each bucket, and again when a new set of layers is met
                    return self.compiled(static.tables, static.layout, choose)
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as e:
                logger.warning("decode steps are not compiled: %s", str(e).splitlines()[0])
                self.compiled = None
        return self.own(static.tables, static.layout, choose)
