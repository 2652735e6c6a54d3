"""What generation with prefixes is held against: PEFT's `generate`, and a mixed batch made by hand on transformers' cache.

Shape letters: B requests, P prefix rows, T prompt tokens, L layers, H kv heads, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixfast.prefix import peft_format as layout
from prefixfast.prefix.prefix import Prefix

Call = Callable[[], Tensor]


def peft_model(plain: PreTrainedModel, prefix: Prefix) -> tuple[Any, Tensor]:
    """A copy of a base inside PEFT's prefix-tuning, and its trained table ``[P, 2 * L * H * D]``, which holds ``prefix``."""
    from peft import PrefixTuningConfig, get_peft_model

    own: Any = get_peft_model(
        copy.deepcopy(plain), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix.length)
    )
    weight = own.prompt_encoder["default"].embedding.weight
    weight.data = layout.to_table(prefix.kv).to(weight.dtype)
    return own, weight


def peft(plain: PreTrainedModel, prefix: Prefix | None, new: int) -> Callable[[list[list[int]]], Tensor]:
    """PEFT's (without a prefix transformers') greedy `generate` of prompts ``[B, T]`` in one batch, tokens ``[B, new]``."""
    own: Any = copy.deepcopy(plain) if prefix is None else peft_model(plain, prefix)[0]
    own.generation_config.pad_token_id = 0
    own.eval()

    def call(batch: list[list[int]]) -> Tensor:
        ids = torch.tensor(batch)
        with torch.inference_mode():
            out: Tensor = own.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
            )
        return out[:, ids.shape[1] :]

    return call


def mixed_by_hand(plain: PreTrainedModel, prefixes: Sequence[Prefix], prompts: list[list[int]], new: int) -> Call:
    """A greedy loop over transformers' own forward and cache, each row's prefix copied into the cache: what one writes without prefixfast.

    Args:
        plain: The base, not attached.
        prefixes: One a request, all of one length.
        prompts: ``[B, T]``.
        new: Tokens of each request.
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
            last[:, ends] = -torch.inf  # every request gets all its tokens, as with the others' min_new_tokens
            token = last.argmax(-1, keepdim=True)
            out.append(token)
        return torch.cat(out, 1)

    return call
