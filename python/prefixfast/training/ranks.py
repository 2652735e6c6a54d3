"""`Ranks`, the processes that train one run together, as ``torchrun`` and ``accelerate launch`` start them.

The rank of a process is its number, from 0. Every exchange begins with a round in which each process says whether it
has failed, so that the failure of one process ends all of them. This module imports no torch before a run has several
processes.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from prefixfast.errors import ConfigError, PrefixFastError, shown

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables that a launcher sets
PLUGINS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
LONGEST_WAIT = timedelta(days=30)  # for the slowest process, when each trains prefixes of its own
BUCKET = 2**22  # numbers that are summed in one exchange

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Ranks:
    """The processes of a run; by default this process alone, for which every method returns at once.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        group: Process group of torch.distributed for tensors on CPUs and for objects, None for one process.
        has_failed: Whether the failure of a process was told to all.
        is_in_step: Whether the processes run the base model together, so that one that fails cannot wait for the others
            to hear of it, and leaves them.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    has_failed: bool = False
    is_in_step: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over the processes, which have the same bits in each of them.

        Args:
            tensors: Tensors with the same shapes and dtypes on every process.
        """
        if self.size == 1:
            return
        self._agree()
        bucket: list[Tensor] = []
        for t in tensors:
            is_full = sum(own.numel() for own in bucket) + t.numel() > BUCKET
            if bucket and (is_full or (t.dtype, t.device) != (bucket[0].dtype, bucket[0].device)):
                self._sum_bucket(bucket)
                bucket = []
            bucket.append(t)
        self._sum_bucket(bucket)

    def gather(self, value: T) -> list[T]:
        """Values of all processes, by rank.

        Args:
            value: Value of this process, which can be pickled.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        data = pickle.dumps(value)  # an object that cannot be pickled fails before the others wait for it
        self._agree()
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, data, group=self.group)
        return [pickle.loads(own) for own in found]

    def first(self, work: Callable[[], T]) -> T:
        """Value that the first process computes, for all processes. An error of it ends all of them.

        Args:
            work: Function that the first process alone calls, with a result that can be pickled.
        """
        if self.size == 1:
            return work()
        import torch.distributed as dist

        box: list[Any] = [pickle.dumps(work()) if self.is_first else None]
        self._agree()
        dist.broadcast_object_list(box, group_src=0, group=self.group)
        found: T = pickle.loads(box[0])
        return found

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in one of the processes."""
        if self.size == 1:
            return flag
        import torch

        count = torch.tensor([int(flag)])
        self.sum_([count])
        return bool(count)

    def check_same(self, value: str, what: str) -> None:
        """Raise `ConfigError` if processes have different values.

        Args:
            value: Value of this process.
            what: Name of the value, for the error.
        """
        found = self.gather(value)
        if len({*found}) > 1:
            other = next(i for i, own in enumerate(found) if own != found[0])
            msg = (
                f"expected the same {what} on all {self.size} processes, got others on process {other} than on process "
                "0; give every process the whole data and the same options, which train divides"
            )
            raise ConfigError(msg)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Context manager at whose end every process waits for the others; if one fails, all of them raise.

        Raises:
            PrefixFastError: If another process has failed.
        """
        try:
            yield
            self._agree()
        except BaseException as e:
            with contextlib.suppress(RuntimeError):  # the others have ended
                if self.is_in_step:
                    _leave()
                elif not self.has_failed:
                    self._agree(f"{type(e).__name__}: {e}")
            if (
                self.size > 1 and isinstance(e, RuntimeError) and "by peer" in str(e)
            ):  # gloo's text for a process that is gone
                msg = f"another process of the {self.size} has ended: its own error says why"
                raise PrefixFastError(msg) from e
            raise

    def _agree(self, error: str | None = None) -> None:
        """Tell the other processes whether this one has failed, and hear whether they have."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        count = torch.tensor([int(error is not None)])
        dist.all_reduce(count, group=self.group)
        if not int(count):
            return
        self.has_failed = True
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, error, group=self.group)
        if error is None:
            rank, text = next((i, text) for i, text in enumerate(found) if text is not None)
            msg = f"process {rank} of {self.size} has failed: {text}"
            raise PrefixFastError(msg)

    def _sum_bucket(self, bucket: Sequence[Tensor]) -> None:
        import torch
        import torch.distributed as dist

        if not bucket:
            return
        flat = torch.cat([t.detach().reshape(-1) for t in bucket])
        dist.all_reduce(flat, group=self.group if flat.device.type == "cpu" else None)
        for t, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            t.detach().copy_(total.view_as(t))


ALONE = Ranks()


def rank_and_size() -> tuple[int, int]:
    """Number of this process and number of processes, of torch.distributed or of the launcher's environment.

    Raises:
        ConfigError: If the environment has other than numbers.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    found = [os.environ.get(name) for name in LAUNCHED]
    if any(value is None for value in found):
        return 0, 1
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError as e:
        values = ", ".join(f"{name}={shown(os.environ[name])}" for name in ("RANK", "WORLD_SIZE"))
        msg = f"expected numbers in RANK and WORLD_SIZE, as torchrun sets them, got {values}; unset them to train alone"
        raise ConfigError(msg) from e
    return rank, size


def join_ranks() -> Ranks:
    """The processes that were started together with this one. Waits until all of them have called it.

    Raises:
        ConfigError: If accelerate was asked for a plugin that divides models in its own way.
    """
    rank, size = rank_and_size()
    if size == 1:
        return ALONE
    if plugin := next((n for n in PLUGINS if os.environ.get(n, "").lower() in ("1", "true", "yes")), None):
        advice = "launch without it, and give shard_base=True (--shard-base) for a base that does not fit on a device"
        msg = f"{plugin} is set: expected no plugin of accelerate, since train divides the base model itself; {advice}"
        raise ConfigError(msg)
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        logger.info("process %d of %d: waiting for the others", rank, size)
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
        atexit.register(_leave)
    return Ranks(rank, size, _control_group())


_GROUPS: dict[int, tuple[Any, Any]] = {}  # group of all processes and group of this module, by the id of the former


def _control_group() -> Any:
    """Group for tensors on CPUs and for objects, which also waits for long."""
    import torch.distributed as dist

    world = dist.group.WORLD
    if id(world) not in _GROUPS or _GROUPS[id(world)][0] is not world:
        _GROUPS[id(world)] = world, dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    return _GROUPS[id(world)][1]


def _leave() -> None:
    """End the process groups of this process."""
    import torch.distributed as dist

    _GROUPS.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
