"""Prefixes on their way to the arena, copied by a thread of its own: from files to the host, from the host to arena rows, while other requests run."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefixfast.attention.plan import LayerKV
from prefixfast.model.attach import LayerShape
from prefixfast.prefix.kv import kv_by_layer
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import StoredPrefix

LOAD, PREFETCH = 0, 1  # loads go first
BYTES_AS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Loaded:
    """A finished load.

    Attributes:
        number: The prefix.
        error: Why it failed, None if it did not.
    """

    number: int
    error: BaseException | None


class Loader:
    """Copies prefixes into arena rows that nobody reads.

    Args:
        layers: The arena: per layer keys and values ``[rows, H, D]``.
        shapes: Heads of every layer.
        host_bytes: How much of what was read from files is kept.
        dtype: In which it is kept.
    """

    def __init__(
        self, layers: Sequence[LayerKV], shapes: Sequence[LayerShape], host_bytes: int, dtype: torch.dtype
    ) -> None:
        self.layers, self.host_bytes, self.dtype = layers, host_bytes, dtype
        self.shapes = shapes
        self.host: OrderedDict[int, list[LayerKV]] = OrderedDict()  # by number, the least recently used first
        self.kept = self.read = self.under_way = 0
        self.known: set[int] = (
            set()
        )  # prefixes of which copies may be kept: a prefetch can come after all was forgotten
        self.jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self.done: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self.order = itertools.count()
        self.thread: threading.Thread | None = None
        device = layers[0][0].device
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def load(self, number: int, prefix: Prefix | StoredPrefix, row: int) -> None:
        """Copy a prefix to the arena rows from ``row`` on; `finished` will name it."""
        before = None
        if self.stream is not None:  # steps that read the rows' old content come first
            before = torch.cuda.current_stream(self.stream.device).record_event()
        self.known.add(number)
        self._submit(LOAD, lambda: self._load(number, prefix, row, before))
        self.under_way += 1

    def prefetch(self, number: int, prefix: StoredPrefix) -> None:
        """Read a stored prefix that a waiting request will need, unless it is on the host."""
        self.known.add(number)
        if number not in self.host:
            self._submit(PREFETCH, lambda: self._prefetch(number, prefix))

    def finished(self, *, wait: bool) -> list[Loaded]:
        """Loads that have ended; with ``wait`` at least one if any is under way."""
        out: list[Loaded] = []
        while self.under_way:
            try:
                out.append(self.done.get(block=wait and not out))
            except queue.Empty:
                break
            self.under_way -= 1
        return out

    def forget(self, number: int) -> None:
        """Let go of what is kept of a prefix."""
        self.known.discard(number)
        self._submit(LOAD, lambda: self._drop(number))

    def close(self) -> None:
        """End the thread and let go of the arena and of all copies."""
        if self.thread is not None:
            self.jobs.put((PREFETCH + 1, next(self.order), None))
            self.thread.join()
            self.thread = None
        self.layers = []
        self.host.clear()

    def _submit(self, rank: int, job: Callable[[], None]) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="prefixfast-loader", daemon=True)
            self.thread.start()
        self.jobs.put((rank, next(self.order), job))

    def _run(self) -> None:
        _stay_on_one_core()
        while (job := self.jobs.get()[2]) is not None:
            job()

    @torch.inference_mode()
    def _load(self, number: int, prefix: Prefix | StoredPrefix, row: int, before: Any) -> None:
        try:
            with torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext():
                if before is not None and self.stream is not None:
                    self.stream.wait_event(before)
                for target, source in zip(self.layers, self._on_host(number, prefix), strict=True):
                    for arena, x in zip(target, source, strict=True):
                        _copy(arena[row : row + len(x)], x)
                if self.stream is not None:
                    self.stream.synchronize()
            self.done.put(Loaded(number, None))
        except BaseException as e:
            self.done.put(Loaded(number, e))

    def _prefetch(self, number: int, prefix: StoredPrefix) -> None:
        if number in self.known:
            with contextlib.suppress(Exception):  # the load itself will meet the error and tell
                self._on_host(number, prefix)

    def _on_host(self, number: int, prefix: Prefix | StoredPrefix) -> list[LayerKV]:
        """Keys and values of every layer, those from files in the dtype in which they are kept."""
        if isinstance(prefix, Prefix):
            return kv_by_layer(prefix, self.shapes)
        if (kept := self.host.get(number)) is not None:
            self.host.move_to_end(number)
            return kept
        pinned = self.layers[0][0].device.type == "cuda"
        made = [
            (_settled(k, self.dtype, pinned=pinned), _settled(v, self.dtype, pinned=pinned))
            for k, v in kv_by_layer(prefix.read(), self.shapes)
        ]
        self.read += 1
        if number not in self.known:
            return made
        self.host[number] = made
        self.kept += _bytes(made)
        while self.kept > self.host_bytes and len(self.host) > 1:
            self._drop(next(iter(self.host)))
        return made

    def _drop(self, number: int) -> None:
        self.kept -= _bytes(self.host.pop(number, []))


def _bytes(layers: list[LayerKV]) -> int:
    return sum(t.numel() * t.element_size() for kv in layers for t in kv)


def _settled(t: Tensor, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """Where a GPU can copy it without help; never a view of a file that may go."""
    return torch.empty(t.shape, dtype=dtype, pin_memory=pinned).copy_(t)


def _copy(target: Tensor, source: Tensor) -> None:
    if target.device.type != "cpu":
        target.copy_(source, non_blocking=True)
        return
    same = source.detach().to(dtype=target.dtype, device="cpu").contiguous()
    kind = BYTES_AS[target.element_size()]
    np.copyto(
        target.view(kind).numpy(), same.view(kind).numpy()
    )  # without the interpreter's lock and without torch's threads


def _stay_on_one_core() -> None:
    """Keep torch's calls of this thread off the cores that run the model: its own OpenMP team would spin there."""
    for library in Path(torch.__file__).parent.glob("lib/libgomp*"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(library)).omp_set_num_threads(1)
