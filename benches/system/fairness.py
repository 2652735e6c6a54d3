"""One tenant sends ten times what the others send: how much longer do theirs take, in real time?

``python benches/system/fairness.py OUT.jsonl [--seconds 10] [--rounds 5]``: eight tenants, Poisson arrivals, together 60 % of what the engine was just
measured to serve; then the same with a loud one, once with tenants and once without (all requests one tenant's, so that they wait behind each other). The four
take turns in rounds, each round at the speed that the machine has then; growth is a number a round.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from statistics import median

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


def time_per_token(
    engine: Engine, rates: list[float], seconds: float, seed: int, *, tenants: bool
) -> list[list[float]]:
    """Each tenant's (end - arrival) / tokens in milliseconds, a number a request; ``rates``: requests a second."""
    streams = [
        np.random.default_rng([seed, tenant]) for tenant in range(len(rates))
    ]  # the others send the same whatever the first one does
    arrivals = sorted(
        (float(at), tenant)
        for tenant, (g, rate) in enumerate(zip(streams, rates, strict=True))
        for at in np.cumsum(g.exponential(1 / rate, int(2 * rate * seconds) + 10))
    )
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
    while sum(map(len, taken)) < len(tickets):  # a result may be there before its callback has run
        time.sleep(0.001)
    return taken


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(**SHAPE)).eval()
    base.generation_config.eos_token_id = None
    rows: list[dict[str, object]] = []
    with Engine(base, max_num_seqs=ROWS, max_model_len=PROMPT + TOKENS, max_waiting=1_000_000) as engine:
        for round_ in range(args.rounds):
            most = capacity(engine)
            usual = 0.6 * most / TENANTS
            order = 1 if round_ % 2 else -1
            for tenants in (True, False)[::order]:
                taken = {}
                for loud in (1, LOUD)[::order]:
                    rates = [loud * usual] + [usual] * (TENANTS - 1)
                    taken[loud] = others(time_per_token(engine, rates, args.seconds, round_, tenants=tenants))
                growth = round(taken[LOUD]["p95_ms"] / taken[1]["p95_ms"], 3)
                rows.append(
                    {
                        "tenants": tenants,
                        "requests_a_second": round(most, 2),
                        "calm": taken[1],
                        "loud": taken[LOUD],
                        "growth": growth,
                    }
                )
                print(rows[-1], flush=True)
    for tenants in (True, False):
        growths = sorted(float(str(row["growth"])) for row in rows if row["tenants"] is tenants)
        print(
            f"{'with' if tenants else 'without'} tenants: the others' 95th percentile grows {median(growths)} times ({growths[0]} to {growths[-1]})"
        )
    command = f"python benches/system/fairness.py OUT.jsonl --seconds {args.seconds:g} --rounds {args.rounds}"
    write_rows(args.out, [{"suite": "fairness", "command": command, "loud": LOUD, "shape": SHAPE}, *rows])


def others(taken: list[list[float]]) -> dict[str, float]:
    """The 95th percentile of all but the first tenant together, and the largest of one's own."""
    own = [float(np.percentile(t, 95)) for t in taken[1:]]
    return {
        "p95_ms": round(float(np.percentile(np.concatenate(taken[1:]), 95)), 2),
        "worst_tenant_p95_ms": round(max(own), 2),
    }


if __name__ == "__main__":
    main()
