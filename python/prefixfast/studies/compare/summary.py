"""`Summary` of a comparison: mean and spread of every measure of every method."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixfast.errors import ConfigError, shown
from prefixfast.io.text import counted
from prefixfast.metrics.registry import better_side
from prefixfast.metrics.result import Better

LOSS = "dev loss"
FEWEST_SEEDS = 3  # of each method of a clear difference
COSTS = {
    "trained": "num_trained",
    "stored": "num_stored",
    "disk bytes": "disk_bytes",
    "memory bytes": "memory_bytes",
    "train s": "train_seconds",
    "s/step": "seconds_per_step",
    "peak bytes": "train_peak_bytes",
    "s/text": "generate_seconds_per_text",
}


@dataclass(frozen=True)
class Spread:
    """Values of a measure over the seeds.

    Attributes:
        values: Value of each seed.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation, None with one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """Values of JSON: ``mean``, ``sd``, ``min``, ``max`` and ``values``. With one seed there is no spread."""
        if self.deviation is None:
            return {"mean": self.mean, "values": list(self.values)}
        spread = {"sd": self.deviation, "min": min(self.values), "max": max(self.values)}
        return {"mean": self.mean, **spread, "values": list(self.values)}


@dataclass(frozen=True)
class MethodResult:
    """Results of one method.

    Attributes:
        label: Name of the method with its options.
        seeds: Seeds, ascending.
        quality: Loss on the held-out rows and scores of the texts, by name.
        costs: Costs of one user, by the names of `COSTS`. A cost that was not measured is missing.
        base_bytes: Size of the base's parameters in bytes.
    """

    label: str
    seeds: tuple[int, ...]
    quality: Mapping[str, Spread]
    costs: Mapping[str, Spread]
    base_bytes: int

    def users(self, memory: float) -> int:
        """Number of users whose numbers fit into memory beside the base.

        Args:
            memory: Memory in bytes.
        """
        return max(0, int((memory - self.base_bytes) // self.costs["memory bytes"].mean))


@dataclass(frozen=True)
class Summary:
    """Results of all methods of a comparison.

    Attributes:
        methods: Results of each method, in the order of the results.
        missing: Reason why a metric has no score, by the metric's name.
        title: Description of base, rows, dtype and machine.
        better: Better side of loss and scores, by name.
    """

    methods: Sequence[MethodResult]
    missing: Mapping[str, str]
    title: str
    better: Mapping[str, Better | None]

    @property
    def qualities(self) -> list[str]:
        """Names of loss and scores that a method has."""
        return list(dict.fromkeys(name for m in self.methods for name in m.quality))

    def clear_differences(self, name: str) -> list[tuple[str, str]]:
        """Pairs of methods in which every seed of the first is better than every seed of the second.

        Methods with fewer than `FEWEST_SEEDS` seeds are in no pair, nor is any in a score without a better side.

        Args:
            name: Name of the loss or of a score.
        """
        if (better := self.better.get(name)) is None:
            return []
        sign = 1 if better == "higher" else -1
        found = {m.label: [sign * v for v in m.quality[name].values] for m in self.methods if name in m.quality}
        enough = {label: values for label, values in found.items() if len(values) >= FEWEST_SEEDS}
        return [(a, b) for a, x in enough.items() for b, y in enough.items() if min(x) > max(y)]


def summarize(lines: Sequence[Mapping[str, Any]], shared: str) -> Summary:
    """Summary of the runs of one comparison.

    Args:
        lines: Lines of the results file. Those of other rows, bases or options are left out.
        shared: Identity of the comparison.

    Raises:
        ConfigError: If no run has finished.
    """
    own = [line for line in lines if line["shared"] == shared]
    if not own:
        msg = f"compare: expected results of this comparison ({shown(shared[:8])}), got none"
        raise ConfigError(msg)
    labels = list(dict.fromkeys(line["label"] for line in own))
    methods = [_method([line for line in own if line["label"] == label]) for label in labels]
    missing = {name: reason for line in own for name, reason in line["quality"]["missing"].items()}
    scores = {name: score for line in own for name, score in line["quality"]["scores"].items()}
    # A line that an earlier version wrote has no side.
    sides = {n: s["better"] if "better" in s else better_side(n) for n, s in scores.items()}
    return Summary(methods, missing, _title(own), {LOSS: "lower", **sides})


def _method(lines: Sequence[Mapping[str, Any]]) -> MethodResult:
    by_seed = sorted(lines, key=lambda line: line["seed"])
    losses = [{LOSS: line["metrics"].get("eval_loss")} for line in by_seed]
    scores = [{n: v["value"] for n, v in line["quality"]["scores"].items()} for line in by_seed]
    costs = [{title: line["costs"].get(name) for title, name in COSTS.items()} for line in by_seed]
    quality = _spreads([loss | score for loss, score in zip(losses, scores, strict=True)])
    base = max(line["costs"]["base_bytes"] for line in by_seed)
    return MethodResult(by_seed[0]["label"], tuple(line["seed"] for line in by_seed), quality, _spreads(costs), base)


def _spreads(rows: Sequence[Mapping[str, float | None]]) -> dict[str, Spread]:
    """Spread of every measure that each row has."""
    found = {name: tuple(v for row in rows if (v := row.get(name)) is not None) for name in rows[0]}
    return {name: Spread(values) for name, values in found.items() if len(values) == len(rows)}


def _title(lines: Sequence[Mapping[str, Any]]) -> str:
    first = lines[0]
    counts, machine = first["counts"], first["environment"]
    rows = f"{counted(counts['train_rows'], 'training row')}, {counted(counts['held_out_rows'], 'held-out row')}"
    rows += f" of {counted(counts['inputs'], 'input')}"
    cpus = " and ".join(dict.fromkeys(line["environment"]["cpu"] for line in lines))
    threads = " or ".join(dict.fromkeys(counted(line["environment"]["threads"], "thread") for line in lines))
    where = f"{machine['gpu']}" if first["device"] != "cpu" else f"{cpus}, {threads}"
    return f"{first['study']['model']} in {first['dtype']}, task {first['task']}, {rows}, {where}"
