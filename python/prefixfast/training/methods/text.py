"""Methods ``prompt`` and ``icl``: the keys and values of a text, without training.

The text of ``prompt`` is the init text. That of ``icl`` is training examples, each with the task's prompt, its target
and the end token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefixfast.model.text_kv import text_kv
from prefixfast.training.init import text_ids
from prefixfast.training.methods.prefix import PrefixState, prefix_parameters

if TYPE_CHECKING:
    from prefixfast.training.group_data import GroupData


class TextPrefix(PrefixState):
    """Keys and values of a text, which no training adjusts."""

    def num_trained(self, number: int) -> int:
        """Zero."""
        return 0


def make(data: GroupData) -> TextPrefix:
    """Keys and values of the text of a group of one name."""
    ids = text_ids(data.model, data.group, data.job.init_options)
    block = prefix_parameters(data, [0], {"self": [text_kv(data.model, ids, len(ids))]}, is_only=True)
    return TextPrefix(data, [block])
