"""An engine over a store that changes: each request uses the version that was the newest when it was submitted."""

from __future__ import annotations

import pytest

import tiny
from mixes import prefixes_of
from prefixfast import Engine, PrefixStore
from prefixfast.errors import UnknownPrefixError

HOW = {"max_new_tokens": 12, "min_new_tokens": 12}
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def base():
    return tiny.make("gpt2")


@pytest.fixture(scope="module")
def texts(base):
    """Five prefixes with the tokens that each generates for the prompt."""
    prefixes = prefixes_of(base, 3)[:5]
    with Engine(base, max_num_seqs=4, max_model_len=64) as engine:
        made = [engine.generate([PROMPT], p, **HOW)[0].token_ids for p in prefixes]
    assert len(set(map(tuple, made))) == 5
    return list(zip(prefixes, made, strict=True))


def test_requests_use_the_version_at_their_submission(base, texts, tmp_path):
    store, other = (PrefixStore(tmp_path, keep_versions=4) for _ in range(2))
    (first, one), (second, two), (third, three), *_ = texts
    with Engine(base, store=store, max_num_seqs=1, max_model_len=64) as engine:
        blocker = engine.submit([9], max_new_tokens=60, min_new_tokens=60)  # the other requests wait for it
        store.put("ann", first)
        tickets = [(engine.submit(PROMPT, "ann", **HOW), one)]
        other.put("ann", second)
        tickets.append((engine.submit(PROMPT, "ann", **HOW), two))
        other.rollback("ann")
        tickets.append((engine.submit(PROMPT, "ann", **HOW), one))
        other.put("ann", third)
        tickets.append((engine.submit(PROMPT, "ann", **HOW), three))
        blocker.result(60)
        assert [t.result(60).token_ids for t, _ in tickets] == [made for _, made in tickets]
        assert [t.result().prefix_digest for t, _ in tickets] == [p.digest for p in (first, second, first, third)]
        other.delete("ann")
        with pytest.raises(UnknownPrefixError):
            engine.submit(PROMPT, "ann", **HOW)


def test_a_name_never_means_an_old_or_another_prefix(base, texts, tmp_path):
    """Names are replaced, deleted and reused while the engine has copies of their old prefixes."""
    store = PrefixStore(tmp_path)
    with Engine(base, store=store, max_num_seqs=4, max_model_len=64) as engine:
        for turn in range(8):
            for i, name in enumerate(("ann", "bob")):
                prefix, expected = texts[(turn * (i + 1) + i) % 5]
                if turn % 4 == 3:
                    store.delete(name)
                store.put(name, prefix)
                got = engine.generate([PROMPT], name, **HOW)[0]
                assert (got.token_ids, got.prefix_digest) == (expected, prefix.digest), (turn, name)
