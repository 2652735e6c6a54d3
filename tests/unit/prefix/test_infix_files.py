"""An infix in folders, stores, PEFT adapters, concatenation and inspection."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

import infixes
import prefixfast
import tiny
from prefixfast import Prefix, PrefixStore
from prefixfast.errors import ConfigError, DataError

KV = {f"self.0.{x}": torch.arange(12.0).view(3, 2, 2) + i for i, x in enumerate("kv")}
INFIX = Prefix(KV, pos_start=3, position="infix")
PREFIX = Prefix(KV, pos_start=3)


def test_a_folder_keeps_the_position_and_folders_of_prefixes_are_as_before(tmp_path):
    for name, prefix in (("infix", INFIX), ("prefix", PREFIX)):
        prefix.save_pretrained(tmp_path / name)
        found = Prefix.from_pretrained(tmp_path / name)
        assert (found.position, found.digest) == (name, prefix.digest)
    meta = json.loads((tmp_path / "prefix" / "prefixfast.json").read_text())
    assert "position" not in meta, "version 0.1.0 reads folders of prefixes, and refuses those of infixes"
    assert json.loads((tmp_path / "infix" / "prefixfast.json").read_text())["position"] == "infix"
    assert (PREFIX.requires["prefixfast"], INFIX.requires["prefixfast"]) == (">=0.1.0", ">0.1.0")


def test_the_digest_of_a_prefix_is_that_of_version_0_1_0():
    sha = hashlib.sha256(json.dumps([3, "slide"]).encode())
    for name, t in sorted(KV.items()):
        sha.update(json.dumps([name, [3, 2, 2], "torch.float32"]).encode() + t.numpy().tobytes())
    assert PREFIX.digest == sha.hexdigest() != INFIX.digest


@pytest.mark.parametrize("wrong", [None, 1, "middle", ["infix"]])
def test_other_positions_are_refused(tmp_path, wrong):
    with pytest.raises(DataError, match="expected position 'prefix' or 'infix'"):
        Prefix(KV, pos_start=3, position=wrong)
    INFIX.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "prefixfast.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"position": wrong}))
    with pytest.raises(DataError, match="position"):
        Prefix.from_pretrained(tmp_path / "a")


def test_a_store_keeps_the_position(tmp_path):
    store = PrefixStore(tmp_path / "store")
    store.put("a", INFIX)
    store.put("b", PREFIX)
    assert [store.info(name).position for name in "ab"] == ["infix", "prefix"]
    assert [store[name].digest for name in "ab"] == [INFIX.digest, PREFIX.digest]
    entry = store.info("a").folder / "entry.json"
    entry.write_text(json.dumps({k: v for k, v in json.loads(entry.read_text()).items() if k != "position"}))
    assert not PrefixStore(tmp_path / "store").verify().ok, "the entry describes another prefix"


def test_peft_cannot_hold_an_infix(tmp_path):
    assert PREFIX.peft_incompatibility is None
    assert "last prompt token" in INFIX.peft_incompatibility
    with pytest.raises(ConfigError, match="last prompt token"):
        INFIX.to_peft(tmp_path / "a")
    INFIX.save_pretrained(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["prefix.safetensors", "prefixfast.json"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_concatenated_infixes_are_their_composition(family):
    with prefixfast.load(tiny.make(family)) as base:
        parts = [infixes.make(base, n, n) for n in (3, 5)]
        both = parts[0].concat(parts[1])
        assert (both.position, both.length) == ("infix", 8)
        runs = [prefixfast.score([[5, 6, 7]], [p], model=base, targets=[[8, 9]])[0] for p in (parts, both)]
        assert runs[0].token_logprobs == pytest.approx(runs[1].token_logprobs, abs=1e-5)
        with pytest.raises(ConfigError, match="position is 'prefix' in prefix 1"):
            parts[0].concat(infixes.make(base, 3, 1, position="prefix"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_infix_is_inspected_where_it_is_seen(family):
    with prefixfast.load(tiny.make(family)) as base:
        infix = infixes.make(base, 4, 1)
        found = infix.inspect(base, [[5, 6, 7, 8]], words=0)
        assert [len(kl) for kl in found.divergence] == [1]
        assert float(found.mass.min()) > 0
        with torch.no_grad():
            given, alone = (infixes.logits(tiny.make(family), p, [5, 6, 7, 8], 3)[-1] for p in ([infix], []))
        p, q = (t.double().log_softmax(-1) for t in (given, alone))
        expected = float((p.exp() * (p - q)).sum())
        assert float(found.divergence[0][0]) == pytest.approx(expected, rel=1e-3)
