"""Token sequences and prefixes of the proof.

Shape letters: P prefix rows, H kv heads, D head dim, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.attention.plan import LayerKV
from prefixfast.model.dry_run import LayerShape

LONGEST_WINDOW = 512  # sliding windows up to here are computed with, longer ones are compared as numbers only
TEXT, SHORT, ROWS = 32, 4, (5, 3)  # tokens of the long and the short text, rows of the random prefixes
PREFIX = 22  # tokens of the long text that become a prefix
AFTER = (6, 5, 4)  # tokens after the random prefixes
NEW = 2  # tokens of each sequence that decode steps compute


@dataclass(frozen=True)
class Case:
    """One sequence.

    Attributes:
        name: Feature that the sequence shows, for messages.
        ids: Token ids ``[N]`` after the prefix.
        prefix: Number of its prefix, None without one.
    """

    name: str
    ids: Tensor
    prefix: int | None = None


@dataclass(frozen=True)
class RandomPrefix:
    """A random prefix.

    Attributes:
        rows: Number of rows P.
        pos_start: Position of the first token after it.
    """

    rows: int
    pos_start: int


@dataclass(frozen=True)
class Cases:
    """Sequences of the proof. Prefix 0 is the leading part of the first sequence, the others are random.

    Attributes:
        plain: Sequences without a prefix: the long text, and its first tokens.
        split: Number of tokens of the long text in prefix 0.
        after_text: The rest of the long text after prefix 0.
        random: Random prefixes.
        after_random: Sequence after each random prefix.
    """

    plain: tuple[Case, ...]
    split: int
    after_text: Case
    random: tuple[RandomPrefix, ...]
    after_random: tuple[Case, ...]

    @property
    def all(self) -> tuple[Case, ...]:
        """All sequences. The first is the long text alone."""
        return (*self.plain, self.after_text, *self.after_random)

    @property
    def prefixes(self) -> tuple[RandomPrefix, ...]:
        """Rows and pos_start of all prefixes, by number."""
        return (RandomPrefix(self.split, self.split), *self.random)


def make_cases(model: PreTrainedModel, windows: Sequence[int]) -> Cases:
    """Sequences that fit the positions of a model. One prefix is longer than every short window.

    Args:
        model: Model.
        windows: Sliding windows of the layers in tokens, 0 for none.
    """
    config = model.config.get_text_config()
    positions = int(getattr(config, "max_position_embeddings", None) or TEXT)
    g = torch.Generator().manual_seed(0)

    def tokens(n: int) -> Tensor:
        vocab = int(model.get_input_embeddings().weight.shape[0])
        ids = torch.randint(min(3, vocab - 1), vocab, (max(NEW + 1, min(n, positions)),), generator=g)
        if (padding := getattr(config, "pad_token_id", None)) is not None:  # some models hide padding by its id
            ids[ids == padding] = (padding + 1) % vocab
        return ids.to(model.device)

    text = tokens(TEXT)
    split = len(text) * PREFIX // TEXT
    random = [RandomPrefix(ROWS[0], ROWS[0]), RandomPrefix(ROWS[1], 0)]
    after = [Case("a prefix", tokens(AFTER[0]), 1), Case("tokens at position 0 after a prefix", tokens(AFTER[1]), 2)]
    if short := max((w for w in windows if w <= LONGEST_WINDOW), default=0):
        rows = max(1, min(short + SHORT, positions - AFTER[2]))
        random.append(RandomPrefix(rows, rows))
        after.append(Case("a prefix longer than the sliding window", tokens(AFTER[2]), 3))
    plain = Case("packed sequences", text), Case("packed sequences", text[:SHORT])
    return Cases(plain, split, Case("a prefix of a text", text[split:], 0), tuple(random), tuple(after))


def random_kv(prefix: RandomPrefix, like: Sequence[LayerKV], shapes: Sequence[LayerShape], seed: int) -> list[LayerKV]:
    """Random keys ``[P, H, D]`` and values by layer, as large as those of a text.

    Args:
        prefix: Prefix.
        like: Keys and values of a text by layer.
        shapes: Heads of every layer. A layer that reads the keys of another layer gets the tensors of that layer.
        seed: Seed.
    """
    g = torch.Generator().manual_seed(seed)

    def rows(t: Tensor) -> Tensor:
        made = torch.randn(prefix.rows, *t.shape[1:], generator=g).to(t.device, t.dtype)
        return made * t.float().pow(2).mean().sqrt().to(t.dtype)

    kv = [(rows(k), rows(v)) for k, v in like]
    return [kv[i if s.source is None else s.source] for i, s in enumerate(shapes)]
