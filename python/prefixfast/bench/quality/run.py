"""Run of the quality suite: train with one implementation, evaluate, write the result."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from prefixfast.bench.harness import announce
from prefixfast.bench.quality import peft_run, prefixfast_run
from prefixfast.bench.quality.settings import Run
from prefixfast.io.atomic import replace_file
from prefixfast.io.environment import environment
from prefixfast.metrics.bleu import bleu
from prefixfast.model.base import DTYPES

Implementation = Literal["prefixfast", "peft", "none"]
IMPLEMENTATIONS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "prefixfast": prefixfast_run.train_and_evaluate,
    "peft": peft_run.train_and_evaluate,
    "none": peft_run.evaluate_base,
}


def run(settings: Run, implementation: Implementation, threads: int) -> dict[str, Any]:
    """Train, evaluate, print the figures, write ``results.json`` and the trained prefix.

    Args:
        settings: The run.
        implementation: Implementation that trains and generates. ``none`` evaluates the base without a prefix.
        threads: Number of CPU threads.

    Raises:
        MetricUnavailable: If sacrebleu is missing, which the evaluation needs.
    """
    if settings.steps is None:
        bleu([""], [[""]])  # fails here, not after the training, if sacrebleu is missing
    announce(DTYPES[settings.dtype], torch.device("cpu"))
    head = {"impl": implementation, "setting": settings.name, "dtype": settings.dtype, "threads": threads}
    with _process_settings(settings.dtype, threads):
        result = head | IMPLEMENTATIONS[implementation](settings)
    machine = environment()
    result |= {"cpu": machine["cpu"], "flags": " ".join(machine["cpu_flags"])}
    path = settings.output / "results.json"
    replace_file(path, json.dumps(result, indent=1, ensure_ascii=False).encode())
    for name, value in result.items():
        if not isinstance(value, (list, dict)):
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"\n{path}")
    return result


@contextlib.contextmanager
def _process_settings(dtype: str, threads: int) -> Iterator[None]:
    """Context manager of a run's number of CPU threads and, in fp64, of norms that do not round to fp32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return out

    before, norm = torch.get_num_threads(), LlamaRMSNorm.forward
    torch.set_num_threads(threads)
    if dtype == "float64":
        LlamaRMSNorm.forward = forward
    try:
        yield
    finally:
        torch.set_num_threads(before)
        LlamaRMSNorm.forward = norm
