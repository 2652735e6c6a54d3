"""One tenant sends ten times what the others send: how much longer do theirs take, in real time?

``python benches/system/fairness.py OUT.jsonl [--seconds 40]``: eight tenants, Poisson arrivals, together 60 % of what the engine was just measured to serve;
then the same with a loud one, once with tenants and once without (all requests one tenant's, so that they wait behind each other).
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from prefixfast import Engine
from prefixfast.bench.harness import write_rows

TENANTS, ROWS, TOKENS, PROMPT, LOUD = 8, 16, 20, 10, 10
SHAPE = {"n_layer": 6, "n_embd": 512, "n_head": 8, "vocab_size": 8000, "n_positions": 64}


def capacity(engine: Engine) -> float:
    """Requests a second when they never stop coming."""
    prompts = [[3] * PROMPT] * (ROWS * 12)
    engine.generate(prompts[:ROWS], max_new_tokens=TOKENS)
    start = time.perf_counter()
    engine.generate(prompts, max_new_tokens=TOKENS)
    return len(prompts) / (time.perf_counter() - start)


def time_per_token(engine: Engine, rates: list[float], seconds: float, *, tenants: bool) -> list[float]:
    """Each tenant's 95th percentile of (end - arrival) / tokens in milliseconds; ``rates``: requests a second."""
    g = np.random.default_rng(0)
    arrivals = sorted((float(at), tenant) for tenant, rate in enumerate(rates) for at in np.cumsum(g.exponential(1 / rate, int(2 * rate * seconds) + 10)))
    taken: list[list[float]] = [[] for _ in rates]
    tickets, start = [], time.perf_counter()

    def ended(tenant: int, then: float, _: object) -> None:
        taken[tenant].append(1e3 * (time.perf_counter() - then) / TOKENS)

    for at, tenant in arrivals:
        if at > seconds:
            break
        time.sleep(max(0.0, start + at - time.perf_counter()))
        ticket = engine.submit([3] * PROMPT, max_new_tokens=TOKENS, tenant=str(tenant) if tenants else "all")
        ticket.future.add_done_callback(partial(ended, tenant, start + at))
        tickets.append(ticket)
    for ticket in tickets:
        ticket.result()
    return [float(np.percentile(t, 95)) for t in taken]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=40.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(**SHAPE)).eval()
    base.generation_config.eos_token_id = None
    with Engine(base, max_num_seqs=ROWS, max_model_len=PROMPT + TOKENS, max_waiting=1_000_000) as engine:
        most = capacity(engine)
        usual = 0.6 * most / TENANTS
        rows: list[dict[str, object]] = []
        for tenants in (True, False):
            calm = time_per_token(engine, [usual] * TENANTS, args.seconds, tenants=tenants)
            loud = time_per_token(engine, [LOUD * usual] + [usual] * (TENANTS - 1), args.seconds, tenants=tenants)
            growth = max(after / before for before, after in zip(calm[1:], loud[1:], strict=True))
            rows.append({"tenants": tenants, "calm_p95_ms": calm, "loud_p95_ms": loud, "growth": round(growth, 3)})
            print(rows[-1], flush=True)
    setting = {"suite": "fairness", "requests_a_second": round(most, 2), "each": round(usual, 2), "loud": LOUD, "seconds": args.seconds, "shape": SHAPE}
    write_rows(args.out, [setting, *rows])


if __name__ == "__main__":
    main()
