"""Prefixes that are added, replaced, pinned and deleted under load: outputs stay right and memory stays flat."""

import gc
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from prefixfast import Engine, Prefix, PrefixStore

NAMES, POOL, TOKENS, PROMPT = 1000, 400, 3, [5, 17, 23, 40]
SETTINGS = {
    "vocab_size": 101,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 96,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}


def make_base():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SETTINGS, bos_token_id=1, eos_token_id=2)).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * (0.15 if p.dim() > 1 else 0.02))
    return model


def make_pool(count):
    """Random prefixes of 1 to 30 rows."""
    g = torch.Generator().manual_seed(1)
    lengths = [1 + (7 * i) % 30 for i in range(count)]
    return [
        Prefix({f"self.{i}.{x}": torch.randn(n, 4, 8, generator=g) for i in range(2) for x in "kv"}, n) for n in lengths
    ]


@torch.no_grad()
def expected_tokens(model, prefix):
    """Transformers' own greedy tokens with the prefix in its cache."""
    cache = DynamicCache()
    for i in range(2):
        cache.update(*(prefix.kv[f"self.{i}.{x}"].transpose(0, 1)[None] for x in "kv"), i)
    tokens, ids, length = [], torch.tensor([PROMPT]), prefix.length
    for _ in range(TOKENS):
        positions = torch.arange(length, length + ids.shape[1])[None]
        logits = model(input_ids=ids, past_key_values=cache, position_ids=positions).logits[0, -1]
        logits[2] = -torch.inf
        length += ids.shape[1]
        ids = logits.argmax().view(1, 1)
        tokens.append(int(ids))
    return tokens


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def churn(tmp_path, operations, names):
    plain = make_base()
    pool = make_pool(POOL)
    expected = [expected_tokens(plain, p) for p in pool]
    assert len({tuple(e) for e in expected}) > POOL / 8, "different prefixes must give different outputs"
    store, g = PrefixStore(tmp_path / "store"), random.Random(3)
    current = {name: g.randrange(POOL) for name in range(names)}
    for name, i in current.items():
        store.put(f"user {name}", pool[i])
    previous, done, count, memory = dict(current), 0, Counter(), []
    row = 2 * 4 * 8 * 4 * 2
    with Engine(
        make_base(),
        store=store,
        max_num_seqs=32,
        max_model_len=32,
        kv_cache_memory=row * (96 + 32 * 32 + 800),
        prefix_memory=row * 640,
    ) as engine:
        while done < operations:
            users = [g.randrange(names) if g.random() < 0.6 else g.randrange(40) for _ in range(g.randrange(1, 40))]
            as_object = [g.random() < 0.1 for _ in users]
            prefixes = [pool[current[n]] if d else f"user {n}" for n, d in zip(users, as_object, strict=True)]
            results = engine.generate([PROMPT] * len(users), prefixes, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
            for n, result in zip(users, results, strict=True):
                assert result.token_ids == expected[current[n]], (n, current[n])
                assert result.prefix_digest == pool[current[n]].digest
            done += len(users)
            for _ in range(g.randrange(12)):
                n, kind = (
                    g.randrange(names),
                    g.choice(["replace", "replace", "roll back", "evict", "pin", "unpin", "delete"]),
                )
                if kind == "replace":
                    previous[n], current[n] = current[n], g.randrange(POOL)
                    store.put(f"user {n}", pool[current[n]])
                elif kind == "roll back" and previous[n] != current[n]:
                    store.rollback(f"user {n}")
                    previous[n], current[n] = current[n], previous[n]
                elif kind == "delete":
                    store.delete(f"user {n}")
                    previous[n] = current[n] = g.randrange(POOL)
                    store.put(f"user {n}", pool[current[n]])
                elif kind == "evict":
                    assert engine.evict(f"user {n}")
                elif kind in ("pin", "unpin"):
                    getattr(engine, kind)(f"user {n}")
                    if len(engine.loop.prefix_cache.pinned) > 20:
                        engine.evict(next(r for r in engine.resident() if r.pinned).digest)
                count[kind] += 1
                done += 1
            if len(memory) < 20 * done // operations:
                gc.collect()
                memory.append(resident_bytes())
        stats = engine.stats()
        assert all(r.requests == 0 for r in engine.resident())
        assert len(engine.loop.prefix_cache.numbers) == len(engine.loop.prefix_cache.prefixes) <= POOL
    assert stats["loads"] > operations / 8
    assert stats["evictions"] > operations / 20
    assert min(count[k] for k in ("replace", "roll back", "evict", "pin", "unpin", "delete")) > operations / 200
    return memory


def test_every_output_is_that_of_its_prefix(tmp_path):
    churn(tmp_path, 600, 60)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_operations_over_a_thousand_names_leave_memory_flat(tmp_path):
    memory = churn(tmp_path, 100_000, NAMES)
    early, late = np.median(memory[3:7]), np.median(memory[-4:])
    assert late - early < 24 * 2**20, [m >> 20 for m in memory]
