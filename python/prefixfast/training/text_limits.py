"""Limits of the texts of encoder-decoder base models: source and target are cut separately."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prefixfast.config import TrainConfig
from prefixfast.data.encode import DecoderTokens, Example, decoder_of, kept, labelled_example
from prefixfast.data.encode.tokenized import IGNORED_LABEL
from prefixfast.errors import ConfigError

if TYPE_CHECKING:
    from prefixfast.model.base import Model

SEQ2SEQ_LIMITS = ("max_source_length", "max_target_length")
LIMITS = {"decoder-only": ("max_length",), "encoder-decoder": SEQ2SEQ_LIMITS}  # options by kind of base model


@dataclass(frozen=True)
class TextLimits:
    """Largest numbers of tokens of the texts of an example.

    Attributes:
        source: Largest number of tokens of the source.
        target: Largest number of labels.
        source_advice: Option that raises ``source``, for the error of a longer text; None if no option does.
        target_advice: Option that raises ``target``, likewise.
    """

    source: int
    target: int
    source_advice: str | None
    target_advice: str | None

    def too_long(self, example: Example) -> str | None:
        """Error message for an example that does not fit, None for one that does."""
        assert example.encoder_ids is not None
        sides = (
            ("the source", len(example.encoder_ids), self.source, self.source_advice),
            ("the target", len(example.ids) - 1, self.target, self.target_advice),
        )
        for what, count, limit, advice in sides:
            if count > limit:
                choices = ", ".join(("shorten it", *(() if advice is None else (advice,))))
                expected = f"{what} has {count} tokens, at most {limit} fit"
                return f"{expected}; {choices}, or set overflow='truncate' or 'skip'"
        return None

    def cut(self, example: Example, decoder: DecoderTokens, special: frozenset[int]) -> Example | None:
        """Cut the end of both texts, before the special tokens that close them.

        Args:
            example: Example.
            decoder: Tokens of the decoder.
            special: Ids of the special tokens.

        Returns:
            The example itself if it fits, the example with shorter texts, or None if no target is left.
        """
        assert example.encoder_ids is not None
        source = example.encoder_ids[kept(example.encoder_ids, self.source, special)]
        labels = np.full(len(example.ids) - 1, IGNORED_LABEL, np.int64)
        labels[example.targets - 1] = example.ids[example.targets]
        labels = labels[kept(labels, self.target, special)]
        if len(source) == len(example.encoder_ids) and len(labels) == len(example.ids) - 1:
            return example
        if not (labels != IGNORED_LABEL).any():
            return None
        return labelled_example(decoder, source, labels, example.row)


def text_limits(model: Model, config: TrainConfig, room: int, shorten: str | None) -> TextLimits | None:
    """Limits of an encoder-decoder base model, None for a decoder-only one.

    Args:
        model: Base model.
        config: Options of training.
        room: Number of positions of the decoder behind the prefix.
        shorten: Advice that makes the prefix take fewer positions, None if no option does.
    """
    if (decoder := decoder_of(model)) is None:
        return None
    source, target = config.max_source_length, config.max_target_length
    is_own_source = source is not None and source <= decoder.encoder_positions
    is_own_target = target is not None and target <= room
    return TextLimits(
        min(source or decoder.encoder_positions, decoder.encoder_positions),
        min(target or room, room),
        "raise max_source_length" if is_own_source else None,
        "raise max_target_length" if is_own_target else shorten,
    )


def check_lengths(model: Model, config: TrainConfig, explicit: Collection[str]) -> None:
    """Check that limits of lengths are those of the kind of the base model.

    Args:
        model: Base model.
        config: Options of training.
        explicit: Names of the options that the caller gave.

    Raises:
        ConfigError: If the caller gave a limit of the other kind.
    """
    kind, other = (
        ("decoder-only", "encoder-decoder") if decoder_of(model) is None else ("encoder-decoder", "decoder-only")
    )
    for name in LIMITS[other]:
        if name in explicit and getattr(config, name) is not None:
            msg = f"{name}: this base is {kind}; give {' and '.join(LIMITS[kind])} in its place"
            raise ConfigError(msg)
