"""A researcher's sweep: prefix length and learning rate on one task, held-out loss, report and plot.

``python examples/research.py`` writes ``research/report.md`` and ``research/losses.png``. The plot needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path

import prefixfast
from prefixfast.demo import BASE
from prefixfast.demo.jobs import JOBS

FOLDER = Path("research")
SWEEP = {"prefix_length": [4, 16], "learning_rate": [0.02, 0.2]}


def main() -> None:
    """Train every combination, and compare the losses on held-out rows."""
    FOLDER.mkdir(exist_ok=True)
    train_rows, held_out = (JOBS[2].rows(split, count, seed=0) for split, count in (("train", 24), ("heldout", 6)))
    with prefixfast.load(BASE, dtype="float32") as base:
        # 1. Every combination is trained. Those of one prefix length share their batches.
        run = prefixfast.train(
            base,
            train_rows,
            eval_data=held_out,
            eval_steps=6,
            sweep=SWEEP,
            max_steps=12,
            batch_size=8,
            progress=False,
        )
        for name, metrics in sorted(run.metrics.items(), key=lambda item: item[1]["eval_loss"]):
            print(f"{name}: held-out loss {metrics['eval_loss']:.3f}")

        # 2. The best one, a report of all, and their losses over the steps.
        run.report(FOLDER / "report.md")
        run.plot(FOLDER / "losses.png")
        best = run.best()
        print(f"best: {best.length} prefix rows, digest {best.digest[:12]}")

        # 3. The held-out loss again, as the mean log-probability of a target token.
        scores = prefixfast.score(held_out, best, model=base, end_token=True)
        mean = sum(s.logprob for s in scores) / sum(len(s.token_ids) for s in scores)
        print(f"scored again: held-out loss {-mean:.3f}")


if __name__ == "__main__":
    main()
