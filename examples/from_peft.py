"""Serve an adapter that PEFT wrote beside twenty others, train it further, and load the result in PEFT again.

``python examples/from_peft.py BASE ADAPTER ROWS.jsonl OUT``: BASE is the adapter's base (folder or Hugging Face
id), the rows have ``prompt`` and ``completion``, and OUT gets the new adapter. The tokens of both adapters are compared
with PEFT's.
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
    prompt, lengths = torch.tensor([ids]), {"max_new_tokens": NEW, "min_new_tokens": NEW}
    with torch.no_grad():
        out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **lengths)
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


def main() -> None:
    """Import, serve, train, export, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", help="folder or Hugging Face id of the base")
    parser.add_argument("adapter", type=Path, help="folder of a PREFIX_TUNING or CARTRIDGE adapter")
    parser.add_argument("rows", type=Path, help="rows with prompt and completion")
    parser.add_argument("out", type=Path, help="folder for the new adapter")
    parser.add_argument("--steps", type=int, default=30, help="training steps (default: 30)")
    args = parser.parse_args()
    rows = read_rows(args.rows)

    with prefixfast.load(args.base, dtype="float32") as base:
        # 1. A folder of PEFT is read as a prefix.
        own = prefixfast.Prefix.from_pretrained(args.adapter)

        # 2. Twenty others hold the keys and values of a text each, without training.
        texts = [f"Write in a {voice} voice, {kind}:" for voice in VOICES for kind in ("in a sentence", "at length")]
        others = [prefixfast.Prefix.from_text(base, text) for text in texts]

        # 3. All of them go into one batch, each request with its own prefix.
        prompts = [str(row["prompt"]) for row in (rows * (1 + 21 // len(rows)))[:21]]
        greedy = prefixfast.GenerationParams(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, num_beams=1)
        results = prefixfast.generate(prompts, [own, *others], model=base, params=greedy, progress=False)
        table = Table("prefix", "prompt", "text", title="One batch, twenty-one prefixes")
        for name, prompt, result in zip([str(args.adapter), *texts], prompts, results, strict=True):
            table.add_row(name, prompt.strip(), result.text.strip())
        Console().print(table)
        ids = base.require_tokenizer().encode([prompts[0]])[0].tolist()
        if peft_tokens(args.base, args.adapter, ids) != results[0].token_ids:
            sys.exit("the imported adapter does not give PEFT's tokens")

        # 4. The adapter is trained further.
        before = prefixfast.score(rows[:1], own, model=base)[0].logprob
        tuned = prefixfast.train(base, rows, init=own, max_steps=args.steps, learning_rate=5e-3, progress=False)
        after = prefixfast.score(rows[:1], tuned, model=base)[0].logprob

        # 5. PEFT loads the result.
        tuned.to_peft(args.out)
        (result,) = prefixfast.generate([prompts[0]], tuned, model=base, params=greedy, progress=False)
    if peft_tokens(args.base, args.out, ids) != result.token_ids:
        sys.exit("PEFT does not give the tokens of the exported adapter")
    change = f"{before:.3f} before, {after:.3f} after {args.steps} steps"
    print(f"log-probability of the first target: {change}; PEFT agrees on both adapters")


if __name__ == "__main__":
    main()
