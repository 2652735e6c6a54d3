"""Tiny random encoder-decoder models of every family, and brute-force prefixes inside their own attention modules.

The oracle shares nothing with the planner, its tables or the operators. Prefix rows are concatenated to the keys and
values of each attention module, and transformers does the rest unmodified.
Shape letters: B batch, H heads, T queries, K keys, P prefix rows, D head dim.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from prefixfast import Prefix

SITES = ("enc", "self", "cross")
SUBSETS = tuple(s for n in (1, 2, 3) for s in itertools.combinations(SITES, n))
LENGTHS = {"enc": 3, "self": 5, "cross": 2}
VOCAB, POSITIONS = 99, 64
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": POSITIONS,
    "dropout": 0,
    "attention_dropout": 0,
    "activation_dropout": 0,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 6,  # 4 heads of 6 are not d_model, as in flan-T5
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
GATED = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
# Class, configuration and seed. Most seeds give models that repeat one token. With these, five greedy texts of 14
# tokens have 12 to 29 different ones.
MAKE: dict[str, tuple[str, dict[str, Any], int]] = {
    "bart": ("Bart", BART, 23),
    "mbart": ("MBart", {**BART, "scale_embedding": True}, 25),
    "plbart": ("PLBart", BART, 23),
    "pegasus": ("Pegasus", BART, 21),
    "marian": ("Marian", BART, 24),
    "blenderbot": ("Blenderbot", BART, 22),
    "blenderbot-small": ("BlenderbotSmall", BART, 22),
    "m2m_100": ("M2M100", BART, 16),
    "t5": ("T5", T5, 26),
    "flan-t5": ("T5", GATED, 24),
    "mt5": ("MT5", GATED, 31),
    "umt5": ("UMT5", GATED, 38),
}
NAMES = tuple(MAKE)
DISTANCES = ("t5", "flan-t5", "mt5", "umt5")  # positions are distances
NORMS_BEHIND = ("bart", "plbart", "marian", "blenderbot-small")  # a layer norm stands behind each part of a layer
FAST = ("bart", "m2m_100", "t5", "umt5")  # one of each kind of code; the others are long tests


def make_seq2seq(name: str, *, spread: float = 1.0, **config: Any) -> PreTrainedModel:
    """A random model in fp32 whose texts have many different tokens.

    Args:
        name: One of `NAMES`.
        spread: Factor on the random numbers of the weights. A smaller one makes rounding errors smaller, and texts
            repeat tokens.
        config: Values of the configuration that differ from those of the shape.
    """
    kind, values, seed = MAKE[name]
    build = getattr(transformers, f"{kind}MTModel" if kind == "Marian" else f"{kind}ForConditionalGeneration")
    torch.manual_seed(seed)
    model = build(getattr(transformers, f"{kind}Config")(**{**values, **config})).eval().float()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, p in model.named_parameters():
            if "embed_positions" in parameter and name in ("pegasus", "marian"):
                continue  # sinusoids
            values = torch.randn(p.shape, generator=g) * _scale(parameter, p, name) * spread
            p.copy_(p + values if p.dim() == 1 else values)
        for buffer, b in model.named_buffers():
            if buffer == "final_logits_bias":
                b.add_(torch.randn(b.shape, generator=g) * 0.1)
    return model


def _scale(name: str, p: Tensor, family: str) -> float:
    """Standard deviation of the random numbers of a parameter. Scores of attention stay small."""
    if p.dim() == 1:
        return 1.3 if "norm" in name and "weight" in name else 0.02
    if "embed_positions" in name:
        return 2.0
    if "relative_attention_bias" in name:
        return 1.0
    if name.split(".")[-2] in ("q_proj", "k_proj", "q", "k"):
        return 0.08 if family in DISTANCES else 0.2
    if "layers." not in name and "block." not in name:
        return 0.3
    return 0.15 if family in NORMS_BEHIND else 0.6  # with 0.6 the token would not matter behind the norms


def attention_modules(hf: PreTrainedModel) -> dict[str, list[Any]]:
    """Attention modules of each site in the order of their layers, by their names in transformers."""

    def named(stack: Any, *names: str) -> list[Any]:
        return [module for name, module in stack.named_modules() if name.endswith(names)]

    own = ("self_attn", "SelfAttention")
    encoder, decoder = hf.get_encoder(), hf.get_decoder()
    return {
        "enc": named(encoder, *own),
        "self": named(decoder, *own),
        "cross": named(decoder, "encoder_attn", "EncDecAttention"),
    }


def heads(module: Any) -> tuple[int, int]:
    """Number of heads and head dim of an attention module."""
    if hasattr(module, "n_heads"):
        return module.n_heads, module.key_value_proj_dim
    return module.num_heads, module.head_dim


def random_kv(
    hf: PreTrainedModel, lengths: Mapping[str, int], *, seed: int = 0, scale: float = 1.0
) -> dict[str, Tensor]:
    """Random tensors ``{site}.{layer}.k|v`` ``[P, H, D]`` with a strong effect on the logits.

    Args:
        hf: Model.
        lengths: Number of rows P of each site.
        seed: Seed.
        scale: Standard deviation of the numbers.
    """
    g = torch.Generator().manual_seed(seed)
    modules = attention_modules(hf)
    return {
        f"{site}.{layer}.{x}": torch.randn(lengths[site], *heads(module), generator=g) * scale
        for site in SITES
        if site in lengths
        for layer, module in enumerate(modules[site])
        for x in "kv"
    }


def random_prefix(hf: PreTrainedModel, lengths: Mapping[str, int], *, pos_start: int, seed: int = 0) -> Prefix:
    """`random_kv` as a prefix.

    Args:
        hf: Model.
        lengths: Number of rows P of each site.
        pos_start: Position of the first decoder token.
        seed: Seed.
    """
    return Prefix(random_kv(hf, lengths, seed=seed), pos_start=pos_start)


class _Place(NamedTuple):
    """Place of an attention module, and the module of its stack that owns the position bias, None without one."""

    site: str
    layer: int
    owner: Any


class _Acting(NamedTuple):
    """What the oracle's attention reads: places by the id of the module, and the prefix."""

    places: Mapping[int, _Place]
    kv: Mapping[str, Tensor]


NAME = "prefixfast-test-oracle"
_ACTING: ContextVar[_Acting] = ContextVar("acting")  # `generate` takes no unknown keywords


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention ``[B, T, H, D]`` over [prefix rows; keys], with the mask written out."""
    acting = _ACTING.get()
    site, layer, owner = acting.places[id(module)]
    assert attention_mask is None, "a padded batch: run its rows one by one"
    count = query.shape[2]
    visible = torch.ones(count, key.shape[2], dtype=torch.bool)
    if site == "self":
        visible = visible.tril()
    if f"{site}.{layer}.k" in acting.kv:
        rows = [acting.kv[f"{site}.{layer}.{x}"].to(query).transpose(0, 1) for x in "kv"]
        length = rows[0].shape[1]
        expanded = [t[None].expand(len(query), -1, -1, -1) for t in rows]
        key, value = torch.cat([expanded[0], key], 2), torch.cat([expanded[1], value], 2)
        visible = torch.cat([visible.new_ones(count, length), visible], 1)
        if position_bias is not None:
            before = position_bias.new_zeros(1, 1, count, length)
            if site != "cross":
                before = owner.compute_bias(count, length + count, past_seen_tokens=length)[..., :length]
            position_bias = torch.cat([before.expand(*position_bias.shape[:3], length), position_bias], -1)
    assert scaling is not None
    scores = query @ key.transpose(2, 3) * scaling
    if position_bias is not None:
        scores = scores + position_bias
    out = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ value
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attention)


@contextlib.contextmanager
def oracle(hf: PreTrainedModel, prefix: Prefix | None) -> Iterator[None]:
    """Context manager in which a model's forward and its ``generate(use_cache=False)`` see a prefix.

    Args:
        hf: Model that is not attached. Its inputs have no padding.
        prefix: Prefix of all rows of a batch, None for none.
    """
    with brute_force(hf, {} if prefix is None else dict(prefix.kv), 0 if prefix is None else prefix.pos_start):
        yield


@contextlib.contextmanager
def brute_force(hf: PreTrainedModel, kv: Mapping[str, Tensor], pos_start: int) -> Iterator[None]:
    """Context manager in which a model sees prefix tensors, to which gradients flow.

    Args:
        hf: Model that is not attached. Its inputs have no padding.
        kv: Tensors ``{site}.{layer}.k|v`` ``[P, H, D]``.
        pos_start: Position of the first decoder token. Models whose positions are distances have none.
    """
    places = {}
    for site, modules in attention_modules(hf).items():
        owner = None
        for layer, module in enumerate(modules):
            owner = module if hasattr(module, "relative_attention_bias") else owner
            places[id(module)] = _Place(site, layer, owner)
    configs = {id(m.config): m.config for m in hf.modules() if isinstance(m, PreTrainedModel)}.values()
    before = [config._attn_implementation_internal for config in configs]
    acting = _ACTING.set(_Acting(places, kv))
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        with _shifted(getattr(hf.get_decoder(), "embed_positions", None), pos_start):
            yield
    finally:
        _ACTING.reset(acting)
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name


@contextlib.contextmanager
def _shifted(embedding: Any, shift: int) -> Iterator[None]:
    """Context manager in which an embedding of positions computes those ``shift`` further on."""
    if embedding is None or not shift:
        yield
        return
    own = embedding.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("position_ids") is not None:
            return own(*args, **{**kwargs, "position_ids": kwargs["position_ids"] + shift})
        *rest, past = args  # M2M100
        return own(*rest, past + shift)

    embedding.forward = forward
    try:
        yield
    finally:
        del embedding.forward


def logits_of(
    hf: PreTrainedModel, encoder_ids: Tensor, decoder_ids: Tensor, kv: Mapping[str, Tensor], pos_start: int
) -> Tensor:
    """Logits ``[T, V]`` of one request by the oracle."""
    with brute_force(hf, kv, pos_start):
        return hf(input_ids=encoder_ids[None], decoder_input_ids=decoder_ids[None], use_cache=False).logits[0]


def rows(seed: int, count: int = 5) -> list[dict[str, list[int]]]:
    """Random rows of token ids and labels of lengths of their own."""
    g = np.random.default_rng(seed)
    sizes = zip(g.integers(1, 9, count), g.integers(1, 7, count), strict=True)
    return [
        {k: g.integers(3, VOCAB, int(n)).tolist() for k, n in zip(("input_ids", "labels"), s, strict=True)}
        for s in sizes
    ]


@contextlib.contextmanager
def counted(hf: PreTrainedModel) -> Iterator[Counter[str]]:
    """Context manager that counts forwards of the encoder and of the key projections of cross-attention.

    Yields:
        Counts by ``"encoder"`` and ``"cross"``.
    """
    counts: Counter[str] = Counter()

    def count(name: str) -> Any:
        def hook(*_: Any) -> None:
            counts[name] += 1

        return hook

    projections = [m.k_proj if hasattr(m, "k_proj") else m.k for m in attention_modules(hf)["cross"]]
    hooks = [hf.get_encoder().register_forward_hook(count("encoder"))]
    hooks += [p.register_forward_hook(count("cross")) for p in projections]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def random_texts(lengths: Sequence[int], *, seed: int = 0) -> list[Tensor]:
    """Random token ids without special tokens.

    Args:
        lengths: Number of tokens of each text.
        seed: Seed.
    """
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=g) for n in lengths]
