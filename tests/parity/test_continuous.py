"""Tokens under continuous batching, with cancellation, eviction and chunked prefills, equal those of PEFT alone."""

import functools
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

import shared
import tiny
from parity.test_generate import alone
from prefixfast import Engine, Prefix, PrefixStore
from prefixfast.config import GenerationParams
from prefixfast.engine.make_requests import make_requests
from prefixfast.prefix import peft_format as layout

PROMPTS, LENGTHS = (3, 90, 17, 40, 1, 75), (20, 33, 5, 48, 16, 9)
NEW = 10


class World:
    """A base model, prompts and prefixes, and the tokens that PEFT generates for each pair."""

    def __init__(self, make, vocab: int, folder) -> None:
        g = torch.Generator().manual_seed(2)
        self.make, self.base = make, make()
        self.prompts = [torch.randint(3, vocab, (n,), generator=g) for n in PROMPTS]
        self.tables = [tiny.peft_table(make(), n, seed, 0.5) for seed, n in enumerate(LENGTHS)]
        kinds = range(tiny.shapes(self.base)[0]), (0, 2)  # every third prefix has rows in some layers only
        self.layers = [kinds[i % 3 == 2] for i in range(len(LENGTHS))]
        kvs = [layout.from_table(t, *tiny.shapes(self.base)) for t in self.tables]
        self.prefixes = [
            Prefix({f"self.{i}.{x}": kv[f"self.{i}.{x}"] for i in layers for x in "kv"}, pos_start=len(t))
            for t, kv, layers in zip(self.tables, kvs, self.layers, strict=True)
        ]
        self.store = PrefixStore(folder)
        for i, prefix in enumerate(self.prefixes):
            self.store.put(str(i), prefix)
        self.expected = functools.cache(self._expected)

    def _expected(self, prompt: int, prefix: int | None, beams: int) -> list[int]:
        model = self.make() if prefix is None else self.theirs(prefix)
        end = (
            model.generation_config.eos_token_id if prefix is None else model.base_model.generation_config.eos_token_id
        )
        return alone(model, self.prompts[prompt], end=end, max_new_tokens=NEW, num_beams=beams)

    @functools.cache  # noqa: B019 - lives as long as the module's fixture
    def theirs(self, prefix: int):
        return tiny.with_prefix(
            self.make(),
            self.tables[prefix],
            [self.layers[prefix]] * LENGTHS[prefix] if len(self.layers[prefix]) == 2 else None,
        )


@pytest.fixture(scope="module", params=["gpt2", "gemma2", "stories260K"])
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    if request.param != "stories260K":
        return World(functools.partial(tiny.make, request.param), tiny.VOCAB, folder)
    weights = shared.folder("lm", "stories260K", "hf")
    return World(functools.partial(AutoModelForCausalLM.from_pretrained, weights, dtype=torch.float32), 500, folder)


@pytest.mark.parametrize("run_ahead", [False, True], ids=["read at once", "one step ahead"])
@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.long)])
def test_tokens_equal_peft_under_continuous_batching(world, seed, run_ahead):
    g = random.Random(seed)
    row = 4 * sum(heads * dim for _, heads, dim in world.prefixes[0].shapes.values())
    with Engine(
        world.base,
        store=world.store,
        max_num_seqs=8,
        max_model_len=110,
        max_num_batched_tokens=70,
        kv_cache_memory=row * (64 + 16 * 30),
    ) as engine:
        loop, made, ended, cancelled, unread = engine.loop, {}, {}, set(), 0
        loop.run_ahead = run_ahead  # True on a GPU
        arrivals = sorted(g.randrange(60) for _ in range(40))
        step = 0
        with torch.inference_mode():
            while arrivals or loop.busy:
                while arrivals and arrivals[0] <= step:
                    arrivals.pop(0)
                    prompt, prefix, beams = (
                        g.randrange(len(PROMPTS)),
                        g.choice([None, *range(len(LENGTHS))]),
                        g.choice([1] * 15 + [3] if run_ahead else [1, 1, 3]),
                    )
                    call = GenerationParams(max_new_tokens=NEW, num_beams=beams)
                    by_name_or_object = (
                        None if prefix is None else str(prefix) if prefix % 2 else world.prefixes[prefix]
                    )
                    (request,) = make_requests(
                        engine.model,
                        [world.prompts[prompt].tolist()],
                        [by_name_or_object],
                        call,
                        engine.max_model_len,
                        world.store,
                    )
                    number = next(engine.driver.next_number)
                    loop.add(number, request)
                    made[number] = (prompt, prefix, beams)
                if loop.busy and g.random() < 0.1:
                    number = g.choice(list(loop.requests))
                    cancelled.add(number)
                    loop.cancel(number)
                if loop.busy:
                    ended |= loop.step()
                    unread += len(loop.unread) > 0
                step += 1
        stats = engine.stats()
    assert set(ended) == set(made)
    for number, output in ended.items():
        expected = world.expected(*made[number])
        if output.sequences[0].finish_reason == "cancelled":
            assert number in cancelled
            assert (
                made[number][2] > 1 or output.sequences[0].token_ids == expected[: len(output.sequences[0].token_ids)]
            )
        else:
            assert output.sequences[0].token_ids == expected, (made[number], output)
    for counter in ("evictions", "loads", "continued_prefills", "cancelled", "reads", "decode_steps"):
        assert stats[counter] > 0, (counter, stats)
    assert (unread > 20) == run_ahead
