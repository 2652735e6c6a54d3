"""prefixfast on E2E, to be held against `peft_e2e.py`: same rows, order, strings, initialization, schedule and evaluation (all in `rows.py`)."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import prefixfast
from rows import bleu, exact_norms, settings, write_result


def main() -> None:
    """Train, evaluate, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setting", choices=sorted(settings()))
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, help="only so many steps, for timing; without evaluation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--texts", type=Path, help="JSON lines with `mr`: also generate these")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = settings()[args.setting]
    if args.dtype == "float64":
        exact_norms()
    base = prefixfast.load(args.model, dtype=args.dtype)
    row = setting.row(base.require_tokenizer().hf)
    rows = [row(r) for batch in setting.batches()[: args.steps] for r in batch]
    dev = None if args.steps else [row(r) for r in setting.dev_rows()]
    start = time.perf_counter()
    prefix = prefixfast.train(
        base,
        rows,
        eval_data=dev,
        init="text" if setting.reparameterization == "none" else "random",
        init_text=setting.init_text if setting.reparameterization == "none" else None,
        prefix_length=10,
        reparameterization=setting.reparameterization,
        encoder_hidden_size=512,
        shuffle=False,
        batch_size=setting.batch_size,
        max_steps=args.steps or setting.steps,
        learning_rate=setting.learning_rate,
        warmup_steps=setting.warmup_steps,
        logging_steps=1,
        seed=0,
        output_dir=args.out.with_suffix(""),
    )
    log = [json.loads(line) for line in (args.out.with_suffix("") / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "loss" in line]
    losses = [line["loss"] for line in steps]
    result = {
        "impl": "prefixfast",
        "setting": args.setting,
        "dtype": args.dtype,
        "threads": args.threads,
        "losses": losses,
        "train_seconds": steps[-1]["seconds"],
    }
    if not args.steps:
        tables, references = setting.dev_tables()
        how = {"model": base, "num_beams": setting.num_beams, "max_new_tokens": 60}
        start = time.perf_counter()
        texts = [
            g.text.strip()
            for g in prefixfast.generate([row({"mr": mr, "ref": ""})["prompt"] for mr in tables], prefix, **how)
        ]
        result |= {
            "dev_loss": prefix.training["metrics"]["eval_loss"],
            "bleu": bleu(texts, references),
            "generate_seconds": time.perf_counter() - start,
        }
        result["texts"] = dict(zip(tables, texts, strict=True))
        if args.texts:
            wanted = [json.loads(line)["mr"] for line in args.texts.read_text(encoding="utf8").splitlines()]
            more = prefixfast.generate([row({"mr": mr, "ref": ""})["prompt"] for mr in wanted], prefix, **how)
            result["more_texts"] = {mr: g.text.strip() for mr, g in zip(wanted, more, strict=True)}
    write_result(args.out, result)
    print(json.dumps({k: v for k, v in result.items() if k not in ("texts", "more_texts", "losses")}))


if __name__ == "__main__":
    main()
