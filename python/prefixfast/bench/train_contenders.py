"""Contenders of the suite ``train``: `prefixfast.train`, and PEFT's prefix-tuning and LoRA in the usual loop."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from prefixfast.bench.contenders import peft_model
from prefixfast.bench.peak import PeakOver
from prefixfast.bench.step_clock import StepClock
from prefixfast.model.base import Model
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.trainer import train

RATE, SEED = 1e-2, 0
# Options of all contenders, none of which is left to a default.
HOW: dict[str, Any] = {
    "learning_rate": RATE,
    "seed": SEED,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
    "loss": "token_mean",
}
OF_PREFIXES: dict[str, Any] = {"reparameterization": "none", "prefix_dropout": 0.0}
Rows = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Workload:
    """Rows of random tokens that one prefix is trained on. The first half of each row has no loss.

    Attributes:
        examples: Number of rows, all of which make one batch.
        shortest: Smallest number of tokens of a row.
        longest: Largest number of tokens of a row.
        steps: Number of timed steps.
    """

    examples: int = 10
    shortest: int = 20
    longest: int = 80
    steps: int = 3

    def rows(self, seed: int, vocab_size: int) -> Rows:
        """Rows of the prefix with number ``seed``."""
        g = torch.Generator().manual_seed(seed)
        sizes = torch.randint(self.shortest, self.longest + 1, (self.examples,), generator=g).tolist()
        ids = [torch.randint(3, vocab_size, (n,), generator=g).tolist() for n in sizes]
        return [{"input_ids": x, "labels": [-100] * (len(x) // 2) + x[len(x) // 2 :]} for x in ids]


class Run(NamedTuple):
    """One timed run.

    Attributes:
        seconds: Seconds from the end of the first step, which warms up, to the end of the last.
        losses: Loss of the first prefix in every step.
        numbers: Number of trained numbers of a user, in fp32.
        peak: Bytes of the peak of memory over the base, None where the system does not tell.
    """

    seconds: float
    losses: list[float]
    numbers: int = 0
    peak: int | None = None

    @classmethod
    def of(cls, clock: StepClock[float], numbers: int, memory: PeakOver) -> Run:
        """The run that a clock and a context manager recorded."""
        return cls(clock.times[-1] - clock.times[0], clock.losses, numbers, memory.nbytes)


def settings_of(model: Model | PreTrainedModel, work: Workload, own: Mapping[str, Any]) -> dict[str, object]:
    """Settings under which a contender trains, which the report and the results file show.

    Args:
        model: Base of the contender.
        work: Workload.
        own: Options of the contender beside those of all.
    """
    if isinstance(model, Model):
        attention = f"prefixfast, {model.backend.name}"
    else:
        attention = str(model.config._attn_implementation)
    options = ", ".join(f"{name}={value}" for name, value in {**HOW, **own}.items())
    dtype = str(model.dtype).removeprefix("torch.")
    return {"dtype": dtype, "attention": attention, "batch": work.examples, "options": f"AdamW, {options}"}


def ours(model: Model, rows: Mapping[str, Rows], start: Mapping[str, Prefix], steps: int) -> Run:
    """Train all prefixes in the same batches with `prefixfast.train`."""
    clock, size = StepClock(time.perf_counter), len(next(iter(rows.values())))
    with PeakOver(model.device) as memory:
        found = train(
            model,
            dict(rows),
            init=dict(start),
            on_error="raise",
            batch_size=size,
            max_steps=steps + 1,
            progress=False,
            callbacks=[clock],
            **HOW,
            **OF_PREFIXES,
        )
    return Run.of(clock, next(iter(found.values())).num_trained, memory)


def our_lora(model: Model, rows: Rows, steps: int, rank: int) -> Run:
    """Train LoRA of one user with `prefixfast.train`, whose losses those of PEFT are compared with."""
    clock, how = StepClock(time.perf_counter), {**HOW, "batch_size": len(rows), "max_steps": steps + 1}
    with PeakOver(model.device) as memory:
        found = train(model, rows, method="lora", lora_rank=rank, progress=False, callbacks=[clock], **how)
    return Run.of(clock, found.num_trained, memory)


def peft(plain: PreTrainedModel, rows: Rows, start: Prefix, steps: int) -> Run:
    """Train one prefix with PEFT's prefix-tuning."""
    own, weight = peft_model(copy.deepcopy(plain), start)
    return _plain_loop(own, [weight], rows, steps)


def peft_lora(plain: PreTrainedModel, rows: Rows, steps: int, rank: int) -> Run:
    """Train LoRA of one user with PEFT, in the layers that PEFT chooses for the family of the base."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of GPT-2's transposed weights
        own = get_peft_model(copy.deepcopy(plain), LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank))
    return _plain_loop(own, [p for p in own.parameters() if p.requires_grad], rows, steps)


def _plain_loop(own: Any, weights: Sequence[torch.Tensor], rows: Rows, steps: int) -> Run:
    """Train some weights of a model of PEFT in the usual loop.

    A right-padded batch, made once, AdamW, clipping and a linear schedule. There is no dropout, as in prefixfast.
    """
    from transformers import get_linear_schedule_with_warmup

    own.eval()
    own.get_base_model().gradient_checkpointing_disable()
    own.get_base_model().config.use_cache = False
    width = max(len(r["input_ids"]) for r in rows)
    pad = [width - len(r["input_ids"]) for r in rows]
    batch = {
        "input_ids": torch.tensor([r["input_ids"] + [0] * n for r, n in zip(rows, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - n) + [0] * n for n in pad]),
        "labels": torch.tensor([r["labels"] + [-100] * n for r, n in zip(rows, pad, strict=True)]),
    }
    batch = {name: t.to(own.device) for name, t in batch.items()}
    numbers = sum(t.numel() for t in weights)
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=HOW["weight_decay"])
    schedule = get_linear_schedule_with_warmup(optimizer, HOW["warmup_steps"], steps + 1)
    clock = StepClock(time.perf_counter)
    with PeakOver(own.device) as memory:
        for step in range(steps + 1):
            loss = own(**batch).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights, HOW["max_grad_norm"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            clock.on_step(step + 1, loss.detach()[None], norm[None], torch.ones(1, dtype=torch.bool))
    return Run.of(clock, numbers, memory)
