"""Other ways to generate with prefixes: PEFT's `generate`, and a mixed batch written by hand on transformers' cache.

Shape letters: B requests, P prefix rows, T prompt tokens, L layers, H kv heads, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixfast.bench.decoding import Decoding
from prefixfast.model.base import Model
from prefixfast.prefix import peft_format
from prefixfast.prefix.prefix import Prefix

Tokens = list[list[int]]
Call = Callable[[], Tokens]


@dataclass(frozen=True)
class Bases:
    """The measured base, attached to prefixfast, and a plain copy for the other contenders (None leaves them out)."""

    model: Model
    plain: PreTrainedModel | None


@dataclass(frozen=True)
class RunSettings:
    """Settings under which a contender runs, which reports and results files show.

    Attributes:
        dtype: Compute dtype.
        attention: Attention implementation of the model.
        use_cache: Whether keys and values of earlier tokens are kept.
        batch: Number of requests in a batch.
        decoding: Choice of the tokens.
    """

    dtype: str
    attention: str
    use_cache: bool
    batch: int
    decoding: str

    @classmethod
    def of(cls, model: Model | PreTrainedModel, batch: int, decoding: Decoding) -> RunSettings:
        """Settings of a contender that generates with ``model``."""
        if isinstance(model, Model):
            attention, use_cache = f"prefixfast, {model.backend.name}", True
        else:
            attention, use_cache = str(model.config._attn_implementation), bool(model.generation_config.use_cache)
        return cls(str(model.dtype).removeprefix("torch."), attention, use_cache, batch, str(decoding))

    def row(self) -> dict[str, Any]:
        """Record of the results file."""
        return asdict(self)


@dataclass(frozen=True)
class Contender:
    """One timed way to generate.

    Attributes:
        call: Function that generates and returns the tokens of each request.
        sources: Numbers of prompt and prefix of each request, with None for no prefix.
        settings: Settings under which it runs.
    """

    call: Call
    sources: Sequence[tuple[int, int | None]]
    settings: RunSettings


def peft_model(base: PreTrainedModel, prefix: Prefix) -> tuple[Any, Tensor]:
    """A base inside PEFT's prefix-tuning, and PEFT's table ``[P, 2 * L * H * D]``, which holds ``prefix``.

    Args:
        base: Base of transformers, which PEFT changes.
        prefix: The prefix.
    """
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prefix.length_at("self"))
    own: Any = get_peft_model(base, config)
    weight = own.prompt_encoder["default"].embedding.weight
    weight.data = peft_format.to_table(prefix.kv, prefix.base).to(weight.dtype)
    return own, weight


def peft_or_plain(plain: PreTrainedModel, prefix: Prefix | None, decoding: Decoding) -> Any:
    """Copy of a base of transformers inside PEFT, or alone without a prefix, with the settings of ``decoding``."""
    base = copy.deepcopy(plain).eval()
    decoding.apply(base)
    return base if prefix is None else peft_model(base, prefix)[0].eval()


def peft_contender(
    own: Any, prompts: Tokens, prefix: int | None, decoding: Decoding, *, one_by_one: bool = False
) -> Contender:
    """Contender that calls ``generate`` of PEFT or transformers.

    Args:
        own: Model from `peft_or_plain`.
        prompts: Token ids ``[B, T]``.
        prefix: Number of the model's prefix, None for none.
        decoding: Settings of the generation, with which the model was made.
        one_by_one: Whether each request is a batch of its own.
    """
    batches = [[p] for p in prompts] if one_by_one else [prompts]

    @torch.inference_mode()
    def call() -> Tokens:
        tokens: Tokens = []
        for batch in batches:
            ids = torch.tensor(batch)
            out = own.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
            tokens += out[:, ids.shape[1] :].tolist()
        return tokens

    base = own if isinstance(own, PreTrainedModel) else own.get_base_model()
    sources = [(i, prefix) for i in range(len(prompts))]
    return Contender(call, sources, RunSettings.of(base, len(batches[0]), decoding))


def mixed_by_hand(plain: PreTrainedModel, prefixes: Sequence[Prefix], prompts: Tokens, decoding: Decoding) -> Call:
    """Greedy loop over transformers' forward pass and cache, with the prefix of each request copied into the cache.

    Args:
        plain: Base of transformers, not attached.
        prefixes: Prefix of each request, all of one length.
        prompts: Token ids ``[B, T]``.
        decoding: Settings of the generation, a fixed number of tokens.

    Returns:
        Function that returns the tokens ``[B, new]``.
    """
    ids = torch.tensor(prompts)
    count, length = len(prompts), prefixes[0].length_at("self")
    stacked = [
        [torch.stack([p.kv[f"self.{i}.{x}"].transpose(0, 1) for p in prefixes]).to(plain.dtype) for x in "kv"]
        for i in prefixes[0].layers
    ]

    @torch.inference_mode()
    def call() -> Tokens:
        cache = DynamicCache()
        for i, (k, v) in zip(prefixes[0].layers, stacked, strict=True):
            cache.update(k, v, i)
        out, token, seen = [], ids, length
        for _ in range(decoding.max_new_tokens):
            positions = torch.arange(seen, seen + token.shape[1])[None].expand(count, -1)
            logits = plain(
                input_ids=token, past_key_values=cache, position_ids=positions, use_cache=True, logits_to_keep=1
            ).logits
            seen += token.shape[1]
            last = logits[:, -1]
            last[:, list(decoding.end_ids)] = -torch.inf  # every request gets all its tokens, as with the others
            token = last.argmax(-1, keepdim=True)
            out.append(token)
        tokens: Tokens = torch.cat(out, 1).tolist()
        return tokens

    return call
