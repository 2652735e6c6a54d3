"""One loud tenant does not slow the others down: the scheduler in simulated time, one unit a step."""

import numpy as np
import pytest

from prefixfast._rust import Scheduler

TENANTS, ROWS, TOKENS, STEPS = 8, 16, 20, 3000


def time_per_token(loads: list[float], *, fair: bool) -> list[float]:
    """The 95th percentile of (end - arrival) / tokens of each tenant; ``loads``: requests that each sends in a step."""
    g = np.random.default_rng(0)
    scheduler = Scheduler(64 + 16 * 200, ROWS, 4096)
    out = np.zeros(1 << 16, np.int32)
    arrived: dict[int, tuple[int, int]] = {}
    taken: list[list[float]] = [[] for _ in loads]
    left: dict[int, int] = {}
    number = 0
    for now in range(STEPS):
        for tenant, count in enumerate(g.poisson(loads)):
            for _ in range(count):
                scheduler.add(number, [], 10, 1, TOKENS, tenant=tenant if fair else 0)
                arrived[number] = (tenant, now)
                number += 1
        header = scheduler.plan_step(out)
        left |= dict.fromkeys(header.prefill_ids, TOKENS)
        for id in header.decode_ids:
            left[id] -= 1
        done = [id for id in header.decode_ids if not left[id]]
        for id in done:
            tenant, then = arrived[id]
            taken[tenant].append((now - then) / TOKENS)
        scheduler.commit(done)
    return [float(np.percentile(t, 95)) for t in taken]


@pytest.mark.parametrize("fair", [True, False])
def test_ten_times_the_load_of_one_tenant(fair):
    usual = 0.6 * ROWS / TOKENS / TENANTS  # together 60 % of what the rows can do
    calm = time_per_token([usual] * TENANTS, fair=fair)
    loud = time_per_token([10 * usual] + [usual] * (TENANTS - 1), fair=fair)
    growth = max(after / before for before, after in zip(calm[1:], loud[1:], strict=True))
    if fair:
        assert growth < 2, growth
    else:
        assert growth > 2, "without tenants all would wait behind the loud one: the measure can fail"
