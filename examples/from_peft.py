"""The way of a PEFT user: an adapter folder that PEFT wrote is served beside twenty others, trained further, exported, and loaded in PEFT again.

``python examples/from_peft.py BASE ADAPTER ROWS.jsonl OUT``: BASE is the adapter's base (folder or hub id), ROWS have ``prompt`` and ``completion``, OUT gets
the new adapter. Everything that is shown is checked against PEFT itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import prefixfast
from prefixfast.data import read_rows

NEW = 24
VOICES = (
    "formal",
    "friendly",
    "brief",
    "cheerful",
    "gloomy",
    "old-fashioned",
    "technical",
    "poetic",
    "ironic",
    "patient",
)


def peft_tokens(base: str, adapter: Path, ids: list[int]) -> list[int]:
    """PEFT's own greedy tokens for one prompt."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, adapter).eval()
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


def main() -> None:
    """Import, serve, train, export, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    rows = read_rows(args.rows)

    with prefixfast.load(args.base, dtype="float32") as base:
        # 1. A PEFT folder is a prefix as it is.
        own = prefixfast.Prefix.from_pretrained(args.adapter)

        # 2. Twenty others; here the keys and values of a text each, no training at all.
        texts = [f"Write in a {voice} voice, {kind}:" for voice in VOICES for kind in ("in a sentence", "at length")]
        others = [prefixfast.Prefix.from_text(base, text) for text in texts]

        # 3. All of them in one batch, each request with its own prefix.
        prompts = [str(row["prompt"]) for row in (rows * (1 + 21 // len(rows)))[:21]]
        how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 1}
        results = prefixfast.generate(prompts, [own, *others], model=base, progress=False, **how)
        table = Table("prefix", "prompt", "text", title="One batch, twenty-one prefixes")
        for name, prompt, result in zip([str(args.adapter), *texts], prompts, results, strict=True):
            table.add_row(name, prompt.strip(), result.text.strip())
        Console().print(table)
        ids = base.need_tokenizer().encode([prompts[0]])[0].tolist()
        if peft_tokens(args.base, args.adapter, ids) != results[0].token_ids:
            sys.exit("the imported adapter does not give PEFT's tokens")

        # 4. Train it further, and 5. export it: PEFT loads what comes out.
        before = prefixfast.score(
            prompts, own, targets=[str(r["completion"]) for r in rows][:1] * len(prompts), model=base
        )
        tuned = prefixfast.train(base, rows, init=own, max_steps=args.steps, learning_rate=5e-3, progress=False)
        after = prefixfast.score(
            prompts, tuned, targets=[str(r["completion"]) for r in rows][:1] * len(prompts), model=base
        )
        tuned.to_peft(args.out)
        (result,) = prefixfast.generate([prompts[0]], tuned, model=base, progress=False, **how)
    if peft_tokens(args.base, args.out, ids) != result.token_ids:
        sys.exit("PEFT does not give the tokens of the exported adapter")
    print(
        f"log-probability of the first target: {before[0].logprob:.3f} before, {after[0].logprob:.3f} after {args.steps} steps; PEFT agrees on both adapters"
    )


if __name__ == "__main__":
    main()
