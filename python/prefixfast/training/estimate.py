"""Estimate of the parameters, memory and time of a training run, from two measured steps. No files are written."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from prefixfast.data.rows import Rows
from prefixfast.errors import ConfigError
from prefixfast.io.progress import Progress
from prefixfast.model.base_name import check_base_name
from prefixfast.training.arguments import AllTrainArguments, BaseModel
from prefixfast.training.job import JobArguments, load_base, prepare
from prefixfast.training.output_dir import OutputDir

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.training.loop import GroupTrainer
    from prefixfast.training.methods.state import MethodState
    from prefixfast.training.prefix_tensor import PrefixTensor

IGNORED_ARGUMENTS = ("output_dir", "resume", "overwrite", "progress")


@dataclass(frozen=True)
class Estimate:
    """Estimate of a run, over all of its groups.

    Attributes:
        prefixes: Number of prefixes.
        failed: Error message by name, for prefixes with wrong rows.
        examples: Number of examples of all prefixes.
        tokens: Number of tokens of all examples, each counted once.
        steps: Number of optimizer steps, summed over the groups.
        learning_rates: Different peak learning rates of the prefixes, ascending.
        stored_numbers: Number of stored numbers of the largest prefix of the largest group.
        stored_bytes: Size of these numbers in bytes.
        trained_numbers: Number of parameters that training adjusts for this prefix.
        sites: Numbers of this prefix by site, ``rows``, ``stored_numbers``, ``trained_numbers`` and
            ``training_bytes``; empty for a method that trains weights.
        base_bytes: Size of the base model's parameters in bytes.
        training_bytes: Size of the parameters, gradients and optimizer state of the largest group in bytes.
        peak_bytes: Largest memory use of the measured steps in bytes: of the GPU's allocator, else of this process.
        seconds_per_step: Seconds of the second step, in the slowest group.
        seconds: Seconds of all steps, without evaluation.
    """

    prefixes: int
    failed: dict[str, str]
    examples: int
    tokens: int
    steps: int
    learning_rates: list[float]
    stored_numbers: int
    stored_bytes: int
    trained_numbers: int
    sites: dict[str, dict[str, int]]
    base_bytes: int
    training_bytes: int
    peak_bytes: int
    seconds_per_step: float
    seconds: float


def estimate(model: BaseModel, data: Rows | Mapping[str, Rows], **arguments: Unpack[AllTrainArguments]) -> Estimate:
    """Measure two steps of the run that `train` would do with the same arguments.

    Args:
        model: Base model, as for `train`.
        data: Training rows, as for `train`.
        arguments: Keyword arguments of `train`. ``output_dir``, ``resume``, ``overwrite`` and ``progress`` have no
            effect, and nothing is put into ``store``.

    Raises:
        ConfigError: If options do not fit each other or the base model.
        DataError: If rows are malformed and the failure is not isolated.
        CapacityError: If memory runs out on a single example.
    """
    values: dict[str, Any] = {n: v for n, v in arguments.items() if n not in IGNORED_ARGUMENTS}
    of_job = {f.name for f in dataclasses.fields(JobArguments)}
    fields = {n: v for n, v in values.items() if n not in of_job}
    job = prepare(JobArguments(data, fields=fields, **{n: v for n, v in values.items() if n in of_job}))
    if isinstance(model, str | Path):
        check_base_name(model)
    if job.config.shard_base:
        msg = "shard_base: a dry run measures two steps in one process, which holds the whole base; leave it out"
        raise ConfigError(msg)
    from prefixfast.model.memory import peak_memory
    from prefixfast.training.dataset import none_left
    from prefixfast.training.group_data import tokenize_group  # imports torch, which a refused call needs not wait for
    from prefixfast.training.loop import GroupTrainer
    from prefixfast.training.resilience import gradient_checkpointing

    measured: list[_Measured] = []
    with load_base(model, job.config) as base, gradient_checkpointing(base, job.config.gradient_checkpointing):
        job = job.for_model(base)
        for number in range(len(job.groups)):
            group = tokenize_group(base, job, number)
            job.rows.failed.update(group.failed)
            output = OutputDir(None, None, is_single=True)
            for part in output.parts(group, resume=False) if group.group.jobs else ():
                trainer = GroupTrainer(part, number, output)
                with Progress("measure two steps"):
                    measured.append(_measure(trainer))
                trainer.free()
        if not measured:
            raise none_left(job.rows.failed)
        base_bytes = sum(p.numel() * p.element_size() for p in base.hf.parameters())
        peak = peak_memory(base.device)
    largest = max(measured, key=lambda m: m.group_numbers)
    examples = {key: counts for m in measured for key, counts in m.examples.items()}
    return Estimate(
        prefixes=sum(m.prefixes for m in measured),
        failed=dict(job.rows.failed),
        examples=sum(count for count, _ in examples.values()),
        tokens=sum(tokens for _, tokens in examples.values()),
        steps=sum(m.steps for m in measured),
        learning_rates=sorted({rate for m in measured for rate in m.learning_rates}),
        stored_numbers=largest.stored_numbers,
        stored_bytes=largest.stored_bytes,
        trained_numbers=largest.trained_numbers,
        sites=largest.sites,
        base_bytes=base_bytes,
        training_bytes=largest.training_bytes,
        peak_bytes=peak,
        seconds_per_step=max(m.seconds_per_step for m in measured),
        seconds=sum(m.steps * m.seconds_per_step for m in measured),
    )


@dataclass(frozen=True)
class _Measured:
    """Numbers of one group, as in `Estimate`. Its tensors are freed before the next group.

    Attributes:
        examples: Number of examples and of their tokens, by the id of the rows, which names and groups can share.
        group_numbers: Number of numbers that the optimizer updates in the whole group.
    """

    prefixes: int
    examples: dict[int, tuple[int, int]]
    learning_rates: list[float]
    steps: int
    group_numbers: int
    stored_numbers: int
    stored_bytes: int
    trained_numbers: int
    sites: dict[str, dict[str, int]]
    training_bytes: int
    seconds_per_step: float


def _measure(trainer: GroupTrainer) -> _Measured:
    """Numbers of a group, with the time of its second step."""
    seconds, runner, prefixes = _time_second_step(trainer), trainer.runner, len(trainer.names)
    state, stored = runner.params, runner.params.current()
    own = [t.tensor for t in state.params]
    numbers = _numbers(stored, prefixes)
    largest = max(range(prefixes), key=lambda i: (numbers[i], state.num_trained(i)))
    jobs, spans, sizes = trainer.group.jobs, trainer.data.dataset.span, runner.examples.sizes
    rows = trainer.job.rows.rows
    by_rows = {id(rows[j.source]): spans[j.name] for j in jobs}
    return _Measured(
        prefixes=prefixes,
        examples={key: (end - start, int(sizes[start:end].sum())) for key, (start, end) in by_rows.items()},
        learning_rates=[rate for j in jobs if (rate := j.config.learning_rate)],
        steps=int(runner.total.max()),
        group_numbers=sum(t.numel() for t in own),
        stored_numbers=numbers[largest],
        stored_bytes=_numbers(stored, prefixes, in_bytes=True)[largest],
        trained_numbers=state.num_trained(largest),
        sites=_sites(state, largest),
        training_bytes=_training_bytes(own) if state.num_trained(largest) else 0,
        seconds_per_step=seconds,
    )


def _training_bytes(tensors: Sequence[Tensor]) -> int:
    """Size of parameters, their gradients and two moments in bytes."""
    return 4 * sum(t.numel() * t.element_size() for t in tensors)


def _numbers(tensors: Sequence[PrefixTensor], count: int, *, in_bytes: bool = False) -> list[int]:
    """Number of numbers, or of bytes, of each of ``count`` prefixes."""
    found = [0] * count
    for own in tensors:
        t, numbers = own.tensor, range(count) if own.owners is None else own.owners.tolist()
        for i in numbers:
            found[i] += t.numel() // len(numbers) * (t.element_size() if in_bytes else 1)
    return found


def _sites(state: MethodState, number: int) -> dict[str, dict[str, int]]:
    """Numbers of the prefix with a number, by site."""
    from prefixfast.training.methods.prefix import PrefixState

    if not isinstance(state, PrefixState):
        return {}
    block, is_trained = state.block(number), bool(state.num_trained(number))
    count = len(block.numbers)
    return {
        site: {
            "rows": own.length,
            "stored_numbers": sum(t.numel() for t in own.current()) // count,
            "trained_numbers": own.num_trained if is_trained else 0,
            "training_bytes": _training_bytes(own.params) // count if is_trained else 0,
        }
        for site, own in block.by_site.items()
    }


def _time_second_step(trainer: GroupTrainer) -> float:
    """Seconds of the second step; the first step also pays for what is allocated once."""
    last = int(trainer.runner.total.max()) - 1
    if last < 0:  # a method without steps
        return 0.0
    with trainer.runner.params.applied():
        for number in range(2):
            start = time.perf_counter()
            trainer.runner.step(min(number, last), trainer.progress.active)
            if trainer.model.device.type == "cuda":
                import torch

                torch.cuda.synchronize(trainer.model.device)
        return time.perf_counter() - start
