"""`Inspection`: the effect of a prefix on its base model, as numbers, tables and a plot.

Shape letters: L layers, HQ query heads, P prefix rows, n measured positions.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.data.builtin_tasks import PLAIN, request_task
from prefixfast.data.columns import has_own_columns, has_target
from prefixfast.data.encode import Input, encode_examples, encode_prompts
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, DataError, RequestError, shown
from prefixfast.io.figures import write_figure
from prefixfast.io.paths import as_path
from prefixfast.model.base import Model
from prefixfast.model.shared_base import borrowed
from prefixfast.prefix.attention_mass import measure_prompt
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.kv import kv_by_layer
from prefixfast.prefix.nearest_tokens import nearest_tokens
from prefixfast.prefix.record import PrefixData

logger = logging.getLogger(__name__)
DEFAULT_ROWS = 16  # number of rows whose nearest tokens are searched by default
TABLE_WIDTH = 100
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # stands in the text of a token that is only a part of a character


@dataclass(frozen=True, eq=False)
class Inspection:
    """Effect of a prefix on its base model over some prompts. ``print`` shows it as tables, `plot` as an image.

    Attributes:
        mass: Share of attention that goes to the prefix (0 to 1), shape ``[L, HQ]``, fp32, mean over all measured
            positions. NaN beyond the heads of a layer that has fewer than others.
        divergence: Divergence in nats of the next-token distribution at each measured position, one tensor ``[n]``,
            fp32, for each prompt. It is the Kullback-Leibler divergence KL(p || q), the sum over tokens of
            ``p * ln(p / q)``, of the distribution p with the prefix from the distribution q without it.
        words: Nearest vocabulary tokens by prefix row, as text and cosine, nearest first. Empty for a prefix that
            leaves layer 0 out. `prefixfast.prefix.nearest_tokens` defines the measure.
        length: Number of rows P.
    """

    mass: Tensor
    divergence: list[Tensor]
    words: dict[int, list[tuple[str, float]]]
    length: int

    def __str__(self) -> str:
        """Tables of mass, divergence and nearest tokens."""
        out = io.StringIO()
        console = Console(file=out, width=TABLE_WIDTH, color_system=None, highlight=False, emoji=False)
        all_kl = torch.cat(self.divergence)
        table = Table("layer", "mean", "least", "head", "most", "head", title="attention mass on the prefix, %")
        for layer, padded in enumerate(self.mass):
            row = padded[~padded.isnan()]
            mean, least, most = (f"{100 * x:.1f}" for x in (row.mean(), row.min(), row.max()))
            table.add_row(str(layer), mean, least, str(int(row.argmin())), most, str(int(row.argmax())))
        console.print(table)
        console.print(
            f"divergence from the base over {len(all_kl)} positions of {len(self.divergence)} prompts: "
            f"mean {all_kl.mean():.3f}, median {all_kl.median():.3f}, most {all_kl.max():.3f} nats"
        )
        if self.words:
            title = f"words of {len(self.words)} of {self.length} rows"
            near = Table("row", "nearest tokens (cosine of first-layer keys)", title=title)
            for row_number, found in self.words.items():
                near.add_row(str(row_number), ", ".join(f"{word!r} {cosine:.2f}" for word, cosine in found))
            console.print(near, markup=False)
        return out.getvalue()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw attention mass by layer and head, and a histogram of the divergences, to an image file.

        Args:
            path: Path of the image; its ending chooses the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ConfigError: If matplotlib is not installed, the ending is another one, or the path cannot be one of a file.
            OSError: If the file cannot be written.
        """
        target = as_path("path", path)
        if target.suffix.lower() not in (".png", ".svg", ".pdf"):
            msg = f"plot: expected a file ending in .png, .svg or .pdf, got {shown(str(path))}"
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
        write_figure(figure, target, dpi=150)


def inspect_prefix(
    model: str | Path | PreTrainedModel | Model,
    prefix: PrefixData,
    prompts: Sequence[Input],
    *,
    words: int,
    rows: Sequence[int] | None,
) -> Inspection:
    """Measure the effect of a prefix on its base model, for `Prefix.inspect`.

    Args:
        model: Base model, as `load` takes it.
        prefix: Prefix.
        prompts: Strings, token ids or rows, at least one.
        words: Number of nearest tokens for each row, 0 for none.
        rows: Numbers of the rows whose nearest tokens are searched; None is the first 16.

    Raises:
        BaseMismatchError: If the prefix was made for another base model.
        RequestError: If a prompt is wrong or too long, with its number.
        ConfigError: If another argument is wrong.
    """
    chosen = _check_rows(prefix, words, rows)
    given: Any = prompts
    is_one_prompt = isinstance(given, str | Mapping) or not isinstance(given, Sequence)
    if is_one_prompt or not given or type(given[0]) is int:
        msg = f"prompts: expected a sequence of at least one prompt, got {shown(prompts)}; wrap one prompt in a list"
        raise ConfigError(msg)
    with borrowed(model) as base:
        check_fits(base, prefix)
        examples = [_encode(base, prefix, prompt, i) for i, prompt in enumerate(prompts)]
        kv = [(k.to(base.device), v.to(base.device)) for k, v in kv_by_layer(prefix, base.layers)]
        measured = [measure_prompt(base, prefix, kv, ids, first) for ids, first in examples]
        count = sum(len(kl) for _, kl in measured)
        if words and not len(kv[0][0]):
            logger.warning(
                "inspect: no words, since they are found by the keys of layer 0, which the prefix leaves out"
            )
            words = 0
        near = nearest_tokens(base, prefix, chosen, words) if words else {}
        texts = {row: [(_token_text(base, token), cosine) for token, cosine in found] for row, found in near.items()}
        mass = torch.stack([mass for mass, _ in measured]).sum(0) / count
        return Inspection(mass, [kl for _, kl in measured], texts, prefix.length_at("self"))


def _check_rows(prefix: PrefixData, words: int, rows: Sequence[int] | None) -> list[int]:
    """Numbers of the rows whose nearest tokens are searched."""
    if type(words) is not int or words < 0:
        msg = f"words: expected a number of at least 0, got {shown(words)}"
        raise ConfigError(msg)
    given: Any = rows
    length = prefix.length_at("self")
    chosen = list(range(min(DEFAULT_ROWS, length))) if rows is None else given
    if not isinstance(chosen, Sequence) or not all(type(r) is int and 0 <= r < length for r in chosen):
        msg = f"rows: expected numbers from 0 to {length - 1}, got {shown(chosen)}"
        raise ConfigError(msg)
    return list(chosen)


def _encode(model: Model, prefix: PrefixData, prompt: Input, index: int) -> tuple[list[int], int]:
    """Token ids of a prompt, and the first measured position: the one before the target, 0 without a target.

    Without a target an infix is measured at the last token, the only one that sees it.
    """
    try:
        ids, first = _encode_unchecked(model, prefix, prompt)
        if prefix.position == "infix" and not first:
            first = len(ids) - 1
    except (DataError, ConfigError, RequestError) as e:
        msg = f"prompt {index}: {str(e).removeprefix('row 0: ').removeprefix('request 0: ')}"
        raise RequestError(msg, index=index) from e
    room = model.max_positions - prefix.pos_start
    if not 0 < len(ids) <= room or first < 0:
        expected = f"1 to {room} tokens (the base's positions less the prefix), the first of them none of the target"
        msg = f"prompt {index}: expected {expected}, got {len(ids)}"
        raise RequestError(msg, index=index)
    return ids, first


def _encode_unchecked(model: Model, prefix: PrefixData, prompt: Input) -> tuple[list[int], int]:
    """Token ids as in training: the prompt by the prefix's task, then the first target if the row has one."""
    if not isinstance(prompt, Mapping):
        return encode_prompts(model, [prompt], [PLAIN])[0].tolist(), 0
    task = PLAIN if prefix.task is None else Task.from_spec(prefix.task)
    if "input_ids" in prompt and not has_own_columns(task, prompt):
        return encode_prompts(model, [prompt], [PLAIN])[0].tolist(), 0
    task = request_task(task, prompt)
    if task.format == "text" or not has_target(task, prompt):
        return encode_prompts(model, [prompt], [task])[0].tolist(), 0
    last = replace(task, loss_on="last")
    example = next(encode_examples(model.require_tokenizer(), model.vocab_size, [prompt], last))
    return example.ids[:-1].tolist(), int(example.targets[0]) - 1


def _token_text(model: Model, token: int) -> str:
    """Text of a token; its name in the vocabulary if the token is only a part of a character."""
    if model.tokenizer is None:
        return f"#{token}"
    text = model.tokenizer.decode([[token]], skip_special_tokens=False)[0]
    return str(model.tokenizer.hf.convert_ids_to_tokens(token)) if REPLACEMENT in text else text
