"""`train_users` with two workers against `train`, also when a worker is killed; `Generator` on batches of columns."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import prefixfast
from prefixfast import PrefixStore
from prefixfast.errors import ConfigError, DataError
from prefixfast.integrations import ray as on_ray
from prefixfast.integrations.ray import Generator, train_users
from prefixfast.training.trainer import train
from token_rows import rows

USERS = {f"user {i}": rows(i, 4) for i in range(5)}
HOW = {
    "batch_size": 2,
    "prefix_length": 3,
    "init": "random",
    "max_steps": 8,
    "save_steps": 2,
    "learning_rate": 1e-2,
    "dtype": "float32",
}
PER_TASK = 2


class Killer:
    """Kills the process of its run at a step, once in all processes."""

    def __init__(self, step: int, mark: Path) -> None:
        self.step, self.mark = step, mark

    def on_step(self, step, losses, grad_norms, active):
        if step == self.step and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def alone(base, users):
    """Digests by name of the same tasks without Ray."""
    names, found = list(users), {}
    for start in range(0, len(names), PER_TASK):
        run = train(base, {n: users[n] for n in names[start : start + PER_TASK]}, progress=False, **HOW)
        found |= {n: p.digest for n, p in run.items()}
    return found


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(600)
@pytest.mark.long
def test_two_workers_have_the_digests_of_one_process(cluster, folder, tmp_path):
    users = {**USERS, "lost": [{"input_ids": [200, 200], "labels": [-100, 200]}], "odd": [{}]}
    run = train_users(folder, users, store=tmp_path / "store", users_per_task=PER_TASK, **HOW)
    expected = alone(folder, USERS)
    assert {n: p.digest for n, p in run.items()} == expected
    assert [*run.failed] == ["lost", "odd"]
    store = PrefixStore(tmp_path / "store")
    assert {n: p.digest for n, p in store.items()} == expected
    assert run.totals.examples == sum(m["steps"] * 2 for m in run.metrics.values())
    again = train_users(folder, users, store=tmp_path / "store", users_per_task=PER_TASK, **HOW)
    assert {*again.unchanged} == {*USERS}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(600)
@pytest.mark.long
def test_a_killed_worker_costs_the_time_since_the_last_checkpoint(cluster, folder, tmp_path):
    killer = Killer(5, tmp_path / "mark")
    run = train_users(folder, USERS, store=tmp_path / "store", users_per_task=PER_TASK, callbacks=[killer], **HOW)
    assert (tmp_path / "mark").exists()
    assert {n: p.digest for n, p in run.items()} == alone(folder, USERS)
    whole = sum(m["steps"] * 2 for m in run.metrics.values())
    # The second process of the task begins at the checkpoint of step 4 with its two users, or its one.
    assert run.totals.examples in (whole - 4 * 2 * PER_TASK, whole - 4 * 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(600)
@pytest.mark.long
def test_errors_of_a_task_are_raised(cluster, folder, tmp_path):
    with pytest.raises(ConfigError, match="rate"):
        train_users(folder, USERS, store=tmp_path, rate=3)
    with pytest.raises(DataError, match="no prefix is left"):
        train_users(folder, {"odd": [{}]}, store=tmp_path)


class FakeRay:
    """The part of Ray that `train_users` calls, in this process."""

    exceptions = SimpleNamespace(RayTaskError=RuntimeError)

    def __init__(self) -> None:
        self.options = {}
        self.sizes = []

    def is_initialized(self):
        return True

    def put(self, value):
        return value

    def remote(self, **options):
        self.options = options

        def made(function):
            class Remote:
                @staticmethod
                def remote(shared, rows, arguments):
                    self.sizes.append(len(rows))
                    value = function(shared, rows, arguments)
                    return type("Future", (), {"value": value})()

            return Remote

        return made

    def wait(self, futures, num_returns):
        return futures[-1:], futures[:-1]  # the last one ends first

    def get(self, future):
        return future.value

    def cancel(self, future, force):
        raise AssertionError


def test_users_are_divided_into_tasks_of_fixed_size(folder, tmp_path, monkeypatch):
    fake = FakeRay()
    monkeypatch.setattr(on_ray, "_import_ray", lambda: fake)
    users = {**dict(list(USERS.items())[:3]), "odd": [{}]}
    how = {**HOW, "max_steps": 2}
    run = train_users(
        folder,
        users,
        store=tmp_path / "store",
        users_per_task=PER_TASK,
        resources={"num_cpus": 2},
        overrides={"user 2": {"prefix_length": 4}},
        eval_data={name: rows(9, 2) for name in users},
        **how,
    )
    assert fake.options == {"max_retries": 3, "num_cpus": 2}
    assert fake.sizes == [2, 2]
    assert list(run) == ["user 0", "user 1", "user 2"]
    assert [p.length for p in run.values()] == [3, 3, 4]
    assert [*run.failed] == ["odd"]
    assert all("eval_loss" in m for m in run.metrics.values())
    first, second = (dict(list(USERS.items())[part]) for part in (slice(2), slice(2, 3)))
    digests = {}
    for part, own in ((first, {}), (second, {"overrides": {"user 2": {"prefix_length": 4}}})):
        done = train(folder, part, eval_data={n: rows(9, 2) for n in part}, progress=False, **how, **own)
        digests |= {n: p.digest for n, p in done.items()}
    assert {n: p.digest for n, p in run.items()} == digests
    prefixfast.unload()


def test_a_folder_of_files_is_read_by_the_tasks(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, "_import_ray", FakeRay)
    for name in ("ann", "bob"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    run = train_users(folder, tmp_path, store=PrefixStore(tmp_path / "store"), **{**HOW, "max_steps": 1})
    assert list(run) == ["ann", "bob"]
    prefixfast.unload()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "store"),
        ({"store": "s", "output_dir": "out"}, "output_dir"),
        ({"store": "s", "resume": False}, "resume"),
        ({"store": "s", "prefix_column": "user"}, "prefix_column"),
        ({"store": "s", "shard_base": True}, "shard_base"),
        ({"store": "s", "users_per_task": 0}, "users_per_task"),
        ({"store": "s", "max_retries": -1}, "max_retries"),
    ],
)
def test_arguments_without_a_meaning_are_refused(how, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        train_users("base", USERS, **how)
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_base_and_plain_rows_are_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="model: expected a hub id or a folder"):
        train_users(base, USERS, store=tmp_path)
    with pytest.raises(ConfigError, match="users: expected a mapping"):
        train_users("base", rows(0, 2), store=tmp_path)


def test_processes_of_torchrun_are_refused(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="got 2 of torchrun"):
        train_users("base", USERS, store=tmp_path)


def test_ray_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'prefixfast\[ray\]'"):
        train_users("base", USERS, store=tmp_path)


@pytest.fixture(scope="module")
def generator(folder, tmp_path_factory, make_prefix):
    place = tmp_path_factory.mktemp("generator")
    with prefixfast.load(folder, dtype="float32") as model:
        train(model, dict(list(USERS.items())[:2]), store=place, progress=False, **{**HOW, "max_steps": 1})
    made = Generator(
        str(folder),
        store=place,
        columns=["prompt"],
        params={"max_new_tokens": 4},
        config={"dtype": "float32", "max_model_len": 64},
    )
    yield made, place
    made.engine.close()


def test_each_row_of_a_batch_is_generated_with_its_prefix(generator, folder):
    made, place = generator
    prompts, names = ["one", "two", "three", "four"], ["user 0", "user 1", "", "nobody"]
    batch = {
        "prompt": np.array(prompts),
        "prefix": np.array(names, object),
        "note": np.arange(4),
        "score": np.ones((4, 2)),
    }
    out = made(batch)
    assert {*out} == {*batch, "generated_text", "generated_text_error"}
    store = PrefixStore(place)
    expected = prefixfast.generate(
        prompts[:3],
        [store["user 0"], store["user 1"], None],
        model=folder,
        max_new_tokens=4,
        dtype="float32",
        max_model_len=64,
    )
    assert out["generated_text"].tolist() == [*(g.text for g in expected), ""]
    assert out["generated_text_error"][:3].tolist() == [""] * 3
    assert "nobody" in out["generated_text_error"][3]
    assert out["score"] is batch["score"]
    prefixfast.unload()


def test_columns_that_are_missing_are_named(generator):
    made, _ = generator
    with pytest.raises(ConfigError, match=r"expected \['prefix'\] in the dataset"):
        made({"prompt": np.array(["a"])})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(600)
@pytest.mark.long
def test_a_ray_dataset_is_generated(cluster, generator, folder):
    import ray.data

    made, place = generator
    items = [{"prompt": "a" * (i + 1), "prefix": ("user 0", "user 1", None)[i % 3]} for i in range(6)]
    how = {"model": str(folder), "store": str(place), "columns": ["prompt"], "params": {"max_new_tokens": 3}}
    how["config"] = {"dtype": "float32", "max_model_len": 64}
    texts = ray.data.from_items(items).map_batches(Generator, fn_constructor_kwargs=how, concurrency=1, batch_size=3)
    names = [item["prefix"] for item in items]
    expected = made.engine.generate([i["prompt"] for i in items], names, max_new_tokens=3)
    found = {row["prompt"]: row["generated_text"] for row in texts.take_all()}
    assert found == {i["prompt"]: g.text for i, g in zip(items, expected, strict=True)}
