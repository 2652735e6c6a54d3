"""Suite ``users``: twenty users' prefixes over one base, trained at once and used in one batch of 200 requests.

Each user's rows are the E2E rows about one restaurant. Every tenth request is generated again alone, and by
transformers with the user's prefix in its cache. No speed is reported if the tokens of the three differ, unless fp64
shows that rounding alone decides between them.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixfast.bench.contenders import mixed_by_hand
from prefixfast.bench.decoding import Decoding
from prefixfast.bench.e2e_rows import Row, read_split
from prefixfast.bench.exact_scores import ExactScores, Text, check_same_tokens
from prefixfast.bench.harness import announce, progress, write_rows
from prefixfast.bench.random_base import load_plain
from prefixfast.engine.engine import Engine
from prefixfast.io.environment import cpu_name
from prefixfast.model.base import Model
from prefixfast.model.load import load
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.trainer import train

USERS, REQUESTS, NEW = 20, 200, 32
DTYPE = "float32"
COMPARED = range(0, REQUESTS, 10)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the suite.

    Attributes:
        model: Hub id or folder of the base.
        data: Folder of E2E files, as `e2e_rows.read_split` describes.
        steps: Training steps of each prefix.
    """

    model: str
    data: Path
    steps: int


@dataclass(frozen=True)
class Generated:
    """Results of the mixed batch.

    Attributes:
        together: Results of all requests in one batch.
        alone: Results of the compared requests, each generated alone.
        seconds_together: Seconds of the batch.
        seconds_alone: Seconds of the compared requests, one after another.
    """

    together: list[Any]
    alone: list[Any]
    seconds_together: float
    seconds_alone: float


def run(output: Path, settings: Settings) -> dict[str, Any]:
    """Train, generate, compare, print the figures, write ``results.jsonl``.

    Raises:
        WrongResultError: If tokens differ by more than rounding.
    """
    users = _rows_of_users(read_split(settings.data, "train"))
    requests = [f"{row['mr']}\n" for row in read_split(settings.data, "test", keys=("mr",))[:REQUESTS]]
    with load(settings.model, dtype=DTYPE) as base:
        announce(base.dtype, base.device)
        start = time.perf_counter()
        prefixes = _train(base, users, settings.steps)
        seconds = time.perf_counter() - start
        chosen = [prefixes[i % len(prefixes)] for i in range(len(requests))]
        got = _generate(base, requests, chosen)
        ids = [base.require_tokenizer().encode([r])[0].tolist() for r in requests]
        decoding = Decoding.exactly(NEW, base)
    texts = _texts(settings.model, ids, chosen, got, decoding)
    scores = ExactScores(load_plain(settings.model, DTYPE), ids, chosen.__getitem__, decoding)
    gap = check_same_tokens([text for own in texts for text in own], scores, "users")
    row = {
        "users": len(users),
        "requests": len(requests),
        "train_seconds": round(seconds, 1),
        "steps": settings.steps,
        "seconds_together": round(got.seconds_together, 2),
        "tokens_per_second_together": round(len(requests) * NEW / got.seconds_together, 1),
        "tokens_per_second_one_by_one": round(len(got.alone) * NEW / got.seconds_alone, 1),
        "compared": {"requests": len(got.alone), "tokens": NEW * len(got.alone)},
        "different": [own[0].prompt for own in texts if len({text.tokens for text in own}) > 1],
        "largest_gap": gap,
        "dtype": DTYPE,
        "decoding": str(decoding),
        "texts": [{"mr": requests[i].strip(), "text": got.together[i].text} for i in range(0, len(requests), 40)],
    }
    write_rows(output / "results.jsonl", [{"suite": "e2e_users", "base": Path(settings.model).name}, row])
    _show(row)
    print(f"\n{output / 'results.jsonl'}")
    return row


def _rows_of_users(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows by restaurant, of the restaurants with most rows."""
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_name[re.findall(r"name\[([^\]]*)\]", row["mr"])[0]].append(row)
    return dict(sorted(by_name.items(), key=lambda item: -len(item[1]))[:USERS])


def _train(base: Model, users: dict[str, list[Row]], steps: int) -> list[Prefix]:
    """Prefixes of all users, trained in the same batches."""
    data = {
        name: [{"prompt": f"{r['mr']}\n", "completion": r["ref"]} for r in own[: 4 * steps]]
        for name, own in users.items()
    }
    trained = train(base, data, prefix_length=10, batch_size=4, max_steps=steps, seed=1)
    return [trained[name] for name in users]


def _generate(base: Model, requests: list[str], chosen: list[Prefix]) -> Generated:
    """Generate all requests in one batch, and the compared ones alone."""
    how: dict[str, Any] = {**Decoding.exactly(NEW, base).params(), "progress": False}
    with Engine(base, max_num_seqs=64, max_model_len=160) as engine:
        engine.generate(requests[:4], chosen[:4], **how)
        start = time.perf_counter()
        together = engine.generate(requests, chosen, **how)
        middle = time.perf_counter()
        compared = progress(COMPARED, "bench, one request at a time", "requests")
        alone = [engine.generate([requests[i]], chosen[i], **how)[0] for i in compared]
        return Generated(together, alone, middle - start, time.perf_counter() - middle)


def _texts(
    model: str, ids: list[list[int]], chosen: list[Prefix], got: Generated, decoding: Decoding
) -> list[list[Text]]:
    """Texts of each compared request: in the batch, alone, and by transformers."""
    plain = load_plain(model, DTYPE).eval()
    texts = []
    for i, alone in progress(list(zip(COMPARED, got.alone, strict=True)), "bench, transformers", "requests"):
        (theirs,) = mixed_by_hand(plain, [chosen[i]], [ids[i]], decoding)()
        ways = {"prefixfast, mixed batch": got.together[i].token_ids, "prefixfast, alone": alone.token_ids}
        ways["transformers"] = theirs
        texts.append([Text(name, i, i, tuple(tokens)) for name, tokens in ways.items()])
    return texts


def _show(row: dict[str, Any]) -> None:
    compared = row["compared"]
    print(f"{row['users']} prefixes, {row['requests']} requests of {NEW} tokens, {cpu_name()}")
    print(f"training, {row['steps']} steps of all prefixes at once: {row['train_seconds']} s")
    print(f"all requests in one batch: {row['tokens_per_second_together']} tokens/s")
    print(f"one request at a time: {row['tokens_per_second_one_by_one']} tokens/s")
    gap = f", by at most {row['largest_gap']:.1e} in fp64" if row["different"] else ""
    print(f"requests whose tokens differ, of {compared['requests']} compared: {len(row['different'])}{gap}\n")
    for sample in row["texts"]:
        print(f"  {sample['mr']}\n    {sample['text'].strip()}")
