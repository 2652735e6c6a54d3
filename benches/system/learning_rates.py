r"""Held-out loss by learning rate of keys and values, of keys and values in units of their RMS, and of the MLP.

    python benches/system/learning_rates.py MODEL --data FOLDER -o OUT.jsonl

In *units* of the root mean square (RMS) of the base's own keys or values in a layer, a prefix is a factor for each
number, and the same change of a factor changes every layer in proportion. With Adam this is a learning rate of each
tensor, the rate times the RMS. Random initial values are drawn in the same units. The way is not an option of
prefixfast, because it was not better: this script puts it in place of the usual one. A finished run is one JSON line of
the output file, and a run whose line is there is skipped. Data are those of `default_settings`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from default_settings import Row, key, run_cell

import prefixfast
from prefixfast.training import parameters
from prefixfast.training.methods import prefix as method
from prefixfast.training.prefix_tensor import PrefixTensor

TEXT = "Describe the restaurant in one sentence: name, food, price and area."
RATES = {"flat": [0.003, 0.01, 0.03, 0.1, 0.3], "rms": [0.003, 0.01, 0.03, 0.1, 0.3], "mlp": [3e-4, 1e-3, 3e-3, 1e-2]}


@contextlib.contextmanager
def units(rms: list[float]) -> Iterator[None]:
    """Train keys and values in units of the RMS of each layer's keys and values, in the order k0, v0, k1, ..."""
    factors, draw = itertools.cycle(rms), parameters._random_kv

    def tensor(t: torch.Tensor, owners: torch.Tensor | None = None) -> PrefixTensor:
        return PrefixTensor(t, owners, next(factors))

    def random(*args: Any) -> list[Any]:
        return [(k * rms[2 * i], v * rms[2 * i + 1]) for i, (k, v) in enumerate(draw(*args))]

    with mock.patch.object(method, "PrefixTensor", tensor), mock.patch.object(parameters, "_random_kv", random):
        yield


def main() -> None:
    """Run what the output file lacks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--task", default="e2e")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--kinds", nargs="+", default=list(RATES), choices=RATES)
    parser.add_argument("--inits", nargs="+", default=["text", "random"])
    parser.add_argument("--rates", nargs="+", type=float, help="rates of all kinds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = prefixfast.load(given.model, dtype=given.dtype)
    kv = prefixfast.Prefix.from_text(model, TEXT).tensors
    rms = [float(t.float().square().mean().sqrt()) for t in kv.values()]
    done = set()
    if given.output.exists():
        lines = map(json.loads, given.output.read_text(encoding="utf8").splitlines())
        done = {line["kind"] + key(line) for line in lines if "kind" in line}
    how: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {"rms": lambda: units(rms)}
    for init, kind in itertools.product(given.inits, given.kinds):
        common: Row = {"kind": kind, "base": Path(given.model).name, "dtype": given.dtype, "init": init, "words": 40}
        common |= {"task": given.task, "rows": given.rows, "steps": "default"}
        common |= {"options": {"reparameterization": "mlp" if kind == "mlp" else "none"}}
        wanted = [common | {"seed": s, "rate": r} for s in given.seeds for r in given.rates or RATES[kind]]
        with how.get(kind, contextlib.nullcontext)():
            if missing := [line for line in wanted if kind + key(line) not in done]:
                run_cell(model, given.data, missing, given.output)


if __name__ == "__main__":
    main()
