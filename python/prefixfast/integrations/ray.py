"""`train_users` and `Generator`: prefixes of many users trained and used on a Ray cluster.

`train_users` needs the extra ``ray``. `Generator` is a class for ``map_batches`` of Ray Data.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from prefixfast.config import EngineConfig, GenerationParams
from prefixfast.config.json_types import JSON
from prefixfast.data.folder import Folder
from prefixfast.data.rows import Rows
from prefixfast.errors import ConfigError, check_string, shown
from prefixfast.io.paths import as_path
from prefixfast.io.progress import Progress
from prefixfast.store import PrefixStore, open_store
from prefixfast.store.runs import drop_finished
from prefixfast.training.arguments import AllTrainArguments
from prefixfast.training.ranks import rank_and_size
from prefixfast.training.run_parts import RunPart, merge_parts
from prefixfast.training.train_run import RunTotals, TrainRun

if TYPE_CHECKING:
    import numpy as np

SAVE_STEPS = 50  # between checkpoints, from which the users of a killed worker go on
REFUSED = {
    "output_dir": "the workers write into one store",
    "resume": "every task goes on from what the store holds",
    "overwrite": "the store keeps an earlier prefix as a version",
    "prefix_column": "give a mapping of names to rows, which is divided",
    "progress": "the workers have no terminal",
    "shard_base": "each worker holds a base model of its own",
}
BY_NAME = ("eval_data", "init", "overrides")  # arguments that can be mappings of names

logger = logging.getLogger(__name__)


def train_users(
    model: str | Path,
    users: Mapping[str, Rows] | str | Path,
    *,
    users_per_task: int = 64,
    max_retries: int = 3,
    resources: Mapping[str, JSON] | None = None,
    **arguments: Unpack[AllTrainArguments],
) -> TrainRun:
    """Train one prefix for each user on the workers of a Ray cluster, into one store.

    A task trains the prefixes of some users as one call of `train`. The users of a task depend on their order and on
    ``users_per_task`` alone, so that the prefixes do not depend on the number of workers. A task whose worker is killed
    runs again, keeps the users that it has finished, and goes on from the last checkpoint of the others. Users that the
    store holds with the same rows and options are not trained again.

    Args:
        model: Base model, a hub id or a folder that every worker can read.
        users: Rows by name; or a folder or glob pattern of files of rows, which every worker can read.
        users_per_task: Number of users that are trained in the same batches.
        max_retries: Number of times that a task runs again after the death of its worker.
        resources: Options of ``ray.remote`` for a task, such as ``{"num_gpus": 1}``. None takes those of Ray, one CPU.
        arguments: Other arguments of `train`. ``store``, the folder of the store on a file system that all workers
            share, has to be given. ``save_steps`` is 50 if it is not given.

    Returns:
        Result of all tasks, whose ``log`` is empty. The logs of the tasks are in the store.

    Raises:
        ConfigError: If Ray is not installed, or an argument is wrong or has no meaning here.
        DataError: If no prefix could be trained.

    Example:
        >>> run = train_users("gpt2", "users/", store="/shared/prefixes", resources={"num_gpus": 1})  # doctest: +SKIP
    """
    _check(model, arguments, {"users_per_task": users_per_task, "max_retries": max_retries})
    path = _store_path(arguments)
    data = Folder(users) if isinstance(users, str | Path) else users
    if not isinstance(data, Mapping) or not data:
        msg = f"users: expected a mapping of names to rows, or a folder of files, got {shown(users)}"
        raise ConfigError(msg)
    held = open_store(path, read_only=False)
    assert held is not None
    tasks = list(_tasks(data, {n: v for n, v in arguments.items() if n != "store"}, users_per_task))
    ray = _import_ray()
    if not ray.is_initialized():
        ray.init()
    remote = ray.remote(**{"max_retries": max_retries, **(resources or {})})(_train)
    shared = ray.put((str(model), str(path)))
    parts = _results(ray, [remote.remote(shared, rows, own) for rows, own in tasks], [len(rows) for rows, _ in tasks])
    run = merge_parts(parts, held)
    drop_finished(path, list(run))
    return run


def _check(model: object, arguments: Mapping[str, Any], counts: Mapping[str, object]) -> None:
    """Check arguments before a task is sent, as far as they can be checked without rows."""
    if (size := rank_and_size()[1]) > 1:
        msg = f"train_users: expected one process that sends the tasks, got {size} of torchrun; start it without"
        raise ConfigError(msg)
    if not isinstance(model, str | Path):
        msg = f"model: expected a hub id or a folder, which each worker loads, got {type(model).__name__}"
        raise ConfigError(msg)
    for name, reason in REFUSED.items():
        if name in arguments:
            msg = f"{name}: train_users does not take it; {reason}"
            raise ConfigError(msg)
    for name, count in counts.items():
        least = 1 if name == "users_per_task" else 0
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            msg = f"{name}: expected a whole number from {least}, got {shown(count)}"
            raise ConfigError(msg)


def _store_path(arguments: Mapping[str, Any]) -> Path:
    """Folder of the store as the workers find it."""
    store = arguments.get("store")
    if store is None:
        msg = "store: expected the folder of a store, which gets the prefixes of all workers"
        raise ConfigError(msg)
    return store.path.absolute() if isinstance(store, PrefixStore) else as_path("store", store).absolute()


def _import_ray() -> Any:
    """The library.

    Raises:
        ConfigError: If Ray is not installed.
    """
    try:
        import ray
    except ImportError as e:
        msg = "train_users: Ray is not installed: pip install 'prefixfast[ray]'"
        raise ConfigError(msg) from e
    return ray


def _tasks(
    users: Mapping[str, Rows], arguments: Mapping[str, Any], size: int
) -> Iterator[tuple[dict[str, Rows], dict[str, Any]]]:
    """Rows and arguments of each task."""
    names = iter(users)
    while own := list(itertools.islice(names, size)):
        given = {"save_steps": SAVE_STEPS, **arguments}
        for key in BY_NAME:
            if isinstance(given.get(key), Mapping):
                given[key] = {n: given[key][n] for n in own if n in given[key]}
        yield {n: users[n] for n in own}, given


def _train(shared: tuple[str, str], rows: Mapping[str, Rows], arguments: Mapping[str, Any]) -> RunPart:
    """Train the prefixes of a task, in a worker. A task whose rows are all wrong has failures alone."""
    from prefixfast.errors import DataError
    from prefixfast.training.trainer import train

    model, store = shared
    try:
        return RunPart.of(train(model, rows, store=store, resume=True, progress=False, **arguments))
    except DataError as e:
        if arguments.get("on_error") == "raise":
            raise
        return RunPart({}, dict.fromkeys(rows, str(e)), (), {}, RunTotals())


def _results(ray: Any, futures: Sequence[Any], sizes: Sequence[int]) -> list[RunPart]:
    """Parts in the order of the tasks. The first error of a task ends the others."""
    size_of, found, left = dict(zip(futures, sizes, strict=True)), {}, list(futures)
    try:
        with Progress("train users", sum(sizes), "users") as work:
            while left:
                (done,), left = ray.wait(left, num_returns=1)
                found[done] = ray.get(done)
                work.update(size_of[done])
    except ray.exceptions.RayTaskError as e:
        raise e.cause from e
    finally:
        for future in left:
            ray.cancel(future, force=True)
    return [found[future] for future in futures]


class Generator:
    """Generation for the batches of a Ray dataset, each row with its own prefix: a class for ``map_batches``.

    Every actor loads the base model once, and reads prefixes from the store when they are asked for.

    Args:
        model: Base model, a hub id or a folder.
        store: Folder of the store.
        prefix_column: Column with the name of each row's prefix. None or an empty text is the base model alone.
        columns: Columns of a request, which the task of its prefix reads, such as ``["prompt"]``. None takes all but
            the one of the prefix. The others stay in the dataset.
        output_column: Column that gets the texts. The column ``{output_column}_error`` gets the error message of a row
            that fails, else an empty text.
        params: Generation parameters.
        config: Options of the engine.

    Raises:
        ConfigError: If an option is wrong.

    Example:
        >>> rows = ray.data.read_json("requests.jsonl")  # doctest: +SKIP
        >>> how = {"model": "gpt2", "store": "/shared/prefixes", "params": {"max_new_tokens": 32}}
        >>> texts = rows.map_batches(Generator, fn_constructor_kwargs=how, concurrency=2)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path,
        *,
        store: PrefixStore | str | Path,
        prefix_column: str = "prefix",
        columns: Sequence[str] | None = None,
        output_column: str = "generated_text",
        params: GenerationParams | Mapping[str, JSON] | None = None,
        config: EngineConfig | Mapping[str, JSON] | None = None,
    ) -> None:
        from prefixfast.engine.engine import Engine

        for name, value in (("prefix_column", prefix_column), ("output_column", output_column)):
            check_string(name, value, "the name of a column")
        if isinstance(columns, str):
            msg = f"columns: expected a sequence of names, got {shown(columns)}"
            raise ConfigError(msg)
        self.prefix_column, self.columns, self.output_column = prefix_column, columns, output_column
        self.params = GenerationParams.make(params)
        self.engine = Engine(model, store=store, config=config)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch with the texts.

        Args:
            batch: Values of ``n`` rows by column, arrays of length ``n``.

        Raises:
            ConfigError: If a column is missing.
        """
        import numpy as np

        read = [name for name in batch if name != self.prefix_column] if self.columns is None else self.columns
        if missing := [name for name in (self.prefix_column, *read) if name not in batch]:
            msg = f"columns: expected {missing} in the dataset, got {sorted(batch)}"
            raise ConfigError(msg)
        names = [name or None for name in _plain(batch[self.prefix_column])]
        values = [_plain(batch[name]) for name in read]
        inputs = [dict(zip(read, row, strict=True)) for row in zip(*values, strict=True)]
        found = self.engine.generate(inputs, names, params=self.params, on_error="return", progress=False)
        texts = ["" if g.error is not None else g.text for g in found]
        errors = ["" if g.error is None else str(g.error) for g in found]
        own = {self.output_column: texts, f"{self.output_column}_error": errors}
        return batch | {name: np.array(values, object) for name, values in own.items()}


def _plain(values: Any) -> list[Any]:
    """Values of a column as Python objects."""
    return [v.tolist() if hasattr(v, "tolist") else v for v in values]
