"""Runs of `train` in one and in two processes. ``rank_cases.py FOLDER CASE...`` pickles the result of each case.

The results of a case are lists by number of processes and rank. Prefixes are tensors by name.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import prefixfast
import tiny
from cut_runs import Cut, CutAt
from prefixfast.store.runs import run_folders
from prefixfast.training.ranks import Ranks, join_ranks
from prefixfast.training.step import StepRunner
from prefixfast.training.trainer import train
from processes import together
from seq2seq import make_seq2seq
from seq2seq import rows as seq2seq_rows
from token_rows import rows

DATA = {"a": rows(0, 5), "b": rows(1, 7), "c": rows(2, 4)}
HOW: dict[str, Any] = {
    "batch_size": 3,
    "prefix_length": 3,
    "learning_rate": 3e-2,
    "init": "random",
    "max_steps": 8,
    "prefix_dropout": 0.2,
    "max_grad_norm": 0.5,
    "save_steps": 2,
    "logging_steps": 1,
    "progress": False,
}
MLP = {"reparameterization": "mlp", "encoder_hidden_size": 16}
HELD_OUT = {"eval_data": rows(9, 5), "eval_steps": 2, "early_stopping_patience": 2}
FAMILIES = ("llama", "gemma2", "gpt_neox", "opt")
OF_ONE_BASE: dict[str, dict[str, Any]] = {
    "mlp": {**MLP, "max_steps": 3, "eval_data": rows(9, 3), "eval_steps": 2, "gradient_checkpointing": True},
    "text": {"init": "text", "init_text": "a", "max_steps": 2},
}
Plan = tuple[str, int, int]
SHORT: list[Plan] = [("output_dir", 2, 1), ("store", 1, 2)]
LONG: list[Plan] = [("output_dir", 1, 3), ("output_dir", 3, 2), ("store", 2, 1), ("store", 2, 3), ("store", 3, 2)]
Case = Callable[[Any, Path], Any]


def tensors(run: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors of the prefixes of a run, or of its weights."""
    return {name: dict(p.kv if hasattr(p, "kv") else p.tensors) for name, p in run.items()}


def about(run: Any) -> dict[str, Any]:
    """What the processes return."""
    return {
        "kv": tensors(run),
        "metrics": run.metrics,
        "failed": run.failed,
        "unchanged": run.unchanged,
        "examples": run.totals.examples,
    }


def files(folder: Path) -> list[str]:
    """Names of the files of a folder, those of runs in a store without the folder of the run."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def batches(model: Any, folder: Path) -> Any:
    """Rows of each step divided, in an output folder, with all options that randomness or sums go into."""

    def work(size: int) -> Any:
        how = {**HOW, **MLP, **HELD_OUT, "overrides": {"a": {"max_steps": 5}}}
        data = {**DATA, "one": rows(7, 1)}  # a step of which one process has no row
        run = train(model, data, output_dir=folder / f"out-{size}", token_budget=40, **how)
        return about(run) | {"log": (folder / f"out-{size}" / "log.jsonl").read_text()}

    found = {size: together(size, lambda size=size: work(size), folder / str(size)) for size in (1, 2)}
    return {"runs": found, "files": {size: files(folder / f"out-{size}") for size in (1, 2)}}


def resumed(model: Any, folder: Path, plans: Sequence[Plan]) -> Any:
    """Runs that end after step 5 and go on with other numbers of processes, and the whole run of one process.

    One prefix has ended before the end of the run. One has a token that the base does not know, so that a process that
    trains it alone has none. Every step of a prefix has 3 examples.

    Args:
        model: Base model.
        folder: Folder for files.
        plans: Name of the argument for the folder, and the numbers of processes before and after.
    """
    data = {name: rows(i, 3 * (i + 1)) for i, name in enumerate("abc")}
    data["lost"] = [{"input_ids": [200, 200], "labels": [-100, 200]}]

    def work(where: dict[str, Path], **how: Any) -> Any:
        return about(train(model, data, overrides={"a": {"max_steps": 3}}, **where, **HOW, **how))

    found: dict[str, Any] = {"whole": together(1, lambda: work({}), folder / "whole"), "left": {}, "runs": {}}
    for plan in plans:
        argument, before, after = plan
        place = folder / "-".join(map(str, plan))
        where = {argument: place / "out"}
        cut = together(before, lambda where=where: work(where, callbacks=[CutAt(5)]), place / "cut")
        assert all("Cut" in text for text in cut), cut
        found["runs"][plan] = together(after, lambda where=where: work(where, resume=True), place / "resumed")
        found["left"][plan] = [name for name in files(place / "out") if "checkpoint" in name]
    return found


def prefixes(model: Any, folder: Path) -> Any:
    """Prefixes divided, into one store; the rows of one are malformed."""

    def work(size: int) -> Any:
        counts = {"sums": 0, "steps": 0}
        step, add = StepRunner.step, Ranks.sum_

        def counted_step(self: Any, *args: Any) -> Any:
            counts["steps"] += 1
            return step(self, *args)

        def counted_sum(self: Any, tensors: Any) -> None:
            counts["sums"] += self.size > 1
            add(self, tensors)

        StepRunner.step, Ranks.sum_ = counted_step, counted_sum  # type: ignore[method-assign]
        data = {**DATA, "bad": [{"input_ids": []}], "two": rows(5, 2)}
        return about(train(model, data, store=folder / f"store-{size}", **HOW)) | counts

    found = {size: together(size, lambda size=size: work(size), folder / str(size)) for size in (1, 2)}
    stores = {size: prefixfast.PrefixStore(folder / f"store-{size}") for size in found}
    ran = {
        size: [json.loads((run / "run.json").read_text())["names"] for run in run_folders(s.path)]
        for size, s in stores.items()
    }
    return {"runs": found, "stored": {size: tensors(s) for size, s in stores.items()}, "names": ran}


def methods(model: Any, folder: Path) -> Any:
    """Rows of each step divided, by all methods that take steps, and of an encoder-decoder base; a store of groups."""
    bart = prefixfast.load(make_seq2seq("bart").double())
    short = {"batch_size": 3, "max_steps": 3, "max_grad_norm": 0.5, "learning_rate": 1e-2, "progress": False}
    own = {
        "infix": {"method": "infix", "prefix_length": 3, "init": "random"},
        "embedding": {"method": "embedding", "prefix_length": 3, "init": "random"},
        "lora": {"method": "lora", "lora_rank": 2},
        "prefix+lora": {"method": "prefix+lora", "lora_rank": 2, "prefix_length": 3, "init": "random"},
        "adapter": {"method": "adapter"},
        "full": {"method": "full", "loss": "sequence_sum"},
        "sites": {"prefix_length": 3, "init": "random", "prefix_dropout": 0.2},
        "groups": {"prefix_length": 3, "init": "random", "sweep": {"loss": ["token_mean", "sequence_sum"]}},
    }

    def work(name: str, size: int) -> Any:
        place = {"store": folder / f"store-{size}"} if name == "groups" else {}
        base, data = (bart, {"a": seq2seq_rows(0), "b": seq2seq_rows(1, 1)}) if name == "sites" else (model, DATA)
        return about(train(base, data, **short, **own[name], **place))

    return {
        name: {n: together(n, lambda n=n, name=name: work(name, n), folder / f"{name} {n}") for n in (1, 2)}
        for name in own
    }


def failures(model: Any, folder: Path) -> Any:
    """A failure of one process, in a step, in a callback and in its data."""

    def in_step() -> Any:
        step = StepRunner._batch_losses

        def fails(self: Any, number: int, active: Any) -> Any:
            if self.ranks.rank == 1 and number == 3:
                msg = "memory is broken"
                raise ValueError(msg)
            return step(self, number, active)

        StepRunner._batch_losses = fails  # type: ignore[method-assign]
        return train(model, DATA, **HOW)

    def in_callback() -> Any:
        return train(model, DATA, callbacks=[CutAt(8)], **HOW)

    def other_data() -> Any:
        return train(model, rows(int(os.environ["RANK"]), 5), **HOW)

    def no_pickle() -> Any:
        ranks = join_ranks()
        with ranks.together():
            return ranks.first(lambda: lambda: 0)

    def memory() -> Any:
        """Memory runs out once on one process, in the middle of a step."""
        plain, loss, calls = tensors(train(model, DATA, **HOW)), StepRunner._token_losses, []

        def fails(self: Any, micro: Any) -> Any:
            calls.append(micro)
            if self.ranks.rank == 1 and len(calls) == 4:
                raise torch.OutOfMemoryError
            return loss(self, micro)

        StepRunner._token_losses = fails  # type: ignore[method-assign]
        again = tensors(train(model, DATA, **HOW))
        return max((again[n][t] - plain[n][t]).abs().max().item() for n in plain for t in plain[n]), len(calls)

    def killed() -> Any:
        class Kills:
            def on_step(self, step: int, *_: Any) -> None:
                if step == 3:
                    os.kill(os.getpid(), signal.SIGKILL)

        return train(model, DATA, callbacks=[Kills()], **HOW)

    def again() -> Any:
        """The processes go on after a failure."""
        import contextlib

        with contextlib.suppress(Cut, prefixfast.PrefixFastError):
            in_callback()
        return len(train(model, DATA, **HOW))

    works = {
        "step": in_step,
        "callback": in_callback,
        "data": other_data,
        "killed": killed,
        "no pickle": no_pickle,
        "memory": memory,
        "again": again,
    }
    return {name: together(2, work, folder / name) for name, work in works.items()}


def sharded(model: Any, folder: Path, families: Sequence[str]) -> Any:
    """Base models whose layers two processes hold together, and a failure of one of them."""
    from transformers import AutoTokenizer

    from prefixfast.demo import BASE
    from prefixfast.model import sharded_base

    shard = sharded_base.shard

    def work(base: Path, **how: Any) -> Any:
        held: list[dict[str, int]] = []

        class Counts:
            """Counts the numbers that this process holds, after the base was divided and after the last step."""

            def on_train_end(self, run: Any) -> None:
                count(models[0])

        def count(own: Any) -> None:
            held.append({})
            for p in own.hf.parameters():
                key, local = ("divided", p.to_local()) if hasattr(p, "to_local") else ("whole", p)
                held[-1][key] = held[-1].get(key, 0) + local.untyped_storage().nbytes() // local.element_size()

        def counted(own: Any) -> None:
            shard(own)
            models.append(own)
            count(own)

        models: list[Any] = []
        sharded_base.shard = counted
        how = {
            **HOW,
            "dtype": "float64",
            "token_budget": 40,
            "callbacks": [Counts()] if "shard_base" in how else [],
            **how,
        }
        return about(train(base, {**DATA, "one": rows(7, 1)}, **how)) | {"held": held}

    def fails(base: Path) -> Any:
        loss = StepRunner._token_losses

        def wrong(self: Any, micro: Any) -> Any:
            if self.ranks.rank == 1:
                msg = "memory is broken"
                raise ValueError(msg)
            return loss(self, micro)

        StepRunner._token_losses = wrong  # type: ignore[method-assign]
        return work(base, shard_base=True)

    found: dict[str, Any] = {}
    for family in families:
        base = folder / f"base-{family}"
        made = tiny.make(family)
        made.save_pretrained(base)
        AutoTokenizer.from_pretrained(BASE).save_pretrained(base)
        for name, how in OF_ONE_BASE.items():
            one = together(1, lambda base=base, how=how: work(base, **how), folder / "one")
            two = together(2, lambda base=base, how=how: work(base, **how, shard_base=True), folder / "two")
            found[f"{family} {name}"] = {1: one, 2: two}
        layers = sum(p.numel() for n, p in made.named_parameters() if ".h." in n or ".layers." in n)
        found[f"{family} sizes"] = {"layers": layers, "all": sum(p.numel() for p in made.parameters())}
    found["failure"] = together(2, lambda: fails(base), folder / "failure")
    return found


CASES: dict[str, Case] = {
    "batches": batches,
    "prefixes": prefixes,
    "failures": failures,
    "methods": methods,
    "sharded": functools.partial(sharded, families=["gpt2"]),
    "sharded_long": functools.partial(sharded, families=FAMILIES),
    "resumed": functools.partial(resumed, plans=SHORT),
    "resumed_long": functools.partial(resumed, plans=LONG),
}


def main(folder: Path, names: list[str]) -> None:
    """Run cases."""
    torch.set_num_threads(1)
    model = prefixfast.load(tiny.make("gpt2", dtype=torch.float64))
    for name in names:
        found = CASES[name](model, folder / name)
        (folder / f"{name}.pickle").write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
