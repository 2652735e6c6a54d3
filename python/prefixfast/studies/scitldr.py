"""Summaries of SciTLDR with prefixes at different sites.

``python -m prefixfast.studies.scitldr OUT --data FOLDER --base FOLDER`` carries out the study. Rows are abstracts of
SciTLDR-A (Cachola et al. 2020, arXiv:2004.15011) with one sentence each. As in the official scorer, a text is scored
against the reference that has the best ROUGE-1 with it, and scores are those of all texts. Each part of the study is
written as soon as it is finished, and a later call carries out the missing parts. Two parts need no base: ``lead-1`` is
the first sentence of the document, and ``copy`` is the whole document.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefixfast.errors import ConfigError, shown
from prefixfast.io.atomic import replace_file
from prefixfast.io.environment import environment
from prefixfast.io.json_lines import json_line
from prefixfast.metrics.rouge import new_scorer, rouge
from prefixfast.model.load import load
from prefixfast.studies.denoising.corpus import held_out_sentences, sentences, unseen

Row = dict[str, Any]
RESULTS = "results.jsonl"
DECODING = {
    "num_beams": 4,
    "min_new_tokens": 5,
    "max_new_tokens": 40,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 3,
}


@dataclass(frozen=True)
class Part:
    """One part of the study.

    Attributes:
        name: Name.
        options: Arguments of `train`, None for a part without training.
        seed: Seed of the training, None without.
    """

    name: str
    options: dict[str, Any] | None = None
    seed: int | None = None

    @property
    def key(self) -> str:
        """Name in the results."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of all parts.

    Attributes:
        base: Folder of the base.
        train_rows: Number of training rows.
        test_rows: Number of test rows.
        epochs: Number of passes over the training rows.
        max_source_length: Largest number of tokens of a document.
        prefix_length: Prefix rows at each site.
        prefix_rate: Peak learning rate of prefixes.
        full_rate: Peak learning rate of all weights.
        dtype: Compute dtype.
        decoding: Fields of `GenerationParams`.
    """

    base: str
    train_rows: int
    test_rows: int
    epochs: float
    max_source_length: int
    prefix_length: int
    prefix_rate: float
    full_rate: float
    dtype: str
    decoding: dict[str, Any] = field(default_factory=DECODING.copy)

    def parts(self, seeds: Sequence[int]) -> list[Part]:
        """All parts, those of the first seed first."""
        prefix: dict[str, Any] = {"prefix_length": self.prefix_length, "learning_rate": self.prefix_rate}
        trained: dict[str, dict[str, Any]] = {
            "prefix, three sites": prefix,
            "prefix, decoder only": prefix | {"sites": ("self",)},
            "prefix, encoder only": prefix | {"sites": ("enc",)},
            "full fine-tuning": {"method": "full", "learning_rate": self.full_rate},
        }
        untrained = [Part("lead-1"), Part("copy"), Part("no prefix")]
        return untrained + [Part(name, options, seed) for seed in seeds for name, options in trained.items()]


def read_rows(data: Path, split: str) -> list[Row]:
    """Rows of one split with ``document``, ``summary`` and, except in training, ``summaries``.

    Training rows whose document shares a long sentence with a document of dev or test are left out. They are versions
    of the same abstract.
    """
    with gzip.open(data / "scitldr" / f"scitldr_{split}.jsonl.gz", "rt", encoding="utf8") as lines:
        rows = [json.loads(line) for line in lines]
    if split != "train":
        return rows
    held_out = held_out_sentences(data)
    return [row for row in rows if unseen([row["document"]], held_out)]


def best_references(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[str]]:
    """Reference of each text that has the best ROUGE-1 with it, the first of equal ones."""
    chosen, scorer = [], new_scorer(["rouge1"])
    for text, own in zip(texts, references, strict=True):
        scores = [scorer.score(reference, text)["rouge1"].fmeasure for reference in own]
        chosen.append([own[scores.index(max(scores))]])
    return chosen


class Study:
    """The study in a folder.

    Args:
        output: Folder for ``results.jsonl`` and the trained prefixes and weights.
        data: Folder with ``scitldr/``.
        settings: Settings.

    Raises:
        ConfigError: If the folder holds a study with other settings.
    """

    def __init__(self, output: Path, data: Path, settings: Settings) -> None:
        self.output, self.settings = output, settings
        self.train = read_rows(data, "train")[: settings.train_rows]
        self.test = read_rows(data, "test")[: settings.test_rows]
        self.head: dict[str, Any] = {"suite": "scitldr", "settings": asdict(settings), "environment": environment()}
        self.parts: dict[str, Any] = {}
        if (path := output / RESULTS).exists():
            head, *parts = map(json.loads, path.read_text(encoding="utf8").splitlines())
            if head["settings"] != self.head["settings"]:
                expected = shown(head["settings"])
                msg = f"{path}: expected the settings of its results, {expected}, got others; give another folder"
                raise ConfigError(msg)
            self.head, self.parts = head, {part["part"]: part for part in parts}

    def run(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Carry out the parts that have no results, write each result, and return all results by part.

        Args:
            parts: Parts.
        """
        for part in parts:
            if part.key not in self.parts:
                print(f"{time.strftime('%H:%M:%S')} {part.key}", flush=True)
                self.parts[part.key] = found = {"part": part.key, "name": part.name, **self._carry_out(part)}
                replace_file(self.output / RESULTS, b"".join(map(json_line, [self.head, *self.parts.values()])))
                print("  " + ", ".join(f"{k} {v:.2f}" for k, v in found["rouge"].items()), flush=True)
        return self.parts

    def _carry_out(self, part: Part) -> dict[str, Any]:
        cpu, wall = time.process_time(), time.perf_counter()
        documents = [row["document"] for row in self.test]
        found: dict[str, Any] = {}
        if part.name == "lead-1":
            texts = [sentences(d)[0] for d in documents]
        elif part.name == "copy":
            texts = documents
        else:
            texts, found = self._generate(part, documents)
        references = [row["summaries"] for row in self.test]
        scores = rouge(texts, best_references(texts, references))
        return {
            **found,
            "rouge": {name: round(value.value, 3) for name, value in scores.items()},
            "seed": part.seed,
            "options": part.options,
            "rows": {"train": len(self.train) if part.options else 0, "test": len(texts)},
            "mean_words": round(sum(len(t.split()) for t in texts) / len(texts), 2),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "wall_seconds": round(time.perf_counter() - wall, 1),
            "texts": texts[:3],
        }

    def _generate(self, part: Part, documents: list[str]) -> tuple[list[str], dict[str, Any]]:
        """Texts of a part with a base, and the figures of its training."""
        import prefixfast

        settings, tuned = self.settings, None
        found: dict[str, Any] = {}
        with load(settings.base, dtype=settings.dtype) as base:
            if part.options is not None:
                cpu = time.process_time()
                tuned = self._train(base, part)
                found = {"num_trained": tuned.num_trained, "train_cpu_seconds": round(time.process_time() - cpu, 1)}
                found["metrics"] = dict(tuned.training["metrics"])
            how = {**settings.decoding, "max_source_length": settings.max_source_length, "progress": False}
            rows = [{"document": d} for d in documents]
            generated = prefixfast.generate(rows, tuned, model=base, **how)
        return [g.text.strip() for g in generated], found

    def _train(self, base: Any, part: Part) -> Any:
        import prefixfast

        rows = [{"document": row["document"], "summary": row["summary"]} for row in self.train]
        how: dict[str, Any] = {
            "seed": part.seed,
            "num_train_epochs": self.settings.epochs,
            "max_source_length": self.settings.max_source_length,
            "max_target_length": 60,
            "overflow": "truncate",
            "output_dir": self.output / part.key.replace(", ", "-").replace(" ", "-"),
            **(part.options or {}),
        }
        return prefixfast.train(base, rows, task="xsum", resume=True, progress=False, **how)


def main() -> None:
    """Carry out the parts of the study that have no results."""
    parser = argparse.ArgumentParser(prog="python -m prefixfast.studies.scitldr", description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--data", type=Path, required=True, help="folder with scitldr/")
    parser.add_argument("--base", required=True, help="folder of an encoder-decoder base")
    parser.add_argument("--seeds", default="1,2,3", help="seeds with commas between them (default: 1,2,3)")
    parser.add_argument("--parts", default="", help="names of the parts with semicolons between them (default: all)")
    parser.add_argument("--train-rows", type=int, default=2000, help="number of training rows (default: 2000)")
    parser.add_argument("--test-rows", type=int, default=618, help="number of test rows (default: 618)")
    parser.add_argument("--epochs", type=float, default=2, help="passes over the training rows (default: 2)")
    parser.add_argument("--max-source-length", type=int, default=400, help="tokens of a document (default: 400)")
    parser.add_argument("--prefix-length", type=int, default=50, help="prefix rows at each site (default: 50)")
    parser.add_argument("--prefix-rate", type=float, default=1e-2, help="learning rate of prefixes (default: 1e-2)")
    parser.add_argument("--full-rate", type=float, default=5e-4, help="learning rate of all weights (default: 5e-4)")
    parser.add_argument("--dtype", default="bfloat16", help="compute dtype (default: bfloat16)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop("threads"))
    out, data = args.pop("out"), args.pop("data")
    seeds, chosen = (args.pop(name) for name in ("seeds", "parts"))
    settings = Settings(**args)
    parts = settings.parts([int(seed) for seed in seeds.split(",")])
    names = [name.strip() for name in chosen.split(";")] if chosen else [part.name for part in parts]
    if unknown := set(names) - {part.name for part in parts}:
        msg = f"--parts: expected {'; '.join(dict.fromkeys(p.name for p in parts))}, got {shown(sorted(unknown)[0])}"
        raise ConfigError(msg)
    Study(out, data, settings).run([part for part in parts if part.name in names])


if __name__ == "__main__":
    main()
