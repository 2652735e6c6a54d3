"""Prefixes with rows in some layers only, against PEFT models whose other layers leave out the prefix's keys."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import tiny
from parity.packed import case, packed
from parity.test_generate import alone
from prefixfast import Engine, HFCache, Prefix, load
from prefixfast.prefix import peft_format as layout

SETS = ((1,), (0, 2))  # layers of the two prefixes of a case
LOWEST = ((0,), (0,))


def in_layers(prefix: Prefix, layers) -> Prefix:
    return dataclasses.replace(
        prefix, kv={name: t for name, t in prefix.kv.items() if int(name.split(".")[1]) in layers}
    )


def logits_and_gradients(make, c, weights, sets):
    """Logits and table gradients of PEFT's models for each prompt alone."""
    out, grads = [], [torch.zeros_like(t) for t in c.tables]
    models, plain = (
        [tiny.with_prefix(make(), t, [layers] * len(t)) for t, layers in zip(c.tables, sets, strict=True)],
        make(),
    )
    for prompt, choice, weight in zip(c.prompts, c.choice, weights, strict=True):
        model = plain if choice < 0 else models[choice]
        logits = model(input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None]).logits[0]
        out.append(logits.detach())
        if choice >= 0:
            loss = (F.cross_entropy(logits, prompt.roll(-1), reduction="none") * weight).sum()
            grads[choice] += torch.autograd.grad(loss, model.prompt_encoder["default"].embedding.weight)[0]
    return torch.cat(out), grads


FAMILIES = [("gpt2", SETS), ("gpt2", LOWEST), ("llama", SETS), ("mistral", SETS), ("gemma2", SETS)]


@pytest.mark.parametrize(
    ("family", "sets", "backend"),
    [
        # The interpreter takes 4 to 8 seconds for a case.
        pytest.param(*own, b, marks=pytest.mark.long if b == "triton" and own not in (FAMILIES[1], FAMILIES[4]) else ())
        for own in FAMILIES
        for b in ("torch", "triton", "reference")
    ],
)
def test_logits_and_gradients_equal_peft(family, sets, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    c = case(lambda: tiny.make(family), vocab=tiny.VOCAB, longest=20 if backend == "triton" else 40)
    g = torch.Generator().manual_seed(9)
    weights = [torch.rand(len(p), generator=g) for p in c.prompts]
    expected, gradients = logits_and_gradients(lambda: tiny.make(family), c, weights, sets)
    with load(tiny.make(family), backend=backend) as base:
        own = [in_layers(p, layers) for p, layers in zip(c.prefixes(base.hf), sets, strict=True)]
        got, leaves = packed(base, c, own, grad=True)
        assert ((got - expected).abs().max() / expected.abs().max()).item() < 1e-5
        without, _ = packed(base, c, c.prefixes(base.hf))
        assert ((without - expected).abs().max() / expected.abs().max()).item() > 1e-2, (
            "rows in all layers must change the logits"
        )
        if backend == "reference":
            return
        (
            F.cross_entropy(got, torch.cat([p.roll(-1) for p in c.prompts]), reduction="none") * torch.cat(weights)
        ).sum().backward()
    assert [len(k) for k, _ in leaves] == [
        sum(len(t) for t, layers in zip(c.tables, sets, strict=True) if i in layers) for i in range(3)
    ]
    wanted = [layout.from_table(gradient, *tiny.shapes(tiny.make(family))) for gradient in gradients]
    top = max(t.abs().max() for kv in wanted for t in kv.values())
    for i, kv in enumerate(leaves):
        for x, t in zip("kv", kv, strict=True):
            mine = [kv[f"self.{i}.{x}"] for kv, layers in zip(wanted, sets, strict=True) if i in layers]
            assert not mine or (t.grad - torch.cat(mine)).abs().max() < 2e-5 * top, (i, x)
            assert all(
                kv[f"self.{i}.{x}"].abs().max() == 0 for kv, layers in zip(wanted, sets, strict=True) if i not in layers
            ), "PEFT has no gradient in layers without the prefix"


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_sequences_of_prefixes_equal_peft(family, beams):
    """Two prefixes in different layers equal one prefix of PEFT whose rows are seen in different layers."""
    table = tiny.peft_table(tiny.make(family), 7, 3)
    parts = [(3, (0, 1)), (4, (1, 2))]
    theirs = tiny.with_prefix(tiny.make(family), table, [layers for n, layers in parts for _ in range(n)])
    base = tiny.make(family)
    with load(base) as known:
        made_for = known.fingerprint
    kv = [layout.from_table(t, *tiny.shapes(base)) for t in table.split([3, 4])]
    own = [in_layers(Prefix(t, pos_start=7, base=made_for), layers) for t, (_, layers) in zip(kv, parts, strict=True)]
    prompts = case(lambda: tiny.make(family), vocab=tiny.VOCAB, longest=20).prompts
    with Engine(base, max_num_seqs=12, max_model_len=48) as engine:
        got = engine.generate(
            [p.tolist() for p in prompts for _ in range(2)],
            [own, own[:1]] * len(prompts),
            num_beams=beams,
            max_new_tokens=12,
        )
    for prompt, both, first in zip(prompts, got[::2], got[1::2], strict=True):
        expected = alone(theirs, prompt, max_new_tokens=12, num_beams=beams)
        assert both.token_ids == expected
        assert first.usage["prefix_rows"] == 3


def test_generate_of_transformers_on_the_packed_forward():
    c = case(lambda: tiny.make("llama"), vocab=tiny.VOCAB, longest=20)
    theirs = [
        tiny.with_prefix(tiny.make("llama"), t, [layers] * len(t)) for t, layers in zip(c.tables, SETS, strict=True)
    ]
    prompt = c.prompts[0]
    with (
        load(tiny.make("llama")) as base,
        HFCache(
            base, own := [in_layers(p, s) for p, s in zip(c.prefixes(base.hf), SETS, strict=True)], max_len=40
        ) as cache,
    ):
        ids = prompt.repeat(len(own), 1)
        got = base.hf.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=12,
            do_sample=False,
        )
    for model, tokens in zip(theirs, got[:, len(prompt) :].tolist(), strict=True):
        expected = alone(model, prompt, max_new_tokens=12)
        assert tokens[: len(expected)] == expected
