"""Twenty users over one real base: twenty prefixes trained at once on E2E, two hundred test meaning representations through all of them in one batch.

``python benches/system/e2e_users.py BASE E2E_FOLDER OUT.jsonl [--steps 12]``: BASE is a Hugging Face folder (SmolLM2-135M). Each user's rows are those
about one restaurant. Every tenth request is generated again alone, and by transformers with the user's prefix in its cache; the tokens must be the same.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import prefixfast
from prefixfast import Engine
from prefixfast.bench.contenders import mixed_by_hand
from prefixfast.bench.harness import write_rows

USERS, REQUESTS, NEW = 20, 200, 32


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a gzip JSONL file."""
    with gzip.open(path, "rt", encoding="utf8") as f:
        return [json.loads(line) for line in f]


def main() -> None:
    """Train, generate, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("e2e", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    by_name: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows(args.e2e / "e2e_train.jsonl.gz"):
        by_name[re.findall(r"name\[([^\]]*)\]", row["mr"])[0]].append(row)
    users = dict(sorted(by_name.items(), key=lambda item: -len(item[1]))[:USERS])
    data = {
        name: [{"prompt": f"{r['mr']}\n", "completion": r["ref"]} for r in own[: 4 * args.steps]]
        for name, own in users.items()
    }
    with prefixfast.load(args.base, dtype="float32") as base:
        start = time.perf_counter()
        run = prefixfast.train(base, data, prefix_length=10, batch_size=4, max_steps=args.steps, seed=1)
        trained = time.perf_counter() - start
        prefixes = [run[name] for name in users]
        requests = [f"{r['mr']}\n" for r in rows(args.e2e / "e2e_test_mr_only.jsonl.gz")[:REQUESTS]]
        chosen = [prefixes[i % USERS] for i in range(REQUESTS)]
        how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "num_beams": 1}
        with Engine(base, max_num_seqs=64, max_model_len=160) as engine:
            engine.generate(requests[:4], chosen[:4], **how)
            start = time.perf_counter()
            got = engine.generate(requests, chosen, **how)
            together = time.perf_counter() - start
            start = time.perf_counter()
            alone = [engine.generate([requests[i]], chosen[i], **how)[0] for i in range(0, REQUESTS, 10)]
            one_by_one = time.perf_counter() - start
        ids = [base.require_tokenizer().encode([r])[0].tolist() for r in requests]
    plain = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    compared, different = 0, []
    for g, i in zip(alone, range(0, REQUESTS, 10), strict=True):
        theirs = mixed_by_hand(plain, [chosen[i]], [ids[i]], NEW)()[0].tolist()
        if not got[i].token_ids == g.token_ids == theirs:
            different.append(i)
        compared += NEW
    row = {
        "users": USERS,
        "requests": REQUESTS,
        "train_seconds": round(trained, 1),
        "steps": args.steps,
        "seconds_together": round(together, 2),
        "tokens_per_second_together": round(REQUESTS * NEW / together, 1),
        "tokens_per_second_one_by_one": round(len(alone) * NEW / one_by_one, 1),
        "compared": {"requests": len(alone), "tokens": compared},
        "different": different,
        "texts": [{"mr": requests[i].strip(), "text": got[i].text} for i in range(0, REQUESTS, 40)],
    }
    print(json.dumps(row, indent=2, ensure_ascii=False))
    write_rows(args.out, [{"suite": "e2e_users", "base": Path(args.base).name}, row])


if __name__ == "__main__":
    main()
