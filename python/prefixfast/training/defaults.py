"""Defaults of the learning rate and of the number of steps, which depend on other options and on the rows.

docs/training.md shows the measurements that they follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prefixfast.config import PrefixConfig, TrainConfig
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.groups import PrefixGroup, PrefixJob
from prefixfast.training.method import METHODS

PASSES, FEWEST_PASSES = 10, 3
FEWEST_STEPS, MANY_STEPS = 80, 400  # between which the steps of 10 passes are used
# A step of Adam changes the numbers of every layer by about the rate, and the effects of the layers add up. A base of
# many layers also needs a smaller change. The two numbers follow measurements with 6 and with 30 layers.
OF_ONE_LAYER, EXPONENT = 1.5, -1.3
LARGEST = 0.15
CONTINUED = 0.1  # factor for a prefix that is trained further
MLP = 1 / 60  # factor for the reparameterization MLP


def default_learning_rate(init: Any, num_layers: int, *, uses_mlp: bool) -> float:
    """Peak learning rate of a prefix for which none is given.

    Args:
        init: Initial values, of which only a `Prefix` has a rate of its own.
        num_layers: Number of layers of the base model with keys of their own.
        uses_mlp: Whether the reparameterization MLP is trained.

    Example:
        >>> [default_learning_rate("text", layers, uses_mlp=False) for layers in (4, 12, 30)]
        [0.15, 0.059, 0.018]
        >>> default_learning_rate("random", 12, uses_mlp=True)
        0.00098
    """
    rate = _rounded(min(LARGEST, OF_ONE_LAYER * num_layers**EXPONENT))
    return _rounded(rate * (MLP if uses_mlp else 1) * (CONTINUED if isinstance(init, Prefix) else 1))


def _rounded(rate: float) -> float:
    """A rate that people can type."""
    return float(f"{rate:.2g}")


def with_learning_rates(group: PrefixGroup, num_layers: Mapping[PrefixConfig, int]) -> PrefixGroup:
    """A group in which every prefix has a learning rate.

    Args:
        group: Prefixes with the options of the caller.
        num_layers: Number of layers of the base model with keys of their own, by what is learned.
    """

    def resolved(job: PrefixJob) -> PrefixJob:
        if job.config.learning_rate is not None or not METHODS[group.method_config.method].is_trained:
            return job
        of_method = METHODS[group.method_config.method].learning_rate
        rate = of_method or default_learning_rate(job.init, num_layers[job.prefix_config], uses_mlp=job.uses_mlp)
        return replace(job, config=TrainConfig.make(job.config, learning_rate=rate))

    return replace(group, jobs=tuple(resolved(job) for job in group.jobs))


def num_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Number of optimizer steps of a prefix.

    Args:
        config: Options of the prefix.
        steps_per_epoch: Number of steps of one pass over the rows.

    Example:
        >>> [num_steps(TrainConfig(), steps) for steps in (5, 20, 40, 400)]
        [80, 200, 400, 1200]
        >>> num_steps(TrainConfig(num_train_epochs=3), 5)
        15
    """
    if config.max_steps is not None:
        return config.max_steps
    if config.num_train_epochs is not None:
        return max(1, round(steps_per_epoch * config.num_train_epochs))
    within = min(max(PASSES * steps_per_epoch, FEWEST_STEPS), MANY_STEPS)
    return max(within, FEWEST_PASSES * steps_per_epoch)
