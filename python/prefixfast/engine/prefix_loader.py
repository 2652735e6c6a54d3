"""`PrefixLoader`, a thread that reads prefixes from files and copies them into the KV arena while requests run."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prefixfast.attention.plan import LayerKV
from prefixfast.engine.arena_sites import ArenaSites, PrefixRun
from prefixfast.model.process import check_same_process, end_at_exit, process_id
from prefixfast.prefix.prefix import Prefix
from prefixfast.store import StoredPrefix

logger = logging.getLogger(__name__)
INT_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class FinishedLoad:
    """A load that has ended.

    Attributes:
        number: Number of the prefix.
        error: Error of the load, None if it succeeded.
    """

    number: int
    error: BaseException | None


@dataclass
class _Jobs:
    """Jobs of one loader thread. Every operation on them is atomic, so that an interrupt leaves no lock taken.

    Attributes:
        loads: Jobs that run first.
        prefetches: Jobs that run while there are no others.
        wake: One entry for each job, and for the end of the thread.
        ended: Whether the thread takes no further job.
    """

    loads: deque[Callable[[], None]] = field(default_factory=deque)
    prefetches: deque[Callable[[], None]] = field(default_factory=deque)
    wake: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)
    ended: bool = False

    def run(self) -> None:
        """Run jobs until the end."""
        _use_one_openmp_thread()
        while True:
            self.wake.get()
            if self.ended:
                return
            try:
                (self.loads or self.prefetches).popleft()()
            except BaseException:  # a job reports its own errors
                logger.exception("a job of the prefix loader failed")


class PrefixLoader:
    """Copies prefixes into free arena rows, and holds copies of stored prefixes in host memory.

    Args:
        places: Places of prefixes in the arena. Nothing is copied for a layer that reads the keys of another layer.
        host_bytes: Largest number of bytes of host memory for prefixes that were read from files. The most recently
            read prefix is held even if it is larger.
        dtype: Dtype of prefixes in host memory.
    """

    def __init__(self, places: ArenaSites, host_bytes: int, dtype: torch.dtype) -> None:
        self.places, self.host_bytes, self.dtype = places, host_bytes, dtype
        self.host_cache: OrderedDict[int, list[LayerKV]] = OrderedDict()  # by number, least recently used first
        self.host_cache_bytes = 0
        self.num_reads = 0  # prefixes read from files
        self.num_loading = 0
        # A prefetch can run after its prefix was forgotten. It must not put the prefix into host memory then.
        self.cacheable: set[int] = set()
        self.jobs = _Jobs()
        self.done: queue.SimpleQueue[FinishedLoad] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.process_id = process_id()
        device = places.device
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def load(self, number: int, prefix: Prefix | StoredPrefix, run: PrefixRun, row: int) -> None:
        """Start to copy a prefix into the arena. `finished` reports the end.

        Args:
            number: Number of the prefix.
            prefix: Prefix, or its entry in a store.
            run: Run of arena rows that the prefix takes.
            row: First arena row.
        """
        event = None
        if self.stream is not None:  # the copy waits for steps that still read the old content of these rows
            event = torch.cuda.current_stream(self.stream.device).record_event()
        self.cacheable.add(number)
        self.num_loading += 1
        done = self.done  # a load that `restart` drops must not report to its successor
        try:
            self._submit(self.jobs.loads, lambda: self._load(number, prefix, run, row, event, done))
        except RuntimeError as e:  # the system has no thread left
            done.put(FinishedLoad(number, e))

    def prefetch(self, number: int, prefix: StoredPrefix) -> None:
        """Start to read a stored prefix into host memory before a waiting request needs it.

        Args:
            number: Number of the prefix.
            prefix: Entry of the prefix in its store.
        """
        self.cacheable.add(number)
        if number not in self.host_cache:
            with contextlib.suppress(RuntimeError):  # the load itself will meet the error and report it
                self._submit(self.jobs.prefetches, lambda: self._prefetch(number, prefix))

    def finished(self, *, wait: bool) -> list[FinishedLoad]:
        """Loads that have ended since the last call.

        Args:
            wait: Whether to wait for at least one load, if any is running.
        """
        out: list[FinishedLoad] = []
        check_same_process(self.process_id, "prefix loader")
        while self.num_loading:
            try:
                out.append(self.done.get(block=wait and not out))
            except queue.Empty:
                break
            self.num_loading -= 1
        return out

    def forget(self, number: int) -> None:
        """Remove a prefix from host memory.

        Args:
            number: Number of the prefix.
        """
        self.cacheable.discard(number)
        if self.thread is not None:  # without a thread nothing was read
            self._submit(self.jobs.loads, lambda: self._remove(number))

    def restart(self) -> None:
        """Drop all jobs and all copies in host memory, and wait for the job that runs."""
        self.end()
        self.jobs, self.done, self.num_loading = _Jobs(), queue.SimpleQueue(), 0
        self.cacheable.clear()
        self.host_cache.clear()
        self.host_cache_bytes = 0

    def end(self, timeout: float | None = None) -> None:
        """End the thread after the job that runs. The thread of another process does not run in this one.

        Args:
            timeout: Largest number of seconds to wait, None without a limit.
        """
        self.jobs.ended = True
        self.jobs.wake.put(None)
        if self.thread is not None and self.process_id == process_id():
            self.thread.join(timeout)
        self.thread = None

    def close(self) -> None:
        """End the thread, and release the arena and all copies in host memory."""
        self.end()
        self.places.release()
        self.host_cache.clear()

    def _submit(self, jobs: deque[Callable[[], None]], job: Callable[[], None]) -> None:
        check_same_process(self.process_id, "prefix loader")
        if self.thread is None:
            thread = threading.Thread(target=self.jobs.run, name="prefixfast-loader", daemon=True)
            # A thread that an interrupt leaves without owner runs no job, since `restart` replaces `jobs`.
            thread.start()
            self.thread = thread
            end_at_exit(self)
        jobs.append(job)
        self.jobs.wake.put(None)

    @torch.inference_mode()
    def _load(
        self,
        number: int,
        prefix: Prefix | StoredPrefix,
        run: PrefixRun,
        row: int,
        event: torch.cuda.Event | None,
        done: queue.SimpleQueue[FinishedLoad],
    ) -> None:
        try:
            with torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext():
                if event is not None and self.stream is not None:
                    self.stream.wait_event(event)
                for rows, x in self.places.targets(run, row, self._host_kv(number, prefix)):
                    if x.shape[2] < rows.shape[2]:
                        rows.zero_()
                    _copy(rows[..., : x.shape[2]], x)
                if self.stream is not None:
                    self.stream.synchronize()
            done.put(FinishedLoad(number, None))
        except BaseException as e:
            done.put(FinishedLoad(number, e))

    def _prefetch(self, number: int, prefix: StoredPrefix) -> None:
        if number in self.cacheable:
            with contextlib.suppress(Exception):  # the load itself will meet the error and report it
                self._host_kv(number, prefix)

    def _host_kv(self, number: int, prefix: Prefix | StoredPrefix) -> list[LayerKV]:
        """Keys and values of the layers with their own, those from files in the dtype of host memory."""
        if isinstance(prefix, Prefix):
            return self.places.kv(prefix)
        if (cached := self.host_cache.get(number)) is not None:
            self.host_cache.move_to_end(number)
            return cached
        pinned = self.places.device.type == "cuda"
        layers = [
            (_host_copy(k, self.dtype, pinned=pinned), _host_copy(v, self.dtype, pinned=pinned))
            for k, v in self.places.kv(prefix.read())
        ]
        self.num_reads += 1
        if number not in self.cacheable:
            return layers
        self.host_cache[number] = layers
        self.host_cache_bytes += _nbytes(layers)
        while self.host_cache_bytes > self.host_bytes and len(self.host_cache) > 1:
            self._remove(next(iter(self.host_cache)))
        return layers

    def _remove(self, number: int) -> None:
        self.host_cache_bytes -= _nbytes(self.host_cache.pop(number, []))


def _nbytes(layers: list[LayerKV]) -> int:
    return sum(t.numel() * t.element_size() for kv in layers for t in kv)


def _host_copy(t: Tensor, dtype: torch.dtype, *, pinned: bool) -> Tensor:
    """Copy in host memory, never a view of a mapped file that can disappear."""
    return torch.empty(t.shape, dtype=dtype, pin_memory=pinned).copy_(t)


def _copy(target: Tensor, source: Tensor) -> None:
    if target.device.type != "cpu":
        target.copy_(source, non_blocking=True)
        return
    same = source.detach().to(dtype=target.dtype, device="cpu").contiguous()
    kind = INT_OF_SIZE[target.element_size()]
    # numpy releases the interpreter's lock and does not start torch's threads.
    np.copyto(target.view(kind).numpy(), same.view(kind).numpy())


def _use_one_openmp_thread() -> None:
    """Limit this thread to one OpenMP thread. Its own OpenMP team would spin on the cores that run the model."""
    for library in Path(torch.__file__).parent.glob("lib/libgomp*"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(library)).omp_set_num_threads(1)
