"""Training and evaluation of the quality suite with prefixfast."""

from __future__ import annotations

import json
import time
from typing import Any

from prefixfast.bench.decoding import Decoding
from prefixfast.bench.quality.settings import ENCODER_HIDDEN_SIZE, MAX_NEW_TOKENS, PREFIX_LENGTH, MakeRow, Run
from prefixfast.data import read_rows
from prefixfast.engine.generate import generate
from prefixfast.metrics.bleu import bleu
from prefixfast.model.base import Model
from prefixfast.model.load import load
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.trainer import train


def train_and_evaluate(run: Run) -> dict[str, Any]:
    """Losses and seconds of training, and without `Run.steps` also dev loss, BLEU and texts."""
    setting = run.setting
    with load(run.model, dtype=run.dtype) as base:
        row = setting.row(base.require_tokenizer().hf)
        prefix = _train(run, base, row)
        lines = (run.output / "prefix" / "log.jsonl").read_text(encoding="utf8").splitlines()
        steps = [line for line in map(json.loads, lines) if "loss" in line]
        result: dict[str, Any] = {"losses": [s["loss"] for s in steps], "train_seconds": steps[-1]["seconds"]}
        return result if run.steps else result | _evaluate(run, base, prefix, row)


def _train(run: Run, base: Model, row: MakeRow) -> Prefix:
    setting = run.setting
    flat = setting.reparameterization == "none"
    return train(
        base,
        [row(r) for batch in setting.batches(run.data)[: run.steps] for r in batch],
        eval_data=None if run.steps else [row(r) for r in setting.dev_rows(run.data)],
        init="text" if flat else "random",
        init_text=setting.init_text if flat else None,
        prefix_length=PREFIX_LENGTH,
        reparameterization=setting.reparameterization,
        encoder_hidden_size=ENCODER_HIDDEN_SIZE,
        shuffle=False,
        batch_size=setting.batch_size,
        max_steps=run.steps or setting.steps,
        learning_rate=setting.learning_rate,
        warmup_steps=setting.warmup_steps,
        logging_steps=1,
        seed=0,
        output_dir=run.output / "prefix",
        overwrite=True,  # of an earlier measurement, whose results file is replaced too
    )


def _evaluate(run: Run, base: Model, prefix: Prefix, row: MakeRow) -> dict[str, Any]:
    """Dev loss, BLEU, seconds of generation, and texts."""
    setting = run.setting
    tables, references = setting.dev_tables(run.data)
    decoding = Decoding.at_most(MAX_NEW_TOKENS, base.hf, base.require_tokenizer(), setting.num_beams)

    def texts_of(found: list[str]) -> list[str]:
        prompts = [row({"mr": mr, "ref": ""})["prompt"] for mr in found]
        generated = generate(prompts, prefix, model=base, **decoding.params())
        return [g.text.strip() for g in generated]

    metrics: Any = prefix.training["metrics"]
    start = time.perf_counter()
    texts = texts_of(tables)
    result = {
        "dev_loss": metrics["eval_loss"],
        "bleu": 100 * bleu(texts, references)["BLEU"].value,
        "generate_seconds": time.perf_counter() - start,
        "texts": dict(zip(tables, texts, strict=True)),
    }
    if run.texts:
        more = [str(r["mr"]) for r in read_rows(run.texts)]
        result["more_texts"] = dict(zip(more, texts_of(more), strict=True))
    return result
