"""Keys and values of texts in encoder-decoder bases, against those that the modules of transformers compute."""

from __future__ import annotations

import pytest
import torch

from prefixfast.model.load import load
from prefixfast.model.text_kv import seq2seq_text_kv
from seq2seq import FAST, attention_modules, heads, make_seq2seq

ENCODER, DECODER = [5, 6, 7, 8], [2, 9, 10]


def projected(hf, encoder: list[int], decoder: list[int], site: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of the key and value projections of a site in the model's own forward."""
    seen: list[list[torch.Tensor]] = []
    hooks = []
    for module in attention_modules(hf)[site]:
        seen.append([])
        for name in ("k", "v"):
            projection = getattr(module, f"{name}_proj") if hasattr(module, "k_proj") else getattr(module, name)
            hooks.append(projection.register_forward_hook(lambda _, __, out, own=seen[-1]: own.append(out[0])))
    hf(input_ids=torch.tensor([encoder]), decoder_input_ids=torch.tensor([decoder]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [
        (k.view(len(k), *heads(m)), v.view(len(v), *heads(m)))
        for (k, v), m in zip(seen, attention_modules(hf)[site], strict=True)
    ]


@pytest.mark.parametrize("name", FAST)
@torch.no_grad()
def test_rows_are_those_of_the_modules_for_repeated_and_cut_texts(name):
    own = make_seq2seq(name)
    expected = {
        "enc": projected(own, [5, 6], DECODER[:1], "enc"),
        "self": projected(own, ENCODER, [2, 9, 10, 2, 9], "self"),
        "cross": projected(own, [5, 6, 7, 8, 5, 6], DECODER[:1], "cross"),
    }
    with load(make_seq2seq(name)) as model:
        found = seq2seq_text_kv(model, ENCODER, DECODER, {"cross": 6, "enc": 2, "self": 5})
        assert list(found) == ["enc", "self", "cross"]
        for site, layers in expected.items():
            torch.testing.assert_close(list(found[site]), layers, atol=1e-5, rtol=1e-5)
        assert list(seq2seq_text_kv(model, ENCODER, DECODER, {"cross": 3})) == ["cross"]
