"""`ArtifactBuilder`, which makes the prefix or the weights that a training run saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prefixfast.config.json_types import JSON
from prefixfast.data.encode import vocabulary_error
from prefixfast.training.groups import PrefixJob
from prefixfast.training.identity import IDENTITY
from prefixfast.training.method import METHODS
from prefixfast.training.methods.state import Artifact, MethodState
from prefixfast.training.settings import option_values

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.data.task import Task
    from prefixfast.model.base import Model
    from prefixfast.model.fingerprint import Fingerprint
    from prefixfast.training.group_data import GroupData


@dataclass(frozen=True)
class ArtifactBuilder:
    """Makes prefixes, or weights, from trained tensors.

    Attributes:
        data: Group with its rows.
        params: Parameters of the method.
        base: Fingerprint of the base model, taken before the base model was changed.
        identities: Identity of the training of each name, also taken before.
        decoding: Default `GenerationParams` of the result.
    """

    data: GroupData
    params: MethodState
    base: Fingerprint
    identities: dict[str, str]
    decoding: dict[str, JSON]

    @classmethod
    def make(cls, data: GroupData, params: MethodState) -> ArtifactBuilder:
        """Builder of a group, before the base model is changed.

        Args:
            data: Group with its rows.
            params: Parameters of the method.
        """
        return cls(data, params, data.model.fingerprint, data.identities, _decoding(data.model, data.job.task))

    def build(
        self, number: int, tensors: dict[str, Tensor], metrics: dict[str, float], cost: dict[str, JSON]
    ) -> Artifact:
        """Make the result of one name.

        Args:
            number: Number of the name in its group.
            tensors: Trained tensors by name.
            metrics: Metrics of the training.
            cost: Seconds and memory of the training.

        Raises:
            DataError: If a tensor has numbers that are not finite.
        """
        group, task, before = self.data.group, self.data.job.task, self.data.job.on_top_of
        method, job = METHODS[group.method_config.method], group.jobs[number]
        trained = self.params.num_trained(number)
        training: dict[str, JSON] = {"method": group.method_config.method, "num_trained": trained}
        training |= {"metrics": metrics, "cost": cost, IDENTITY: self.identities[job.name]}
        training["config"] = option_values(job.config)
        if method.makes_prefix:
            training["prefix_config"] = option_values(job.prefix_config)
            if job.prefix_config.frozen_rows:
                training["num_frozen_tokens"] = job.prefix_config.frozen_rows  # such a prefix is a CARTRIDGE in PEFT
        if before is not None:
            training["on_top_of"] = before.digest
        fields: dict[str, Any] = {
            "base": self.base,
            "task": None if task.name == "input_ids" else task.stored_spec(),
            "decoding": self.decoding | self._own_decoding(job),
            "training": training,
        }
        return self.params.build(tensors, job, fields)

    def _own_decoding(self, job: PrefixJob) -> dict[str, JSON]:
        """Decoding defaults that follow from the options and the rows of one name."""
        decoder, config, found = self.data.model.seq2seq, self.data.group.config, dict[str, JSON]()
        if decoder is None:
            return found
        if config.overflow == "truncate" and config.max_source_length is not None:
            found["max_source_length"] = config.max_source_length
        if decoder.wraps:  # the language of the target, which labels end with, is the start token
            examples, (start, end) = self.data.dataset.examples, self.data.dataset.span[job.name]
            starts = np.unique(examples.ids[examples.indptr[start:end]])
            if len(starts) == 1:
                found["decoder_start_token_id"] = int(starts[0])
        return found


def _decoding(model: Model, task: Task) -> dict[str, JSON]:
    """Decoding defaults of a task, with its bad words as token ids."""
    own = task.decoding if model.seq2seq is None or task.encoder_decoding is None else task.encoder_decoding
    decoding: dict[str, JSON] = dict(own)
    if task.bad_words and model.tokenizer is not None:
        # A word with a further token cannot be generated.
        vocab_size = model.vocab_size if model.seq2seq is None else model.seq2seq.vocab_size
        encoded = model.tokenizer.encode(list(task.bad_words), add_special_tokens=False)
        decoding["bad_words_ids"] = [
            ids.tolist() for ids in encoded if len(ids) and not vocabulary_error(ids, vocab_size)
        ]
    return decoding
