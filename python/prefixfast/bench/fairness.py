"""Suite ``fairness``: growth of seven tenants' time per token when an eighth sends ten times what each of them sends.

Arrivals are Poisson. Together the tenants send 60 % of what the engine was just measured to serve. The same load is
measured with each sender as a tenant, and with all requests as one tenant, so that they wait behind each other. The
four runs alternate in rounds, each at the speed that the machine has at that time. Each round gives one growth.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from prefixfast.bench.harness import announce, progress, write_rows
from prefixfast.bench.random_base import make_small
from prefixfast.engine.engine import Engine
from prefixfast.errors import ConfigError

TENANTS, ROWS, TOKENS, PROMPT, LOUD = 8, 16, 20, 10, 10
LOAD = 0.6  # share of the measured capacity that the tenants send together


def run(output: Path, *, seconds: float, rounds: int, command: str) -> list[dict[str, Any]]:
    """Measure, print the table, write ``results.jsonl``.

    Args:
        output: Folder to write to.
        seconds: Seconds for which requests arrive in each run.
        rounds: Number of repetitions.
        command: Command that repeats the measurement.
    """
    base, shape = make_small(64)
    announce(base.dtype, base.device)
    rows: list[dict[str, Any]] = []
    with Engine(base, max_num_seqs=ROWS, max_model_len=PROMPT + TOKENS, max_waiting=1_000_000) as engine:
        for number in progress(range(rounds), "bench, fairness", "rounds"):
            rows += _round(engine, number, seconds)
    head = {"suite": "fairness", "command": command, "loud": LOUD, "shape": shape}
    write_rows(output / "results.jsonl", [head, *rows])
    print(f"{table(rows)}\n\n{output / 'results.jsonl'}")
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the growth of the other tenants' 95th percentile. Several rounds also have a range."""
    several = len(rows) > 2
    range_columns = (" least | greatest |", " ---: | ---: |") if several else ("", "")
    lines = [
        f"| growth of the others' time per token | {'median' if several else 'one round'} |{range_columns[0]}",
        f"| --- | ---: |{range_columns[1]}",
    ]
    for tenants, name in ((True, "each sender is a tenant"), (False, "all are one tenant")):
        growth = [row["growth"] for row in rows if row["tenants"] is tenants]
        spread = f" {min(growth):.2f} | {max(growth):.2f} |" if several else ""
        lines.append(f"| {name} | {median(growth):.2f} |{spread}")
    return "\n".join(lines)


def _round(engine: Engine, number: int, seconds: float) -> list[dict[str, Any]]:
    """Records of one round. Every other round runs in the opposite order."""
    most = capacity(engine)
    usual = LOAD * most / TENANTS
    order = 1 if number % 2 else -1
    rows = []
    for tenants in (True, False)[::order]:
        taken = {}
        for loud in (1, LOUD)[::order]:
            rates = [loud * usual] + [usual] * (TENANTS - 1)
            taken[loud] = _others(_times_per_token(engine, rates, seconds, number, tenants=tenants))
        rows.append(
            {
                "tenants": tenants,
                "requests_a_second": round(most, 2),
                "calm": taken[1],
                "loud": taken[LOUD],
                "growth": round(taken[LOUD]["p95_ms"] / taken[1]["p95_ms"], 3),
            }
        )
    return rows


def capacity(engine: Engine) -> float:
    """Requests a second that the engine serves when all of them are there from the start."""
    prompts = [[3] * PROMPT] * (ROWS * 12)
    engine.generate(prompts[:ROWS], max_new_tokens=TOKENS, progress=False)
    start = time.perf_counter()
    engine.generate(prompts, max_new_tokens=TOKENS, progress=False)
    return len(prompts) / (time.perf_counter() - start)


def _times_per_token(
    engine: Engine, rates: list[float], seconds: float, seed: int, *, tenants: bool
) -> list[list[float]]:
    """Milliseconds per token, (end - arrival) / tokens, of each request of each sender.

    Args:
        engine: Engine that serves the requests.
        rates: Requests a second of each sender.
        seconds: Seconds for which requests arrive.
        seed: Seed of the arrivals.
        tenants: Whether each sender is a tenant, instead of all of them together.
    """
    # One stream a sender, so that the other senders' arrivals do not depend on the first one's rate.
    streams = [np.random.default_rng([seed, tenant]) for tenant in range(len(rates))]
    arrivals = sorted(
        (float(at), tenant)
        for tenant, (g, rate) in enumerate(zip(streams, rates, strict=True))
        for at in np.cumsum(g.exponential(1 / rate, int(2 * rate * seconds) + 10))
    )
    taken: list[list[float]] = [[] for _ in rates]
    tickets, start = [], time.perf_counter()

    def ended(tenant: int, arrival: float, _: object) -> None:
        taken[tenant].append(1e3 * (time.perf_counter() - arrival) / TOKENS)

    for at, tenant in arrivals:
        if at > seconds:
            break
        time.sleep(max(0.0, start + at - time.perf_counter()))
        ticket = engine.submit([3] * PROMPT, max_new_tokens=TOKENS, tenant=str(tenant) if tenants else "all")
        ticket.future.add_done_callback(partial(ended, tenant, start + at))
        tickets.append(ticket)
    for ticket in tickets:
        ticket.result()
    while sum(map(len, taken)) < len(tickets):  # a result can be there before its callback has run
        time.sleep(0.001)
    return taken


def _others(taken: list[list[float]]) -> dict[str, float]:
    """95th percentile over all tenants but the first together, and the largest of a single tenant.

    Raises:
        ConfigError: If a tenant sent no request.
    """
    if not all(taken[1:]):
        msg = "seconds: expected requests of every tenant, at least one sent none in this time; give more seconds"
        raise ConfigError(msg)
    own = [float(np.percentile(t, 95)) for t in taken[1:]]
    together = float(np.percentile(np.concatenate(taken[1:]), 95))
    return {"p95_ms": round(together, 2), "worst_tenant_p95_ms": round(max(own), 2)}
