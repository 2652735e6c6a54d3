"""What the two E2E runs share: rows, order, strings, schedule, evaluation. Nothing here knows which trainer is used."""

from __future__ import annotations

import gzip
import json
import os
import platform
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

DATA = Path(os.environ.get("PREFIXFAST_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data" / "e2e"
Row = dict[str, str]
KEYS = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}


def load(name: str) -> list[Row]:
    """Rows of one gzip JSONL file of the E2E folder."""
    with gzip.open(DATA / name, "rt", encoding="utf8") as f:
        return [json.loads(line) for line in f]


def slots(mr: str) -> list[tuple[str, str]]:
    """``name[Blue Spice], area[city centre]`` -> ``[("name", "Blue Spice"), ("area", "city centre")]``."""
    return [(k.strip(), v) for k, v in re.findall(r"([^,\[\]]+)\[([^\]]*)\]", mr)]


def plain_row(tok: Any) -> Callable[[Row], Row]:
    """``name : X | area : Y`` and a line break, then the reference."""
    return lambda r: {"prompt": " | ".join(f"{k} : {v}" for k, v in slots(r["mr"])) + "\n", "completion": r["ref"]}


def authors_row(tok: Any) -> Callable[[Row], Row]:
    """Li & Liang's strings: `` {src} {bos}`` then `` {ref} {eos}`` (the end token is added by the trainer)."""

    def price(value: str) -> str:
        return re.sub(r"£(\d+)-(\d+)", r"£ \1 - \2", value).replace("£", "£ ").replace("£  ", "£ ")

    def row(r: Row) -> Row:
        src = " | ".join(f"{KEYS.get(k, k)} : {price(v)}" for k, v in slots(r["mr"]))
        return {"prompt": f" {src} {tok.eos_token}", "completion": f" {r['ref']} "}

    return row


@dataclass(frozen=True)
class Setting:
    """One training run; P = 10 everywhere."""

    reparameterization: str
    learning_rate: float
    steps: int
    batch_size: int
    row: Callable[[Any], Callable[[Row], Row]]
    num_beams: int = 1
    num_tables: int = 100
    warmup_steps: int = 20
    init_text: str = "summarize the following table in a sentence :"

    def batches(self) -> list[list[Row]]:
        """Training batches in order: shuffled once, sorted by length within groups of four batches (less padding for PEFT)."""
        rows, b = load("e2e_train.jsonl.gz"), self.batch_size
        random.Random(0).shuffle(rows)
        out: list[list[Row]] = []
        for i in range(self.steps // 4 + 1):
            group = sorted(rows[i * 4 * b : (i + 1) * 4 * b], key=lambda r: len(r["ref"]) + len(r["mr"]))
            parts = [group[j * b : (j + 1) * b] for j in range(4)]
            random.Random(len(out)).shuffle(parts)
            out += parts
        return out[: self.steps]

    def dev_rows(self) -> list[Row]:
        """200 dev rows for the loss."""
        rows = load("e2e_dev.jsonl.gz")
        random.Random(1).shuffle(rows)
        return rows[:200]

    def dev_tables(self) -> tuple[list[str], list[list[str]]]:
        """Dev tables for BLEU, each with all its references."""
        refs: dict[str, list[str]] = {}
        for r in load("e2e_dev.jsonl.gz"):
            refs.setdefault(r["mr"], []).append(r["ref"])
        tables = sorted(refs, key=lambda k: random.Random(k).random())[: self.num_tables]
        return tables, [refs[k] for k in tables]


def settings() -> dict[str, Setting]:
    """The runs by name."""
    return {
        "smollm2-text": Setting("none", 5e-2, 300, 10, plain_row),
        "smollm2-mlp": Setting("mlp", 5e-4, 300, 10, plain_row),
        "nlg-10m": Setting("mlp", 2e-3, 400, 64, authors_row, num_beams=5, num_tables=547),
    }


def exact_norms() -> None:
    """For runs in fp64: Llama's RMSNorm without its rounding to fp32, so that the whole model computes in fp64."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    LlamaRMSNorm.forward = forward


def chunks(rows: list[Any], n: int) -> Iterable[list[Any]]:
    """Consecutive pieces of at most n."""
    return (rows[i : i + n] for i in range(0, len(rows), n))


def bleu(texts: list[str], references: list[list[str]]) -> float:
    """Sacrebleu's corpus BLEU (13a) on raw references."""
    wide = max(map(len, references))
    return sacrebleu.corpus_bleu(texts, [[r[j] if j < len(r) else None for r in references] for j in range(wide)]).score


def machine() -> dict[str, str]:
    """CPU model and the flags that decide speed."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf8") if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if re.search(rf"\b{f}\b", text)]
    return {"cpu": name[1] if name else platform.processor(), "flags": " ".join(flags)}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write the result with the machine that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | machine(), indent=1, ensure_ascii=False), encoding="utf8")
