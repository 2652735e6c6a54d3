"""Contenders of the suite ``seq2seq``: prefixfast, and PEFT's prefix-tuning, which has decoder prefixes alone."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from prefixfast.bench.seq2seq_inputs import Rows, Workload, table_pair
from prefixfast.bench.step_clock import StepClock
from prefixfast.bench.train_contenders import HOW, RATE
from prefixfast.engine.engine import Engine
from prefixfast.model.base import Model
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.trainer import train

IGNORED = -100


class Seconds(NamedTuple):
    """Wall seconds, and CPU seconds of the process, which other programs on the machine change less."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Seconds:
        """The clocks."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Seconds) -> Seconds:
        """Seconds from another reading of the clocks to this one."""
        return Seconds(self.wall - start.wall, self.cpu - start.cpu)


class Texts(NamedTuple):
    """Tokens of each text without the start token, and the seconds that they took."""

    tokens: list[list[int]]
    seconds: Seconds


class Losses(NamedTuple):
    """Loss of each training step, and the seconds of the steps after the first, which warms up."""

    values: list[float]
    seconds: Seconds

    @classmethod
    def of(cls, clock: StepClock[Seconds]) -> Losses:
        """The run that a clock recorded."""
        return cls(clock.losses, clock.times[-1].since(clock.times[0]))


def generate(engine: Engine, sources: list[list[int]], prefixes: Sequence[Prefix], work: Workload) -> Texts:
    """Texts of one mixed batch of an engine."""
    rows = [{"input_ids": ids} for ids in sources]
    start = Seconds.now()
    how: dict[str, Any] = {"num_beams": work.beams, "max_new_tokens": work.new, "min_new_tokens": work.new}
    found = engine.generate(rows, list(prefixes), progress=False, length_penalty=1.0, **how)
    return Texts([g.token_ids for g in found], Seconds.now().since(start))


def peft_model(plain: PreTrainedModel, prefix: Prefix, pairs: int = 1) -> tuple[Any, Tensor]:
    """Copy of a base inside PEFT's prefix-tuning, and PEFT's table, which holds the decoder rows of ``prefix``.

    In PEFT's default configuration for such models, layer l reads the pair of keys and values with the number that
    `table_pair` gives. With ``num_transformer_submodules=1`` PEFT 0.21.2 mixes keys of cross-attention into the cache
    of self-attention.

    Args:
        plain: Base of transformers.
        prefix: Prefix.
        pairs: Pairs of the table for each layer. With 1, PEFT's default, half of the layers share their pair with
            another one. With 2 each layer has its own, and every other pair is not read.
    """
    from peft import PrefixTuningConfig, get_peft_model

    length, num_layers = prefix.length_at("self"), pairs * len(prefix.layers)
    config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=length, num_layers=num_layers)
    own: Any = get_peft_model(copy.deepcopy(plain), config).eval()
    weight = own.prompt_encoder["default"].embedding.weight
    table = torch.zeros(length, num_layers, 2, *prefix.kv["self.0.k"].shape[1:])
    for i in prefix.layers:
        for j, x in enumerate("kv"):
            table[:, table_pair(i, num_layers), j] = prefix.kv[f"self.{i}.{x}"]
    weight.data = table.flatten(1).to(weight.dtype)
    return own, weight


def peft_generate(own: Any, sources: list[list[int]], work: Workload) -> Texts:
    """Texts of PEFT's ``generate``, one request after another."""
    base = own.get_base_model()
    base.generation_config = GenerationConfig(
        num_beams=work.beams,
        min_new_tokens=work.new,
        max_new_tokens=work.new,
        length_penalty=1.0,
        do_sample=False,
        use_cache=True,
        decoder_start_token_id=base.config.decoder_start_token_id,
        eos_token_id=base.config.eos_token_id,
        pad_token_id=base.config.pad_token_id,
    )
    tokens, start = [], Seconds.now()
    with torch.inference_mode():
        for source in sources:
            ids = torch.tensor([source])
            out = own.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
            tokens.append(out[0, 1:].tolist())
    return Texts(tokens, Seconds.now().since(start))


def train_ours(model: Model, rows: Rows, start: Prefix, steps: int) -> Losses:
    """Train one prefix with `prefixfast.train`."""
    clock = StepClock(Seconds.now)
    how: dict[str, Any] = {**HOW, "batch_size": len(rows), "max_steps": steps + 1, "callbacks": [clock]}
    train(model, {"own": rows}, init={"own": start}, on_error="raise", progress=False, **how)
    return Losses.of(clock)


def train_peft(plain: PreTrainedModel, rows: Rows, start: Prefix, steps: int) -> Losses:
    """Train one prefix with PEFT in the usual loop: a padded batch, AdamW, clipping and a linear schedule."""
    from transformers import get_linear_schedule_with_warmup

    own, weight = peft_model(plain, start, pairs=2)
    own.get_base_model().config.use_cache = False
    batch = {
        "input_ids": _padded([r["input_ids"] for r in rows], plain.config.pad_token_id),
        "attention_mask": _padded([[1] * len(r["input_ids"]) for r in rows], 0),
        "labels": _padded([r["labels"] for r in rows], IGNORED),
    }
    optimizer = torch.optim.AdamW([weight], lr=RATE, weight_decay=HOW["weight_decay"])
    schedule = get_linear_schedule_with_warmup(optimizer, HOW["warmup_steps"], steps + 1)
    clock = StepClock(Seconds.now)
    for step in range(steps + 1):
        loss = own(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([weight], HOW["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        clock.on_step(step + 1, loss.detach()[None], norm[None], torch.ones(1, dtype=torch.bool))
    return Losses.of(clock)


def _padded(rows: Sequence[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([r + [value] * (width - len(r)) for r in rows])


@torch.inference_mode()
def score(plain: PreTrainedModel, source: Sequence[int], prefix: Prefix, tokens: Sequence[int]) -> float:
    """Log-probability of a text by PEFT with a prefix, in the dtype of ``plain``, summed over its tokens."""
    own, _ = peft_model(plain, prefix)
    ids, labels = torch.tensor([list(source)]), torch.tensor([list(tokens)])
    logits = own(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).logits[0]
    found: Tensor = logits.double().log_softmax(-1).gather(-1, labels[0][:, None])
    return float(found.sum())
