"""A tenant with many requests does not slow others down. The scheduler runs in simulated time, one unit per step."""

import numpy as np
import pytest

from prefixfast._rust import Scheduler

TENANTS, ROWS, TOKENS, STEPS = 8, 16, 20, 3000


def time_per_token(loads: list[float], *, fair: bool) -> list[float]:
    """95th percentile of (end - arrival) / tokens of each tenant.

    ``loads`` is the mean number of requests per step of each tenant.
    """
    g = np.random.default_rng(0)
    scheduler = Scheduler(64 + 16 * 200, ROWS, 4096)
    out = np.zeros(1 << 16, np.int32)
    arrived: dict[int, tuple[int, int]] = {}
    times: list[list[float]] = [[] for _ in loads]
    tokens_left: dict[int, int] = {}
    number = 0
    for now in range(STEPS):
        for tenant, count in enumerate(g.poisson(loads)):
            for _ in range(count):
                scheduler.add(number, [], 10, 1, TOKENS, tenant=tenant if fair else 0)
                arrived[number] = (tenant, now)
                number += 1
        header = scheduler.plan_step(out)
        tokens_left |= dict.fromkeys(header.prefill_ids, TOKENS)
        for id in header.decode_ids:
            tokens_left[id] -= 1
        done = [id for id in header.decode_ids if not tokens_left[id]]
        for id in done:
            tenant, arrival = arrived[id]
            times[tenant].append((now - arrival) / TOKENS)
        scheduler.commit(done)
    return [float(np.percentile(t, 95)) for t in times]


@pytest.mark.parametrize("fair", [True, False])
def test_tenfold_load_of_one_tenant(fair):
    usual = 0.6 * ROWS / TOKENS / TENANTS  # together 60 % of the capacity of the rows
    before = time_per_token([usual] * TENANTS, fair=fair)
    after = time_per_token([10 * usual] + [usual] * (TENANTS - 1), fair=fair)
    growth = max(b / a for a, b in zip(before[1:], after[1:], strict=True))
    if fair:
        assert growth < 2, growth
    else:
        assert growth > 2, "without tenants all requests wait behind those of the busy tenant, so the test can fail"
