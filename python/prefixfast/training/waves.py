"""Waves: the prefixes of a group that are trained at the same time, so that thousands of them need bounded memory.

A wave has its own parameters, gradients and moments, which are freed at its end. The waves follow from the data and the
options alone, so that a resumed run on another machine has the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefixfast.model.prefix_shape import own_layers
from prefixfast.model.text_kv import parameter_dtype
from prefixfast.training.defaults import num_steps
from prefixfast.training.method import METHODS

if TYPE_CHECKING:
    from prefixfast.model.base import Model
    from prefixfast.training.group_data import GroupData
    from prefixfast.training.groups import PrefixJob

# Bytes of the training state of a wave. From 64 prefixes on the time of a prefix's step is the same, and on CPUs fewer
# fit into this size only with an MLP or thousands of rows.
WAVE_BYTES = {"cpu": 1 << 30, "cuda": 1 << 34}


def waves(data: GroupData) -> list[GroupData]:
    """Divide a group into waves of about equal size, from the prefixes with the most steps to those with the fewest.

    Args:
        data: Group with its rows.
    """
    jobs, device = data.group.jobs, data.model.device
    if not METHODS[data.group.method_config.method].makes_prefix:
        return [data]
    sizes = {j.name: _state_bytes(data.model, j, has_eval=data.eval_dataset is not None) for j in jobs}
    limit = WAVE_BYTES.get(device.type, WAVE_BYTES["cpu"])
    count = min(len(jobs), -(-sum(sizes.values()) // limit))
    if count <= 1:
        return [data]
    steps = {j.name: _num_steps(data, j) for j in jobs}
    share, before = sum(sizes.values()) / count, 0
    names: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(sizes, key=lambda n: -steps[n]):  # those of equal length end together, and leave no small steps
        names[min(count - 1, int(before / share))].append(name)
        before += sizes[name]
    place = {j.name: i for i, j in enumerate(jobs)}
    return [data.only(sorted(own, key=place.__getitem__)) for own in names if own]


def _num_steps(data: GroupData, job: PrefixJob) -> int:
    examples = int(data.dataset.counts[job.name]["examples"])
    return num_steps(job.config, -(-examples // job.config.batch_size))


def _state_bytes(model: Model, job: PrefixJob, *, has_eval: bool) -> int:
    """Bytes of the parameters of a prefix, their gradients and moments, and its best state."""
    flat = trained = 0
    for site in job.prefix_config.sites_of(model.sites):
        shapes, rows = model.sites[site], job.prefix_config.length_at(site)
        layers = job.prefix_config.layers_at(site) or own_layers(shapes)
        width = sum(shapes[i].num_kv_heads * (shapes[i].head_dim + shapes[i].value_dim) for i in layers)
        flat += rows * width
        own, hidden = shapes[layers[0]], job.prefix_config.encoder_hidden_size
        inner = job.prefix_config.embedding_dim or own.num_kv_heads * own.head_dim
        trained += (rows + hidden) * inner + hidden * (width + 1) + width if job.uses_mlp else rows * width
    computed = 2 * flat if job.uses_mlp else 0  # keys and values of the network, and their gradients
    return parameter_dtype(model.dtype).itemsize * (4 * trained + computed + (flat if has_eval else 0))
