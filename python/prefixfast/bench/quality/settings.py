"""Settings of the quality suite that all implementations share: rows, their order, strings, schedule and evaluation."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefixfast.bench.e2e_rows import Row, read_split, slots

MakeRow = Callable[[Row], Row]
KEYS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
PREFIX_LENGTH = 10
ENCODER_HIDDEN_SIZE = 512
MAX_NEW_TOKENS = 60


def plain_row(tokenizer: Any) -> MakeRow:
    """Function from a row of E2E to prompt and completion: ``name : X | area : Y``, a line break, the reference."""
    return lambda r: {"prompt": " | ".join(f"{k} : {v}" for k, v in slots(r["mr"])) + "\n", "completion": r["ref"]}


def authors_row(tokenizer: Any) -> MakeRow:
    """Function from a row of E2E to the strings of Li & Liang: `` {source} {bos}`` and `` {reference} ``.

    The trainer adds the end token after the reference.
    """

    def price(value: str) -> str:
        return re.sub(r"£(\d+)-(\d+)", r"£ \1 - \2", value).replace("£", "£ ").replace("£  ", "£ ")

    def row(r: Row) -> Row:
        source = " | ".join(f"{KEYS.get(k, k)} : {price(v)}" for k, v in slots(r["mr"]))
        return {"prompt": f" {source} {tokenizer.eos_token}", "completion": f" {r['ref']} "}

    return row


@dataclass(frozen=True)
class Setting:
    """One training run and its evaluation.

    Attributes:
        reparameterization: ``none`` or ``mlp``.
        learning_rate: Peak learning rate.
        steps: Number of training steps.
        batch_size: Rows of each step.
        row: Function from a tokenizer to the function that makes prompt and completion of a row.
        num_beams: Beams of the evaluation.
        num_tables: Number of dev tables of the evaluation.
        warmup_steps: Steps in which the learning rate rises.
        init_text: Text whose keys and values the prefix starts from, without a reparameterization.
    """

    reparameterization: Literal["none", "mlp"]
    learning_rate: float
    steps: int
    batch_size: int
    row: Callable[[Any], MakeRow]
    num_beams: int = 1
    num_tables: int = 100
    warmup_steps: int = 20
    init_text: str = "summarize the following table in a sentence :"

    def batches(self, data: Path) -> list[list[Row]]:
        """Training batches in order.

        The rows are shuffled once, and sorted by length within groups of four batches, which saves PEFT padding.
        """
        rows, b = read_split(data, "train"), self.batch_size
        random.Random(0).shuffle(rows)
        out: list[list[Row]] = []
        for i in range(self.steps // 4 + 1):
            group = sorted(rows[i * 4 * b : (i + 1) * 4 * b], key=lambda r: len(r["ref"]) + len(r["mr"]))
            parts = [group[j * b : (j + 1) * b] for j in range(4)]
            random.Random(len(out)).shuffle(parts)
            out += parts
        return out[: self.steps]

    def dev_rows(self, data: Path) -> list[Row]:
        """200 dev rows of the loss."""
        rows = read_split(data, "dev")
        random.Random(1).shuffle(rows)
        return rows[:200]

    def dev_tables(self, data: Path) -> tuple[list[str], list[list[str]]]:
        """Dev tables of the BLEU score, and all references of each."""
        refs: dict[str, list[str]] = {}
        for r in read_split(data, "dev"):
            refs.setdefault(r["mr"], []).append(r["ref"])
        tables = sorted(refs, key=lambda k: random.Random(k).random())[: self.num_tables]
        return tables, [refs[k] for k in tables]


SETTINGS = {
    "smollm2-text": Setting("none", 5e-2, 300, 10, plain_row),
    "smollm2-mlp": Setting("mlp", 5e-4, 300, 10, plain_row),
    "nlg-10m": Setting("mlp", 2e-3, 400, 64, authors_row, num_beams=5, num_tables=547),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the suite.

    Attributes:
        name: Key of `SETTINGS`.
        model: Hub id or folder of the base.
        data: Folder of E2E files, as `e2e_rows.read_split` describes.
        output: Folder to write to.
        steps: Number of steps to stop after, without an evaluation, or None for the whole run.
        dtype: ``float32`` or ``float64``.
        texts: File of rows with a meaning representation ``mr`` to generate from as well, None for no more.
    """

    name: str
    model: str
    data: Path
    output: Path
    steps: int | None
    dtype: Literal["float32", "float64"]
    texts: Path | None = None

    @property
    def setting(self) -> Setting:
        """The setting."""
        return SETTINGS[self.name]
