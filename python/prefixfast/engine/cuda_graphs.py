"""Decode steps as CUDA graphs, one graph for each power-of-two number of rows, replayed on the tables of each step.

The scheduler pads the tables of a decode step (``pad_decode``). Their layout then depends only on the padded number
of rows, on the largest number of prefixes of a request, and on the sets of layers that the known prefixes have. Padding
rows point at a row of the slot table, and of all other state per row, that no request gets.
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
DecodeResult = tuple[Tensor, Tensor | None]  # logits, and the tokens if the step chooses them
RunDecode = Callable[
    [Tensor, Layout, bool], DecodeResult
]  # tables on the device, their layout, whether to choose tokens
COMPILER = "inductor"
_CAPTURE_LOCK = threading.Lock()  # a process can capture one graph at a time


def eager_reason(model: Model, config: EngineConfig) -> str | None:
    """Reason why decode steps run eagerly, None if they run as CUDA graphs.

    Args:
        model: Base model.
        config: Options of the engine.
    """
    if config.enforce_eager:
        return "enforce_eager=True"
    if model.seq2seq is not None:
        return "encoder-decoder bases run their decode steps eagerly"
    if model.device.type != "cuda":
        return "CUDA graphs need a GPU"
    return None if model.backend.decode.users else "only the triton kernels read their tables on the device"


@dataclass
class _StaticStep:
    """A decode step on memory that stays in place: layout and memory of its tables, graph, and result."""

    layout: Layout
    tables: Tensor
    graph: torch.cuda.CUDAGraph | None = None
    out: DecodeResult | None = None


class DecodeGraphs:
    """Decode steps on static memory. The step of each padded number of rows is captured when it first occurs.

    Args:
        run: Function that runs a decode step. It reads no tensor on the host.
        padding: Value of the entries of padding rows, by table. Entries of all other tables are 0.
        device: Device of the model. Without CUDA, steps run eagerly on the same static memory.
        compiled: Whether `torch.compile` compiles the captured steps.
    """

    def __init__(
        self, run: RunDecode, padding: Mapping[str, int], device: torch.device, *, compiled: bool = False
    ) -> None:
        self.run_eager, self.padding, self.device = run, padding, device
        self.compiled = torch.compile(run, backend=COMPILER, dynamic=False, fullgraph=True) if compiled else None
        self.captures = device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None
        self.stream = torch.cuda.Stream(device) if self.captures else None
        self.steps: dict[tuple[int, bool], _StaticStep] = {}  # by padded number of rows, and whether it chooses tokens

    def step(self, buffer: Tensor, layout: Layout, *, choose_tokens: bool) -> DecodeResult:
        """Run one decode step.

        Args:
            buffer: The scheduler's buffer on the host, int32, in pinned memory on a machine with a GPU.
            layout: Layout of the step's tables in the buffer.
            choose_tokens: Whether the step also chooses tokens.

        Returns:
            Result of ``run`` for the padded rows. The next step with the same number of rows overwrites it.
        """
        first = min(offset for view in layout.views for offset, _, _ in view.values())
        moved = Layout(
            [
                {name: (offset - first, rows, cols) for name, (offset, rows, cols) in view.items()}
                for view in layout.views
            ],
            layout.view_of,
        )
        key = moved.views[0]["row"][1], choose_tokens
        static = self.steps.get(key)
        # A request with more prefixes than any before, or a prefix in other layers, changes the layout.
        if static is None or static.layout != moved:
            static = self.steps[key] = self._make(moved, choose_tokens=choose_tokens)
        static.tables.copy_(buffer[first : first + len(static.tables)], non_blocking=True)
        if static.graph is not None:
            static.graph.replay()
        else:
            self._run_uncaptured(static, choose_tokens=choose_tokens)
        assert static.out is not None
        return static.out

    def _make(self, layout: Layout, *, choose_tokens: bool) -> _StaticStep:
        """Static memory for a layout, and the graph, captured with padding rows alone."""
        tables = torch.zeros(layout.end, dtype=torch.int32)
        for view in layout.views:
            for name, value in self.padding.items():
                section(tables, view[name]).fill_(value)
            section(tables, view["work"])[:, 0] = -1  # work items without a block and a row do nothing
        static = _StaticStep(layout, tables.to(self.device))
        if not self.captures:
            return static
        try:
            with _CAPTURE_LOCK, torch.cuda.device(self.device):
                static.graph, static.out = self._capture(static, choose_tokens=choose_tokens)
        except RuntimeError as e:
            logger.warning("decode steps run eagerly, since the capture of a CUDA graph failed: %s", e)
            self.captures = False
        return static

    def _capture(self, static: _StaticStep, *, choose_tokens: bool) -> tuple[torch.cuda.CUDAGraph, DecodeResult]:
        side, current = self.stream, torch.cuda.current_stream()
        assert side is not None
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):  # kernels are compiled, and libraries allocate their workspaces, before the capture
                self._run(static, choose_tokens=choose_tokens)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # All captures use one stream, so that they share memory. Errors are limited to this thread, since the
        # prefix loader's thread goes on meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
            out = self._run(static, choose_tokens=choose_tokens)
        logger.info(
            "captured a decode step of %d rows, tokens chosen %s",
            static.layout.views[0]["row"][1],
            "in the graph" if choose_tokens else "after it",
        )
        return graph, out

    def _run_uncaptured(self, static: _StaticStep, *, choose_tokens: bool) -> None:
        result = self._run(static, choose_tokens=choose_tokens)
        if static.out is None:
            static.out = result
            return
        for target, new in zip(static.out, result, strict=True):
            if target is not None and new is not None:
                target.copy_(new)

    def _run(self, static: _StaticStep, *, choose_tokens: bool) -> DecodeResult:
        if self.compiled is not None:
            try:
                # One compilation per padded number of rows, and more for each new set of layers.
                with torch._dynamo.config.patch(recompile_limit=512):
                    return self.compiled(static.tables, static.layout, choose_tokens)
            except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as e:
                logger.warning("decode steps are not compiled: %s", str(e).splitlines()[0])
                self.compiled = None
        return self.run_eager(static.tables, static.layout, choose_tokens)
