"""Other ways to generate with prefixes: PEFT's `generate`, and a mixed batch written by hand on transformers' cache.

Shape letters: B requests, P prefix rows, T prompt tokens, L layers, H kv heads, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixfast.model.base import Model
from prefixfast.prefix import peft_format
from prefixfast.prefix.prefix import Prefix

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Bases:
    """The measured base, attached to prefixfast, and a plain copy for the other contenders (None leaves them out)."""

    model: Model
    plain: PreTrainedModel | None


def peft_model(plain: PreTrainedModel, prefix: Prefix) -> tuple[Any, Tensor]:
    """Copy of a base inside PEFT's prefix-tuning, and its table ``[P, 2 * L * H * D]``, which holds ``prefix``."""
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix.length)
    own: Any = get_peft_model(copy.deepcopy(plain), config)
    weight = own.prompt_encoder["default"].embedding.weight
    weight.data = peft_format.to_table(prefix.kv).to(weight.dtype)
    return own, weight


def peft_generate(plain: PreTrainedModel, prefix: Prefix | None, new: int) -> Callable[[list[list[int]]], Tensor]:
    """Function from prompts ``[B, T]`` to ``[B, new]`` greedy tokens of PEFT; without a prefix it is transformers'."""
    own: Any = copy.deepcopy(plain) if prefix is None else peft_model(plain, prefix)[0]
    own.generation_config.pad_token_id = 0
    own.eval()
    length = {"max_new_tokens": new, "min_new_tokens": new}

    def call(batch: list[list[int]]) -> Tensor:
        ids = torch.tensor(batch)
        with torch.inference_mode():
            out: Tensor = own.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
        return out[:, ids.shape[1] :]

    return call


def mixed_by_hand(plain: PreTrainedModel, prefixes: Sequence[Prefix], prompts: list[list[int]], new: int) -> Call:
    """Greedy loop over transformers' forward pass and cache, with the prefix of each request copied into the cache.

    Args:
        plain: Base of transformers, not attached.
        prefixes: Prefix of each request, all of one length.
        prompts: Token ids ``[B, T]``.
        new: Number of tokens to generate for each request.

    Returns:
        Function that returns the tokens ``[B, new]``.
    """
    ids = torch.tensor(prompts)
    count, length = len(prompts), prefixes[0].length
    layers = plain.config.get_text_config().num_hidden_layers
    found = plain.generation_config.eos_token_id
    ends = [] if found is None else [found] if isinstance(found, int) else list(found)
    stacked = [
        [torch.stack([p.kv[f"self.{i}.{x}"].transpose(0, 1) for p in prefixes]).to(plain.dtype) for x in "kv"]
        for i in range(layers)
    ]

    @torch.inference_mode()
    def call() -> Tensor:
        cache = DynamicCache()
        for i, (k, v) in enumerate(stacked):
            cache.update(k, v, i)
        out, token, seen = [], ids, length
        for _ in range(new):
            positions = torch.arange(seen, seen + token.shape[1])[None].expand(count, -1)
            logits = plain(
                input_ids=token, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=1
            ).logits
            seen += token.shape[1]
            last = logits[:, -1]
            last[:, ends] = -torch.inf  # every request gets all its tokens, as min_new_tokens does for the others
            token = last.argmax(-1, keepdim=True)
            out.append(token)
        return torch.cat(out, 1)

    return call
