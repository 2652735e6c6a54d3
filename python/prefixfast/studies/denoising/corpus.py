"""Texts that a base is pretrained on, and the windows of sentences that are drawn from them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

from prefixfast.errors import DataError

Text = tuple[str, ...]  # its sentences
# Files of a folder of official data, the field with the text and the share of the windows. Abstracts have the largest
# share, because the base is for summaries of them. Of DART, whose training file is large, the validation file is read.
FILES = (
    ("scitldr/scitldr_train.jsonl.gz", "document", 0.7),
    ("e2e/e2e_train.jsonl.gz", "ref", 0.1),
    ("dart/dart_dev.jsonl.gz", "refs", 0.1),
)
# Files whose documents share no long sentence with a text that is trained on. SciTLDR has versions of the same
# abstract in two of its parts.
HELD_OUT = ("scitldr/scitldr_dev.jsonl.gz", "scitldr/scitldr_test.jsonl.gz")
LONG = 60  # characters of a sentence that two unrelated abstracts do not share
OTHER_SHARE = 0.1  # of the windows, drawn from further texts
FROM_THE_START = 0.7  # share of the windows that begin with a text's first sentence


@dataclass(frozen=True)
class Source:
    """Texts of one origin.

    Attributes:
        share: Weight of the source when a window is drawn.
        texts: Texts, each as its sentences.
    """

    share: float
    texts: tuple[Text, ...]


def sentences(text: str) -> Text:
    """Sentences of a text, with single spaces."""
    return tuple(re.split(r"(?<=[.!?]) (?=\S)", " ".join(text.split())))


def source(share: float, texts: Iterable[str]) -> Source:
    """Source of the different texts that are not empty, in their order."""
    return Source(share, tuple(sentences(t) for t in dict.fromkeys(texts) if t.strip()))


def read_sources(data: Path | None, texts: Sequence[Path] = ()) -> list[Source]:
    """Sources of a folder of official data and of files with one text a line.

    Args:
        data: Folder with the `FILES`, None for none.
        texts: UTF-8 text files.

    Raises:
        DataError: If neither is given.
        OSError: If a file is missing.
    """
    held_out = held_out_sentences(data) if data else set()
    found = [source(share, unseen(read_field(data / name, field), held_out)) for name, field, share in FILES if data]
    if texts:
        found.append(source(OTHER_SHARE, (line for p in texts for line in p.read_text(encoding="utf8").splitlines())))
    if not found:
        msg = "denoising: expected --data, a folder, or --texts, files with one text a line, got neither"
        raise DataError(msg)
    return found


def held_out_sentences(data: Path) -> set[str]:
    """Long sentences of the `HELD_OUT` documents of a folder."""
    texts = (text for name in HELD_OUT for text in read_field(data / name, "document"))
    return {s for text in texts for s in sentences(text) if len(s) >= LONG}


def unseen(texts: Iterable[str], held_out: set[str]) -> list[str]:
    """The texts that contain none of the held-out sentences."""
    return [t for t in texts if held_out.isdisjoint(sentences(t))]


def read_field(path: Path, name: str) -> Iterator[str]:
    """Texts of a field in a file of JSON lines. A row may have a list of them."""
    with gzip.open(path, "rt", encoding="utf8") as lines:
        for line in lines:
            value = json.loads(line)[name]
            yield from [value] if isinstance(value, str) else value


class Corpus:
    """Windows of sentences, drawn by the shares of the sources.

    Attributes:
        sources: Sources.
    """

    def __init__(self, sources: Sequence[Source], count: Callable[[list[str]], list[int]]) -> None:
        """Count the tokens of all sentences.

        Args:
            sources: Sources.
            count: Function that returns the number of tokens of each sentence.
        """
        self.sources = sources
        self._shares = list(accumulate(s.share for s in sources))
        unique = list(dict.fromkeys(sentence for s in sources for text in s.texts for sentence in text))
        self._tokens = dict(zip(unique, count(unique), strict=True))

    def draw(self, rng: Random, tokens: int) -> Text:
        """Sentences of one source that together have at most ``tokens`` tokens, or one sentence that has more.

        A text that ends early is followed by another one of its source.

        Args:
            rng: Generator of random numbers.
            tokens: Number of tokens.
        """
        (chosen,) = rng.choices(self.sources, cum_weights=self._shares)
        text = rng.choice(chosen.texts)
        start = 0 if rng.random() < FROM_THE_START else rng.randrange(len(text))
        found: list[str] = []
        while True:
            for sentence in text[start:]:
                tokens -= self._tokens[sentence]
                if found and tokens < 0:
                    return tuple(found)
                found.append(sentence)
            text, start = rng.choice(chosen.texts), 0
