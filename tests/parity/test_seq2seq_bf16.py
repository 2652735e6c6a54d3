"""In bf16, where rounding changes tokens, an engine of an encoder-decoder base is as exact as transformers in bf16."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import seq2seq
from prefixfast import Engine, Prefix

LIMIT = 2.0  # root mean square error relative to that of transformers in bf16, as in the kernels' tests
NEW = 12
TEXTS = seq2seq.random_texts((9, 4, 1, 17, 12, 6), seed=3)
KV = Mapping[str, Tensor]


def make(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose weights are bf16 numbers, in any dtype."""
    return seq2seq.make_seq2seq(name).to(torch.bfloat16).to(dtype)


def make_prefix(hf: PreTrainedModel, lengths: Mapping[str, int]) -> Prefix:
    kv = {n: t.to(torch.bfloat16) for n, t in seq2seq.random_kv(hf, lengths).items()}
    return Prefix(kv, pos_start=lengths.get("self", 0))


def logprobs(hf: PreTrainedModel, text: Tensor, tokens: list[int], kv: KV, pos_start: int) -> Tensor:
    """Log-probabilities of a text's tokens by the brute-force oracle, in the model's dtype."""
    ids = torch.tensor([hf.config.decoder_start_token_id, *tokens[:-1]])
    return seq2seq.logits_of(hf, text, ids, kv, pos_start).double().log_softmax(-1)[range(len(tokens)), tokens]


def rms(found: list[Tensor], exact: list[Tensor]) -> float:
    return (torch.cat(found).double() - torch.cat(exact)).square().mean().sqrt().item()


@pytest.mark.parametrize("name", ["bart", "t5"])
@torch.no_grad()
def test_log_probabilities_of_an_engine_are_as_exact_as_those_of_transformers(name):
    plain, rounded = make(name, torch.float64), make(name, torch.bfloat16)
    every, two = make_prefix(plain, {"enc": 3, "self": 5, "cross": 2}), make_prefix(plain, {"enc": 17, "cross": 1})
    prefixes = [every, None, two, two, every, every]
    with Engine(make(name, torch.bfloat16), max_num_seqs=8, max_model_len=32) as engine:
        rows, how = [t.tolist() for t in TEXTS], {"max_new_tokens": NEW, "min_new_tokens": NEW}
        made = engine.generate(rows, prefixes, do_sample=True, seed=1, logprobs=0, **how)
        scores = engine.score(rows, prefixes, targets=[g.token_ids for g in made])
    assert len({t for g in made for t in g.token_ids}) > 10

    def by(hf: PreTrainedModel, without: str = "") -> list[Tensor]:
        """Log-probabilities of all requests by the oracle, with the prefixes of all sites but one."""
        found = []
        for text, g, prefix in zip(TEXTS, made, prefixes, strict=True):
            kv = {n: t for n, t in prefix.kv.items() if n.split(".")[0] != without} if prefix else {}
            found.append(logprobs(hf, text, g.token_ids, kv, prefix.pos_start if prefix else 0))
        return found

    exact = by(plain)
    limit = LIMIT * rms(by(rounded), exact)
    assert rms([torch.tensor([t.logprob for t in g.logprobs]) for g in made], exact) <= limit
    assert rms([torch.tensor(s.token_logprobs) for s in scores], exact) <= limit
    for site in seq2seq.SITES:
        assert rms(by(plain, without=site), exact) > 3 * limit, "rows that are left out are noticed"
