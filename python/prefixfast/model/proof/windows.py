"""Sliding windows: what each layer passes to attention against what the model's own mask hides, at any length.

Shape letters: N query tokens, K keys, HQ query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask

from prefixfast.model.attention_switch import configs_of
from prefixfast.model.dry_run import FAILURES
from prefixfast.model.proof.own import attention_of

NAME = "prefixfast-window-probe"
FAR = 1024  # smallest number of keys before the queries
QUERIES = 2


class _FarLayer(DynamicLayer):
    """Cache layer that says it has many keys and holds none, so that a mask of any length costs no attention.

    Args:
        rows: Number of keys that the layer says it has.
    """

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.is_initialized = rows, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values."""
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Number of keys that the layer says it has."""
        return self.rows

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys of a mask, and its first key."""
        return self.rows + query_length, 0


def _record(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Attention that notes the mask of a layer in the list ``prefixfast`` and gives zeros."""
    how["prefixfast"].append((module.layer_idx, attention_mask))
    batch, heads, count, _ = query.shape
    return query.new_zeros(batch, count, heads, value.shape[3]), None


AttentionInterface.register(NAME, _record)
AttentionMaskInterface.register(NAME, eager_mask)


@torch.no_grad()
def window_differences(model: PreTrainedModel, windows: Sequence[int]) -> list[str] | None:
    """Layers whose own mask hides other keys than the window that they pass, None if the masks cannot be read.

    Args:
        model: Model.
        windows: Sliding window that each layer passes to attention, 0 for none.
    """
    rows = max(FAR, *windows, *_windows_of_config(model)) + QUERIES
    cache = DynamicCache()
    cache.layers = [_FarLayer(rows) for _ in windows]
    seen: list[tuple[int, Tensor | None]] = []
    device = model.device
    positions = torch.arange(QUERIES, device=device)[None]
    try:
        with attention_of(model, [NAME] * len(configs_of(model))):
            model(
                input_ids=torch.ones_like(positions),
                attention_mask=torch.ones(1, rows + QUERIES, dtype=torch.long, device=device),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                prefixfast=seen,
            )
    except FAILURES:
        return None
    found = []
    for layer, mask in sorted(seen, key=lambda entry: entry[0]):
        visible, expected = _visible(mask, rows + QUERIES), windows[layer] or rows + QUERIES
        if visible != expected:
            found.append(
                f"layer {layer} passes {_words(windows[layer])} to attention, its own mask {_hides(visible, rows)}"
            )
    return found


def _visible(mask: Tensor | None, keys: int) -> int:
    """Number of keys that the last query sees, -1 if they are not the last ones.

    An entry of a mask that is neither 0 nor hides a key counts as hidden.
    """
    if mask is None:
        return keys
    last = mask[0, 0, -1]
    seen = last if last.dtype == torch.bool else last == 0
    count = int(seen.sum())
    return count if bool(seen[len(seen) - count :].all()) else -1


def _words(window: int) -> str:
    return f"a window of {window} tokens" if window else "no window"


def _hides(visible: int, rows: int) -> str:
    if visible <= 0:
        return "is not that of a window"
    return "hides no key" if visible > rows else f"hides all but {visible} keys"


def _windows_of_config(model: PreTrainedModel) -> list[int]:
    """Numbers of a model's configuration that are windows by their name."""
    values = vars(model.config.get_text_config())
    return [v for name, v in values.items() if "window" in name and "layers" not in name and type(v) is int]
