"""Base, prefixes, sources and rows of the suite ``seq2seq``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel

from prefixfast.config.sites import Site
from prefixfast.model.base import DTYPES, Model
from prefixfast.prefix.prefix import Prefix

DESCRIPTION = "BART-base shape, random weights"
BART_BASE = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
}
# Tokens of the training abstracts and summaries of SciTLDR in BART's vocabulary, at 5, 15, ... 95 % of the rows.
SOURCE_TOKENS = (118, 146, 163, 179, 195, 209, 228, 248, 275, 326)
TARGET_TOKENS = (13, 17, 20, 23, 25, 27, 30, 34, 38, 45)
Rows = list[dict[str, list[int]]]


@dataclass(frozen=True)
class Workload:
    """Amounts of work.

    Attributes:
        users: Number of requests, each with a prefix of its own.
        prefix: Rows of a prefix at each site.
        source: Tokens of each source.
        new: Generated tokens of each text.
        beams: Number of beams.
        one_by_one: Requests that PEFT is timed on. Its rate does not depend on their number.
        batch: Rows of a training batch.
        steps: Number of timed training steps.
    """

    users: int = 32
    prefix: int = 100
    source: int = 400
    new: int = 40
    beams: int = 4
    one_by_one: int = 2
    batch: int = 10
    steps: int = 3

    def sources(self, vocab_size: int) -> list[list[int]]:
        """Random token ids of the sources."""
        g = torch.Generator().manual_seed(0)
        return torch.randint(3, vocab_size, (self.users, self.source), generator=g).tolist()

    def rows(self, vocab_size: int) -> Rows:
        """Rows of random tokens with the lengths of SciTLDR, each length once in ten rows, in random pairs."""
        g = torch.Generator().manual_seed(1)
        numbers = [torch.randperm(10, generator=g).tolist() for _ in range(-(-self.batch // 10))]
        pairs = [(SOURCE_TOKENS[i], TARGET_TOKENS[j]) for own in numbers for i, j in enumerate(own)][: self.batch]
        return [
            {
                "input_ids": torch.randint(3, vocab_size, (n,), generator=g).tolist(),
                "labels": torch.randint(3, vocab_size, (m,), generator=g).tolist(),
            }
            for n, m in pairs
        ]


def make_base(dtype: str, **fields: int) -> PreTrainedModel:
    """BART with random weights, whose generation config says nothing but its start, end and padding token.

    Args:
        dtype: Compute dtype, a key of `DTYPES`.
        fields: Fields of the configuration in place of those of BART-base.
    """
    torch.manual_seed(0)
    hf: PreTrainedModel = BartForConditionalGeneration(BartConfig(**BART_BASE | fields)).to(DTYPES[dtype]).eval()
    hf.generation_config.forced_eos_token_id = None
    return hf


def table_pair(layer: int, num_layers: int) -> int:
    """Number of the pair of keys and values in PEFT's table that a decoder layer reads."""
    return 2 * layer % num_layers


def site_prefixes(model: Model, length: int, count: int, sites: Sequence[Site]) -> list[Prefix]:
    """Random prefixes, of which number i is the same in every call.

    Layers of which PEFT has only one pair of keys and values have the same rows.
    """
    found = []
    for i in range(count):
        kv = {}
        for site in sites:
            shapes = model.sites[site]
            for n, shape in enumerate(shapes):
                g = torch.Generator().manual_seed(1000 * i + 100 * len(site) + table_pair(n, len(shapes)))
                for x, row in zip("kv", shape.row, strict=True):
                    kv[f"{site}.{n}.{x}"] = torch.randn(length, *row, generator=g) * 0.5
        found.append(Prefix(kv, pos_start=length, base=model.fingerprint))
    return found
