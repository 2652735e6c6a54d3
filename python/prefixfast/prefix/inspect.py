"""What a prefix does to its base: attention mass, divergence, nearest words; as numbers, a table and a plot.

Shape letters: L layers, HQ query heads, H kv heads, D head dim, P prefix rows, N tokens of a prompt, n positions that count, V vocabulary.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prefixfast.attention import ops
from prefixfast.attention.plan import AttentionCall, LayerKV, Plan, plain_plan, training_plan
from prefixfast.data.encode import encode_examples, encode_prompts
from prefixfast.data.formats import TARGET_KEYS
from prefixfast.data.tasks import PLAIN, Task, request_task
from prefixfast.errors import ConfigError, DataError, RequestError
from prefixfast.io.atomic import replace_file
from prefixfast.model.base import Model
from prefixfast.model.shared_base import borrowed
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.kv import kv_by_layer, row_table
from prefixfast.prefix.nearest_tokens import nearest_tokens
from prefixfast.prefix.record import PrefixData

logger = logging.getLogger(__name__)
ROWS = 16  # rows whose words are looked up if nobody says
CHUNK = 256  # positions whose distributions are compared at once
WIDTH = 100
BROKEN = "\N{REPLACEMENT CHARACTER}"  # a token that is a part of a character is shown by its name in the vocabulary


@dataclass(frozen=True, eq=False)
class Inspection:
    """What a prefix does to its base on some prompts. ``print`` shows it as a table.

    Attributes:
        mass: ``[L, HQ]`` fp32: share of attention that goes to the prefix (0 to 1), mean over all positions that count.
        divergence: For each prompt ``[n]`` fp32: Kullback-Leibler divergence, in nats, of the distribution of the next token with the prefix from the one of
            the base alone, at each position that counts: sum over tokens of p ln(p / q), p with and q without the prefix.
        words: By prefix row: the nearest vocabulary tokens as text (their cosine), nearest first; see `prefixfast.prefix.nearest_tokens` for the measure.
            Empty for a prefix that leaves layer 0 out.
        length: P.
    """

    mass: Tensor
    divergence: list[Tensor]
    words: dict[int, list[tuple[str, float]]]
    length: int

    def __str__(self) -> str:
        """Tables for people."""
        out = io.StringIO()
        console = Console(file=out, width=WIDTH, color_system=None, highlight=False, emoji=False)
        all_kl = torch.cat(self.divergence)
        table = Table("layer", "mean", "least", "head", "most", "head", title="attention mass on the prefix, %")
        for layer, row in enumerate(self.mass):
            mean, least, most = (f"{100 * x:.1f}" for x in (row.mean(), row.min(), row.max()))
            table.add_row(str(layer), mean, least, str(int(row.argmin())), most, str(int(row.argmax())))
        console.print(table)
        console.print(
            f"divergence from the base over {len(all_kl)} positions of {len(self.divergence)} prompts: "
            f"mean {all_kl.mean():.3f}, median {all_kl.median():.3f}, most {all_kl.max():.3f} nats"
        )
        if self.words:
            near = Table(
                "row",
                "nearest tokens (cosine of first-layer keys)",
                title=f"words of {len(self.words)} of {self.length} rows",
            )
            for row_number, found in self.words.items():
                near.add_row(str(row_number), ", ".join(f"{word!r} {cosine:.2f}" for word, cosine in found))
            console.print(near, markup=False)
        return out.getvalue()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw mass by layer and head, and the divergences, to an image file.

        Args:
            path: Where; the ending chooses the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ConfigError: Without matplotlib, or for another ending.
        """
        target = Path(path)
        if (kind := target.suffix.lower()) not in (".png", ".svg", ".pdf"):
            msg = f"plot: expected a file ending in .png, .svg or .pdf, got {str(path)!r}"
            raise ConfigError(msg)
        try:
            from matplotlib.figure import Figure
        except ImportError as e:
            msg = "plot needs matplotlib: pip install 'prefixfast[train]'"
            raise ConfigError(msg) from e
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        image = left.imshow(self.mass.numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis")
        left.set(xlabel="head", ylabel="layer", title="attention mass on the prefix")
        figure.colorbar(image, ax=left)
        right.hist(torch.cat(self.divergence).numpy(), bins=30)
        right.set(xlabel="divergence from the base (nats)", ylabel="positions", title="next-token distributions")
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind[1:], dpi=150)
        replace_file(target, drawn.getvalue())


def inspect(
    model: Any, prefix: PrefixData, prompts: Sequence[Any], *, words: int, rows: Sequence[int] | None
) -> Inspection:
    """See `Prefix.inspect`, which has the arguments and errors."""
    chosen = _rows(prefix, words, rows)
    if (
        isinstance(prompts, str | Mapping)
        or not isinstance(prompts, Sequence)
        or not prompts
        or type(prompts[0]) is int
    ):
        msg = f"prompts: expected a sequence of at least one prompt, got {prompts!r:.80}; wrap one prompt in a list"
        raise ConfigError(msg)
    with borrowed(model) as base:
        check_fits(base, prefix)
        examples = [_example(base, prefix, prompt, i) for i, prompt in enumerate(prompts)]
        kv = [(k.to(base.device), v.to(base.device)) for k, v in kv_by_layer(prefix, base.layers)]
        seen = [_look(base, prefix, kv, *example) for example in examples]
        count = sum(len(kl) for _, kl in seen)
        if words and 0 not in prefix.layers:
            logger.warning(
                "inspect: no words, since they are found by the keys of layer 0, which the prefix leaves out"
            )
            words = 0
        near = nearest_tokens(base, prefix, chosen, words) if words else {}
        texts = {row: [(_text(base, token), cosine) for token, cosine in found] for row, found in near.items()}
        return Inspection(
            torch.stack([mass for mass, _ in seen]).sum(0) / count, [kl for _, kl in seen], texts, prefix.length
        )


@torch.no_grad()
def _look(model: Model, prefix: PrefixData, kv: list[LayerKV], ids: list[int], first: int) -> tuple[Tensor, Tensor]:
    """Sum of the masses ``[L, HQ]`` over positions ``first`` to the end of one prompt, and divergences ``[n]`` there."""
    tokens = torch.tensor(ids, device=model.device)
    at = torch.arange(first, len(ids), device=model.device)
    rows = row_table([prefix], len(model.layers))
    one, zero = np.array([0, 1], np.int32), np.zeros(1, np.int32)
    plan = training_plan(
        np.array([len(ids)], np.int32), one, zero, rows, kv, backend=model.backend, device=model.device
    ).with_logits_at(at)
    masses: dict[int, Tensor] = {}

    def probe(call: AttentionCall) -> None:
        masses[call.layer] = prefix_mass(plan, call)[first:].sum(0)

    alone = plain_plan([len(ids)], backend=model.backend, device=model.device).with_logits_at(at)
    p, q = model.forward(replace(plan, probe=probe), tokens), model.forward(alone, tokens)
    divergence = torch.cat([_divergence(a, b) for a, b in zip(p.split(CHUNK), q.split(CHUNK), strict=True)])
    return torch.stack([masses[i] for i in range(len(masses))]).float().cpu(), divergence.float().cpu()


def prefix_mass(plan: Plan, call: AttentionCall) -> Tensor:
    """Share of each query's attention that goes to its prefix blocks ``[N, HQ]``, from log-sum-exps: exp(lse of the prefix - lse of all)."""
    assert plan.packed is not None
    assert plan.prefix is not None
    if not len(plan.prefix[call.layer][0]):  # the prefix leaves this layer out
        return torch.zeros_like(call.lse)
    packed = plan.packed[plan.view(call.layer)]
    seg = packed.seg.clone()
    seg[:, 3] = 0  # no keys of their own: what is left are the prefix rows
    tables = list(packed._replace(seg=seg))
    options = (call.scale, call.window, call.softcap, True, False, "reference", list(plan.backend.sizes))
    _, lse = ops.attn(call.q, call.k, call.k, *plan.prefix[call.layer], tables, None, None, *options)
    return (lse - call.lse).exp()


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats of logits ``[n, V]``, at least fp32."""
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    log_p, log_q = (t.to(dtype).log_softmax(-1) for t in (p, q))
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0)  # rounding can put equal ones below zero


def _rows(prefix: PrefixData, words: int, rows: Sequence[int] | None) -> list[int]:
    if type(words) is not int or words < 0:
        msg = f"words: expected a number of at least 0, got {words!r}"
        raise ConfigError(msg)
    chosen = list(range(min(ROWS, prefix.length))) if rows is None else list(rows)
    if not all(type(r) is int and 0 <= r < prefix.length for r in chosen):
        msg = f"rows: expected numbers from 0 to {prefix.length - 1}, got {chosen!r:.80}"
        raise ConfigError(msg)
    return chosen


def _example(model: Model, prefix: PrefixData, prompt: Any, index: int) -> tuple[list[int], int]:
    """Tokens of a prompt and the first position that counts: the one before the target, 0 without one."""
    try:
        ids, first = _tokens(model, prefix, prompt)
    except (DataError, ConfigError, RequestError) as e:
        msg = f"prompt {index}: {str(e).removeprefix('row 0: ').removeprefix('request 0: ')}"
        raise RequestError(msg, index=index) from e
    room = model.max_positions - prefix.pos_start
    if not 0 < len(ids) <= room or first < 0:
        msg = f"prompt {index}: expected 1 to {room} tokens (the base's positions less the prefix), the first of them none of the target, got {len(ids)}"
        raise RequestError(msg, index=index)
    return ids, first


def _tokens(model: Model, prefix: PrefixData, prompt: Any) -> tuple[list[int], int]:
    """Tokens as in training: the prompt by the prefix's task, then the first target, if the row has one."""
    is_row = isinstance(prompt, Mapping) and "input_ids" not in prompt
    task = request_task(PLAIN if prefix.task is None else Task.from_spec(prefix.task), prompt) if is_row else PLAIN
    if not is_row or task.format == "text" or not (set(prompt) & set(TARGET_KEYS)):
        return encode_prompts(model, [prompt], [task])[0].tolist(), 0
    last = replace(task, loss_on="last")
    example = next(encode_examples(model.require_tokenizer(), model.vocab_size, [prompt], last))
    return example.ids[:-1].tolist(), int(example.targets[0]) - 1


def _text(model: Model, token: int) -> str:
    if model.tokenizer is None:
        return f"#{token}"
    text = model.tokenizer.decode([[token]], skip_special_tokens=False)[0]
    return str(model.tokenizer.hf.convert_ids_to_tokens(token)) if BROKEN in text else text
