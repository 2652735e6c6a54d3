"""A request's log-probabilities have the same bits alone and in any batch, on CPUs with packed weights."""

from __future__ import annotations

import pytest
import torch
import transformers

import tiny
from prefixfast import Engine, Prefix
from prefixfast.model import lm_head, packed_forward
from prefixfast.model.prepack import prepack

pytestmark = pytest.mark.skipif(
    (why := prepack(torch.nn.Linear(8, 8)).why_not) is not None, reason=f"weights cannot be packed: {why}"
)
HAS_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
DTYPES = [
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not HAS_BF16, reason="this CPU has neither AVX512-BF16 nor AMX")
    ),
    torch.float32,
]
LENGTHS = [5, 9, 40, 130, 2, *[1] * 24]
# Products of at least 1,536 columns are those whose single rows round differently.
WIDE = {"hidden_size": 1536, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}


@pytest.fixture(params=DTYPES, ids=str)
def base(request):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**tiny.GROUPED, **WIDE, "max_position_embeddings": 256})
    return transformers.LlamaForCausalLM(config).eval().to(request.param)


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(3, tiny.VOCAB, (n,), generator=g).tolist() for n in LENGTHS]


Chosen = list[list[Prefix]]


def generated(engine: Engine, batch: list[list[int]], prefixes: Chosen) -> list[object]:
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": True, "seed": 3, "logprobs": 2}
    return [g.logprobs for g in engine.generate(batch, prefixes, **how)]


def scored(engine: Engine, batch: list[list[int]], prefixes: Chosen) -> list[object]:
    return [s.token_logprobs for s in engine.score(batch, prefixes, targets=[[7]] * len(batch))]


def chosen_prefixes(engine: Engine) -> Chosen:
    """No prefix, one of two, or both, in turn."""
    g = torch.Generator().manual_seed(2)
    made = []
    for length in (5, 40):
        shapes = {
            f"self.{i}.{x}": (length, s.num_kv_heads, s.head_dim)
            for i, s in enumerate(engine.model.layers)
            for x in "kv"
        }
        made.append(Prefix({name: torch.randn(shape, generator=g) for name, shape in shapes.items()}, pos_start=length))
    ways = [[], made[:1], made[1:], made, made[:1]]
    return [ways[i % len(ways)] for i in range(len(LENGTHS))]


def together_and_alone(base, run, **options) -> list[bool]:
    """Whether each request's numbers are the same in a batch, in the reversed batch and alone."""
    batch = prompts()
    with Engine(base, **{"max_num_seqs": 8, "max_model_len": 160, "kv_cache_memory": 2**24, **options}) as engine:
        prefixes = chosen_prefixes(engine)
        alone = [run(engine, [prompt], [own])[0] for prompt, own in zip(batch, prefixes, strict=True)]
        both, reverse = run(engine, batch, prefixes), run(engine, batch[::-1], prefixes[::-1])[::-1]
    return [a == b == c for a, b, c in zip(alone, both, reverse, strict=True)]


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (generated, {}),
        (generated, {"max_num_seqs": 3}),
        (generated, {"max_num_batched_tokens": 64}),  # prompts of 130 tokens are cut
        (scored, {}),
        (scored, {"max_num_batched_tokens": 16}),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_bits_are_the_same_alone_and_in_a_batch(base, run, options):
    assert all(together_and_alone(base, run, **options))


def test_without_the_second_row_they_differ(base, monkeypatch):
    for module in (packed_forward, lm_head):
        monkeypatch.setattr(module, "two_rows", lambda t, _: t)
    assert not all(together_and_alone(base, generated))


def test_rows_of_the_output_layer_that_are_left_over_are_not_alone(base):
    """257 targets are scored in parts of 256 logits, so that the last one has a product of its own."""
    targets = [[7]] * 257
    with Engine(base, max_num_seqs=2, max_model_len=160) as engine:
        scores = [s.logprob for s in engine.score([[5, 6]] * 257, targets=targets)]
    assert len(set(scores)) == 1
