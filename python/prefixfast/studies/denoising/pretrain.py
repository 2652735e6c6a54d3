"""Training of an encoder-decoder base from scratch, which a later call continues from its last checkpoint."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from prefixfast.errors import ConfigError
from prefixfast.io.atomic import replace_file
from prefixfast.io.json_lines import json_line
from prefixfast.studies.denoising.corpus import Corpus
from prefixfast.studies.denoising.noise import infill, shuffle

Pair = tuple[list[int], list[int]]  # token ids of the encoder and of the decoder, with their special tokens
CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
WINDOWS = (96, 192, 384)  # tokens of the windows of a batch, all of one size, so that few tokens are padding
SHUFFLED = 0.3  # share of the windows whose sentences are in random order
WARMUP, LOG_STEPS, IGNORED = 100, 50, -100


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a pretraining.

    Attributes:
        steps: Number of steps.
        minutes: Largest CPU time in minutes, over all calls, or None for no limit.
        rate: Largest learning rate of Muon, twice that of AdamW.
        tokens: Number of decoder tokens of a step.
        save_minutes: CPU time between two checkpoints in minutes.
    """

    steps: int
    minutes: float | None = None
    rate: float = 3e-3
    tokens: int = 2048
    save_minutes: float = 5.0

    def rate_at(self, step: int, seconds: float) -> float:
        """Learning rate: a rise of `WARMUP` steps, then a fall to zero as a cosine.

        Whichever of steps and time is nearer to its end decides, so that a slow machine does not end at a high rate.

        Args:
            step: Number of the step, from 0.
            seconds: CPU time of all steps before.
        """
        done = max(step / self.steps, seconds / 60 / self.minutes if self.minutes else 0.0)
        return self.rate * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))


def denoising_pairs(
    corpus: Corpus, tok: PreTrainedTokenizerFast, tokens: int, seed: int
) -> Callable[[int], list[Pair]]:
    """Function that returns the pairs of a step: a noisy text and the text. Seed and step determine them.

    Args:
        corpus: Texts.
        tok: Tokenizer.
        tokens: Number of tokens of a step.
        seed: Seed.
    """

    def pairs(step: int) -> list[Pair]:
        rng = Random(f"{seed} {step}")
        size = rng.choice(WINDOWS)
        texts = [corpus.draw(rng, size - 2) for _ in range(max(1, tokens // size))]
        noisy = [shuffle(rng, t) if rng.random() < SHUFFLED else t for t in texts]
        sources, targets = (
            tok([" ".join(t) for t in group], add_special_tokens=False).input_ids for group in (noisy, texts)
        )
        return [
            (_wrapped(tok, infill(rng, source[: size - 2], tok.mask_token_id)), _wrapped(tok, target[: size - 2]))
            for source, target in zip(sources, targets, strict=True)
        ]

    return pairs


def _wrapped(tok: PreTrainedTokenizerFast, ids: list[int]) -> list[int]:
    return [tok.bos_token_id, *ids, tok.eos_token_id]


@dataclass
class Pretraining:
    """State of a pretraining.

    Attributes:
        model: Model, which is trained in place.
        pairs: Function that returns the pairs of a step.
        schedule: Length and learning rate.
        folder: Folder for checkpoints and the log.
        step: Number of finished steps.
        seconds: CPU time of the finished steps.
    """

    model: Any
    pairs: Callable[[int], list[Pair]]
    schedule: Schedule
    folder: Path
    step: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and ".layers." in n]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=0.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def resume(self) -> None:
        """Continue from the folder's checkpoint.

        Raises:
            ConfigError: If there is none.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            msg = f"--resume: expected a checkpoint, {path}, which does not exist; start without --resume"
            raise ConfigError(msg)
        state = torch.load(path, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, values in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)

    def save(self) -> None:
        """Write a checkpoint in place of the last one."""
        buffer = io.BytesIO()
        state = {"step": self.step, "seconds": self.seconds, "model": self.model.state_dict()}
        torch.save({**state, "optimizers": [o.state_dict() for o in self._optimizers]}, buffer)
        replace_file(self.folder / CHECKPOINT, buffer.getvalue())

    def run(self, until: int | None = None) -> None:
        """Train to the end of the schedule or to a step, with checkpoints on the way and at the end.

        Args:
            until: Number of steps at which this call ends, None for the end of the schedule.
        """
        self.model.train()
        last = min(self.schedule.steps, until if until is not None else self.schedule.steps)
        before, saved, recent = time.process_time() - self.seconds, self.seconds, torch.zeros(2)
        while self.step < last and not self._is_over():
            recent += torch.tensor(self._train_step())
            self.step += 1
            self.seconds = time.process_time() - before
            if self.step % LOG_STEPS == 0:
                self._report(float(recent[0] / recent[1]))
                recent = torch.zeros(2)
            if self.seconds - saved >= 60 * self.schedule.save_minutes:
                self.save()
                saved = self.seconds
        self.save()

    def _is_over(self) -> bool:
        return self.schedule.minutes is not None and self.seconds >= 60 * self.schedule.minutes

    def _train_step(self) -> tuple[float, int]:
        """Loss in nats, summed over the tokens, and number of the tokens."""
        rate = self.schedule.rate_at(self.step, self.seconds)
        inputs = padded(self.pairs(self.step), self.model.config.pad_token_id)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.model(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, share in zip(self._optimizers, (1.0, 0.5), strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        count = int((inputs["labels"] != IGNORED).sum())
        return loss.item() * count, count

    def _report(self, loss: float) -> None:
        line = {"step": self.step, "loss": round(loss, 4), "cpu_seconds": round(self.seconds, 1)}
        with (self.folder / LOG).open("ab") as f:
            f.write(json_line(line))
        print(f"step {self.step} loss {loss:.4f} {self.seconds:.0f} s of CPU time", flush=True)


def padded(pairs: Sequence[Pair], pad: int) -> dict[str, torch.Tensor]:
    """Arguments of a forward of the base, with padding on the right."""
    sources, labels = ([torch.tensor(p[i]) for p in pairs] for i in (0, 1))
    masks = [torch.ones_like(source) for source in sources]
    return {
        "input_ids": pad_sequence(sources, batch_first=True, padding_value=pad),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
