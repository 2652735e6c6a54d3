"""The identity of a run: the base model, data and options that a checkpoint must match for the run to be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prefixfast.config import MethodConfig
from prefixfast.config.json_types import JSON
from prefixfast.prefix.names import written
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.defaults import num_steps
from prefixfast.training.groups import OF_TRAINING, PrefixGroup
from prefixfast.training.job import TrainJob
from prefixfast.training.lora_config import OF_CONFIG
from prefixfast.training.method import METHODS, method_options
from prefixfast.training.settings import option_values
from prefixfast.training.text_limits import SEQ2SEQ_LIMITS

if TYPE_CHECKING:
    from prefixfast.model.base import Model
    from prefixfast.training.dataset import Dataset

# Options that do not change results, so that a run may be resumed with other values.
IGNORED_OPTIONS = (
    "recipe",
    "token_budget",
    "gradient_checkpointing",
    "shard_base",
    "save_steps",
    "logging_steps",
    "report_to",
)
OWN = "own prefix_config"  # part with the options of `PrefixConfig` in which prefixes differ from the first, by name
IDENTITY = "identity"  # key of `Prefix.training` under which a run finds what an earlier run has finished
SHARED_PARTS = (
    "base",
    "task",
    "prefix_config",
    "init_text",
    "on_top_of",
    "method",
)  # the same for all prefixes of a group


def run_identity(
    model: Model, job: TrainJob, group: PrefixGroup, dataset: Dataset, eval_dataset: Dataset | None
) -> dict[str, Any]:
    """Identity of the training of a group, as JSON values except for tuples.

    Args:
        model: Base model.
        job: Training job.
        group: Group with resolved options.
        dataset: Tokenized training rows.
        eval_dataset: Tokenized held-out rows, None without held-out rows.
    """
    jobs, config, method = group.jobs, group.config, group.method_config
    own: dict[str, dict[str, Any]] = {
        j.name: {f: getattr(j.config, f) for f in OF_TRAINING if getattr(j.config, f) != getattr(config, f)}
        for j in jobs
    }
    learned = {kind: written(option_values(kind)) for kind in dict.fromkeys(j.prefix_config for j in jobs)}
    first = next(iter(learned.values()))
    own_learned = {j.name: {f: v for f, v in learned[j.prefix_config].items() if v != first[f]} for j in jobs}
    own_learned = {name: options for name, options in own_learned.items() if options}
    for j in jobs:
        if j.config.max_steps is None and j.config.num_train_epochs is None:  # the number of steps is a default
            start, end = dataset.span[j.name]
            own[j.name]["steps"] = num_steps(j.config, -(-(end - start) // j.config.batch_size))
    base = {k: v for k, v in model.fingerprint.items() if k in ("config", "weights", "adapters")}
    return {
        "base": base | {"dtype": str(model.dtype)},
        "data": {j.name: dataset.digest[j.name] for j in jobs},
        "eval_data": {} if eval_dataset is None else {j.name: eval_dataset.digest[j.name] for j in jobs},
        "task": job.task.stored_spec(),
        # Without limits that are None, a run of version 0.1.0 can be resumed.
        "config": {n: v for n, v in option_values(config).items() if v is not None or n not in SEQ2SEQ_LIMITS},
        "own config": {name: options for name, options in own.items() if options},
        "prefix_config": first,
        # A run whose prefixes all have the same options has no such part, as in version 0.1.0.
        **({OWN: own_learned} if own_learned else {}),
        "init": {j.name: j.init.digest if isinstance(j.init, Prefix) else j.init for j in jobs},
        "init_text": job.init_text,
        "on_top_of": None if job.on_top_of is None else job.on_top_of.digest,
        # The options of prefixes say all of methods prefix and infix.
        **({} if METHODS[method.method].module == "prefix" else {"method": _method(method, job.lora)}),
    }


def _method(config: MethodConfig, lora: Mapping[str, JSON] | None) -> dict[str, Any]:
    """Options of a method, with the fields of a configuration of PEFT in the place of its own."""
    options = method_options(config)
    return options if lora is None else {n: v for n, v in options.items() if n not in OF_CONFIG} | {"lora": lora}


def prefix_identities(identity: Mapping[str, Any]) -> dict[str, str]:
    """Identity of the training of each prefix of a group: a digest of its base model, rows and options.

    It is the same alone and among other prefixes, so that a run can tell which prefixes an earlier run has finished.

    Args:
        identity: Identity of the group, as `run_identity` makes it or as a checkpoint holds it.

    Returns:
        Hex SHA-256 by name.
    """
    shared = {part: identity[part] for part in SHARED_PARTS if part in identity}  # method prefix has no part
    config = {name: value for name, value in identity["config"].items() if name not in IGNORED_OPTIONS}
    found = {}
    for name, digest in identity["data"].items():
        own = {"data": digest, "eval_data": identity["eval_data"].get(name), "init": identity["init"][name]}
        values = shared | own | {"config": config | identity["own config"].get(name, {})}
        values["prefix_config"] = shared["prefix_config"] | identity.get(OWN, {}).get(name, {})
        found[name] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences of two identities as text: the name for digests, both values for options."""
    found = []
    for part in sorted({*then, *now}):
        old, new = then.get(part), now.get(part)
        if not isinstance(old, dict) or not isinstance(new, dict):
            found += [] if old == new else [f"{part} was {_short(old)}, is {_short(new)}"]
            continue
        ignored = IGNORED_OPTIONS if part == "config" else ()
        for key in sorted(k for k in {*old, *new} if old.get(k) != new.get(k) and k not in ignored):
            value = old.get(key, new.get(key))
            is_digest = key in old and key in new and isinstance(value, str) and len(value) == 64
            values = f"{part}: {key} was {_short(old.get(key))}, is {_short(new.get(key))}"
            found.append(f"{part} of {key!r} differs" if is_digest else values)
    return found


def _short(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60}"
