"""A PEFT user's adapters: serve several in one mixed batch, train one further, and load the result in PEFT again.

``python examples/from_peft.py`` makes three adapters with PEFT and runs on the base that the package contains.
``python examples/from_peft.py BASE ADAPTERS ROWS.jsonl OUT`` takes a base (folder or Hugging Face id), a folder of
PREFIX_TUNING or CARTRIDGE adapters of this base, rows with ``prompt`` and ``completion``, and a folder for the new
adapter. The tokens of every adapter are compared with PEFT's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import prefixfast
from prefixfast.data import read_rows
from prefixfast.demo import BASE

NEW = 16
FOLDER = Path("from-peft")
ROWS = [
    {"prompt": "Where is the inn?", "completion": "It is near the river."},
    {"prompt": "Who is the cook?", "completion": "The cook is Lumira."},
]


def make_adapters(folder: Path) -> None:
    """Save three adapters as PEFT does, here with random weights."""
    for seed, name in enumerate(("first", "second", "third")):
        torch.manual_seed(seed)
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4 + seed)
        get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), config).save_pretrained(folder / name)


def peft_tokens(base: str, adapter: Path, ids: list[int]) -> list[int]:
    """PEFT's own greedy tokens for one prompt."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, adapter).eval()
    prompt, lengths = torch.tensor([ids]), {"max_new_tokens": NEW, "min_new_tokens": NEW}
    with torch.no_grad():
        out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **lengths)
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


def arguments() -> argparse.Namespace:
    """Base, adapters, rows and output of the run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("base", nargs="?", default=str(BASE), help="folder or Hugging Face id of the base")
    parser.add_argument("adapters", nargs="?", type=Path, default=FOLDER / "adapters", help="folder of adapters")
    parser.add_argument("rows", nargs="?", type=Path, default=FOLDER / "rows.jsonl", help="rows to train on")
    parser.add_argument("out", nargs="?", type=Path, default=FOLDER / "new", help="folder for the new adapter")
    parser.add_argument("--steps", type=int, default=30, help="training steps (default: 30)")
    found = parser.parse_args()
    if found.adapters == FOLDER / "adapters":
        make_adapters(found.adapters)
        found.rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf8")
    return found


def main() -> None:
    """Import, serve, train, export, compare."""
    args = arguments()
    rows = read_rows(args.rows)
    with prefixfast.load(args.base, dtype="float32") as base:
        # 1. A folder of PEFT is read as a prefix.
        folders = sorted(path for path in args.adapters.iterdir() if path.is_dir())
        adapters = {path.name: prefixfast.Prefix.from_pretrained(path) for path in folders}

        # 2. All of them go into one batch, each request with its own adapter.
        prompt = str(rows[0]["prompt"])
        greedy = prefixfast.GenerationParams(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, num_beams=1)
        results = prefixfast.generate(
            [prompt] * len(adapters), list(adapters.values()), model=base, params=greedy, progress=False
        )
        table = Table("adapter", "virtual tokens", "text", title="One batch")
        for name, result in zip(adapters, results, strict=True):
            table.add_row(name, str(result.usage["prefix_rows"]), result.text.strip())
        Console().print(table)
        ids = base.require_tokenizer().encode([prompt])[0].tolist()
        for path, result in zip(folders, results, strict=True):
            if peft_tokens(args.base, path, ids) != result.token_ids:
                sys.exit(f"the imported adapter {path} does not give PEFT's tokens")

        # 3. The first one is trained further.
        own = next(iter(adapters.values()))
        before = prefixfast.score(rows[:1], own, model=base)[0].logprob
        tuned = prefixfast.train(base, rows, init=own, max_steps=args.steps, learning_rate=0.05, progress=False)
        after = prefixfast.score(rows[:1], tuned, model=base)[0].logprob

        # 4. PEFT loads the result.
        tuned.to_peft(args.out)
        (result,) = prefixfast.generate([prompt], tuned, model=base, params=greedy, progress=False)
    if peft_tokens(args.base, args.out, ids) != result.token_ids:
        sys.exit("PEFT does not give the tokens of the exported adapter")
    change = f"{before:.3f} before, {after:.3f} after {args.steps} steps"
    print(f"log-probability of the first target: {change}; PEFT agrees on all {len(adapters) + 1} adapters")


if __name__ == "__main__":
    main()
