"""`PrefixBuilder`, which makes the prefix that a training run saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from prefixfast.config.json_types import JSON
from prefixfast.data.encode import vocabulary_error
from prefixfast.model.base import Model
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.groups import PrefixGroup, PrefixJob
from prefixfast.training.identity import IDENTITY
from prefixfast.training.job import TrainJob
from prefixfast.training.settings import option_values


@dataclass(frozen=True)
class PrefixBuilder:
    """Makes prefixes from trained tensors.

    Attributes:
        model: Base model.
        job: Training job, with the task and the frozen prefix.
        group: Group with resolved options.
        num_trained: Number of parameters that training adjusts for one prefix.
        identities: Identity of the training of each prefix by name.
    """

    model: Model
    job: TrainJob
    group: PrefixGroup
    num_trained: int
    identities: Mapping[str, str]

    def build(self, prefix_job: PrefixJob, kv: dict[str, Tensor], metrics: dict[str, float]) -> Prefix:
        """Make a prefix.

        Args:
            prefix_job: Training of the prefix.
            kv: Trained tensors by name.
            metrics: Metrics of the training.

        Raises:
            DataError: If a tensor has numbers that are not finite.
        """
        prefix_config, task, before = self.group.prefix_config, self.job.task, self.job.on_top_of
        training: dict[str, JSON] = {"num_trained": self.num_trained, "metrics": metrics}
        training[IDENTITY] = self.identities[prefix_job.name]
        if prefix_config.frozen_rows:
            training["num_frozen_tokens"] = prefix_config.frozen_rows  # such a prefix is a CARTRIDGE in PEFT
        training |= {"config": option_values(prefix_job.config), "prefix_config": option_values(prefix_config)}
        if before is not None:
            training["on_top_of"] = before.digest
        decoding: dict[str, JSON] = dict(task.decoding)
        if task.bad_words and self.model.tokenizer is not None:
            vocab_size = self.model.vocab_size  # a word with a further token cannot be generated
            encoded = self.model.tokenizer.encode(list(task.bad_words), add_special_tokens=False)
            decoding["bad_words_ids"] = [
                ids.tolist() for ids in encoded if len(ids) and not vocabulary_error(ids, vocab_size)
            ]
        return Prefix(
            kv,
            self.group.pos_start,
            prefix_job.window,
            base=self.model.fingerprint,
            task=None if task.name == "input_ids" else task.spec(),
            decoding=decoding,
            training=training,
        )
