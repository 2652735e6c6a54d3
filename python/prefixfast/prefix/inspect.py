"""`Inspection`: the effect of a prefix on its base model, as numbers, tables and a plot.

Shape letters: L layers, HQ query heads, P prefix rows, n measured positions.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.config.sites import SITE_NAMES, BySite, Site
from prefixfast.data.encode import Input
from prefixfast.errors import ConfigError, shown
from prefixfast.io.figures import write_figure
from prefixfast.io.paths import as_path
from prefixfast.model.base import Model
from prefixfast.model.prefix_shape import filled_layers
from prefixfast.model.shared_base import borrowed
from prefixfast.prefix.attention_mass import measure_prompt
from prefixfast.prefix.compatibility import check_fits
from prefixfast.prefix.inspected_text import inspected_text
from prefixfast.prefix.nearest_tokens import nearest_tokens
from prefixfast.prefix.record import PrefixData

logger = logging.getLogger(__name__)
Words: TypeAlias = dict[int, list[tuple[str, float]]]
DEFAULT_ROWS = 16  # number of rows whose nearest tokens are searched by default
TABLE_WIDTH = 100
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # stands in the text of a token that is only a part of a character


@dataclass(frozen=True, eq=False)
class SiteInspection:
    """Effect of the rows of a prefix at one site.

    Attributes:
        mass: Share of attention that goes to the prefix (0 to 1), shape ``[L, HQ]``, fp32, mean over all measured
            positions, which are all tokens of the encoder for ``enc``. NaN beyond the heads of a layer that has fewer
            than others.
        words: Nearest vocabulary tokens by prefix row, as text and cosine, nearest first. Empty for a prefix that
            leaves layer 0 out, and for ``cross``, whose rows are no token's keys. `prefixfast.prefix.nearest_tokens`
            defines the measure.
    """

    mass: Tensor
    words: Words


@dataclass(frozen=True, eq=False)
class Inspection:
    """Effect of a prefix on its base model over some prompts. ``print`` shows it as tables, `plot` as an image.

    Attributes:
        sites: Attention mass and nearest words for each site of the prefix. A decoder-only base has the site ``self``.
        divergence: Divergence in nats of the next-token distribution at each measured position, one tensor ``[n]``,
            fp32, for each prompt. It is the Kullback-Leibler divergence KL(p || q), the sum over tokens of
            ``p * ln(p / q)``, of the distribution p with the prefix from the distribution q without it.
        length: Number of rows P, by site if the sites differ.
    """

    sites: BySite[SiteInspection]
    divergence: list[Tensor]
    length: int | BySite[int]

    @property
    def mass(self) -> Tensor:
        """Attention mass of the decoder's self-attention.

        Raises:
            ConfigError: If the prefix has no rows there.
        """
        return self._decoder().mass

    @property
    def words(self) -> Words:
        """Nearest words of the rows of the decoder's self-attention.

        Raises:
            ConfigError: If the prefix has no rows there.
        """
        return self._decoder().words

    def _decoder(self) -> SiteInspection:
        if "self" in self.sites:
            return self.sites["self"]
        first = next(iter(self.sites))
        msg = f"this prefix has no rows of the site 'self', but of {', '.join(self.sites)}; read sites[{first!r}]"
        raise ConfigError(msg)

    def __str__(self) -> str:
        """Tables of mass, divergence and nearest tokens."""
        out = io.StringIO()
        console = Console(file=out, width=TABLE_WIDTH, color_system=None, highlight=False, emoji=False)
        all_kl = torch.cat(self.divergence)
        for site, found in self.sites.items():
            title = f"attention mass{self._where(site)} on the prefix, %"
            table = Table("layer", "mean", "least", "head", "most", "head", title=title)
            for layer, padded in enumerate(found.mass):
                row = padded[~padded.isnan()]
                mean, least, most = (f"{100 * x:.1f}" for x in (row.mean(), row.min(), row.max()))
                table.add_row(str(layer), mean, least, str(int(row.argmin())), most, str(int(row.argmax())))
            console.print(table)
        console.print(
            f"divergence from the base over {len(all_kl)} positions of {len(self.divergence)} prompts: "
            f"mean {all_kl.mean():.3f}, median {all_kl.median():.3f}, most {all_kl.max():.3f} nats"
        )
        for site, found in self.sites.items():
            if found.words:
                rows = self.length[site] if isinstance(self.length, BySite) else self.length
                title = f"words of {len(found.words)} of {rows} rows{self._where(site)}"
                near = Table("row", "nearest tokens (cosine of first-layer keys)", title=title)
                for row_number, words in found.words.items():
                    near.add_row(str(row_number), ", ".join(f"{word!r} {cosine:.2f}" for word, cosine in words))
                console.print(near, markup=False)
        if "cross" in self.sites and any(found.words for found in self.sites.values()):
            console.print("rows of cross-attention have no words, since they are no token's keys")
        return out.getvalue()

    def _where(self, site: Site) -> str:
        """Name of a site after a noun, empty if self-attention of the decoder is the only one."""
        return "" if list(self.sites) == ["self"] else f" of {SITE_NAMES[site]}"

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
        figure = Figure(figsize=(4.5 * (1 + len(self.sites)), 4), layout="constrained")
        *left, right = figure.subplots(1, 1 + len(self.sites))
        for axes, (site, found) in zip(left, self.sites.items(), strict=True):
            image = axes.imshow(found.mass.numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis")
            axes.set(xlabel="head", ylabel="layer", title=f"attention mass{self._where(site)}\non the prefix")
            figure.colorbar(image, ax=axes)
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
        texts = [inspected_text(base, prefix, prompt, i) for i, prompt in enumerate(prompts)]
        measured = [measure_prompt(base, prefix, text) for text in texts]
        sites: dict[Site, SiteInspection] = {}
        for site in prefix.sites:
            mass = torch.stack([one.mass[site] for one in measured]).sum(0) / sum(one.counts[site] for one in measured)
            near = {} if site == "cross" else _words(base, prefix, chosen, words, site)
            sites[site] = SiteInspection(mass, near)
        return Inspection(BySite(sites), [one.divergence for one in measured], prefix.length)


def _words(model: Model, prefix: PrefixData, rows: Sequence[int], count: int, site: Site) -> Words:
    """Texts and cosines of the nearest tokens of rows of one site."""
    if count and 0 not in filled_layers(prefix, model.sites[site], site):
        logger.warning("inspect: no words, since they are found by the keys of layer 0, which the prefix leaves out")
        return {}
    here = [row for row in rows if row < prefix.length_at(site)]
    near = nearest_tokens(model, prefix, here, count, site) if count else {}
    return {row: [(_token_text(model, token), cosine) for token, cosine in found] for row, found in near.items()}


def _check_rows(prefix: PrefixData, words: int, rows: Sequence[int] | None) -> list[int]:
    """Numbers of the rows whose nearest tokens are searched."""
    if type(words) is not int or words < 0:
        msg = f"words: expected a number of at least 0, got {shown(words)}"
        raise ConfigError(msg)
    given: Any = rows
    length = max(prefix.length_at("enc"), prefix.length_at("self"))
    chosen = list(range(min(DEFAULT_ROWS, length))) if rows is None else given
    if not isinstance(chosen, Sequence) or not all(type(r) is int and 0 <= r < length for r in chosen):
        msg = f"rows: expected numbers from 0 to {length - 1}, got {shown(chosen)}"
        raise ConfigError(msg)
    return list(chosen)


def _token_text(model: Model, token: int) -> str:
    """Text of a token; its name in the vocabulary if the token is only a part of a character."""
    if model.tokenizer is None:
        return f"#{token}"
    text = model.tokenizer.decode([[token]], skip_special_tokens=False)[0]
    return str(model.tokenizer.hf.convert_ids_to_tokens(token)) if REPLACEMENT in text else text
