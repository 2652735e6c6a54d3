"""Folders, stores, concatenation and checks of prefixes of encoder-decoder bases."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from prefixfast import BaseMismatchError, ConfigError, DataError, Prefix, PrefixStore, check_fits
from prefixfast.cli.convert import adapter_folders
from prefixfast.config.sites import SITES
from prefixfast.prefix.model_card import model_card
from sites import HEADS, FakeModel, make_prefix

META, TENSORS = "prefixfast.json", "prefix.safetensors"
# Digest of version 0.1.0.
GOLDEN = "25a1df70c02a3ccec7f061e1d29a72d775427f02961b97feda06d12ad516a92e"
THREE = {"enc": 3, "self": 5, "cross": 2}
BART = {"is_encoder_decoder": True, "encoder_layers": 3, "decoder_layers": 2, "num_hidden_layers": 3}


def model(**how) -> FakeModel:
    infix = SimpleNamespace(refusal=None, has_fixed_positions=False, place=0)
    found = FakeModel(**how)
    found.handle, found.fingerprint, found.quantization = SimpleNamespace(infix=infix), {}, None
    found.allow_base_mismatch, found.layers = None, found.sites["self"]
    return found


@pytest.mark.parametrize("lengths", [THREE, {"enc": 4}, {"cross": 2, "self": 2}])
def test_a_folder_with_other_sites_has_version_2(tmp_path, lengths):
    prefix = make_prefix(lengths, base={"name": "bart", "config": BART}, training={"num_frozen_tokens": 1})
    prefix.save_pretrained(tmp_path / "p")
    meta = json.loads((tmp_path / "p" / META).read_text(encoding="utf8"))
    assert (meta["version"], meta["not_peft_because"]) == (2, "it has sites other than 'self'")
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == [TENSORS, META]
    again = Prefix.from_pretrained(tmp_path / "p")
    assert (again.digest, again.fields, again.length) == (prefix.digest, prefix.fields, prefix.length)
    assert again.requires["prefixfast"] == ">0.1.0"
    (tmp_path / "p" / META).write_text(json.dumps({**meta, "version": 3}), encoding="utf8")
    with pytest.raises(DataError, match="expected version 1 or 2, got 3; update prefixfast"):
        Prefix.from_pretrained(tmp_path / "p")


def test_prefixes_of_decoder_only_bases_keep_version_and_digest(tmp_path):
    kv = {f"self.{i}.{x}": torch.arange(24.0).view(3, 2, 4) + 100 * i + j for i in range(2) for j, x in enumerate("kv")}
    prefix = Prefix(kv, pos_start=3)
    assert prefix.digest == GOLDEN
    assert prefix.requires["prefixfast"] == ">=0.1.0"
    prefix.save_pretrained(tmp_path / "p")
    assert json.loads((tmp_path / "p" / META).read_text(encoding="utf8"))["version"] == 1
    moved = Prefix({n.replace("self", "cross"): t for n, t in kv.items()}, pos_start=3)
    assert moved.digest != prefix.digest


def test_a_store_keeps_the_sites(tmp_path, cli):
    store = PrefixStore(tmp_path / "s")
    prefix = make_prefix(THREE)
    entry = store.put("mill", prefix)
    assert PrefixStore(tmp_path / "s").info("mill").length == entry.length == THREE
    assert entry.read().digest == store["mill"].digest == prefix.digest
    assert store.verify().ok
    assert store.verify(absent=prefix.digest).holding
    shown = json.loads(cli("prefixes", "show", tmp_path / "s", "mill", "--json").out)
    assert (shown["length"], shown["sites"], shown["rows"]) == (THREE, list(SITES), 10)
    assert shown["layers"] == {"enc": [0, 1, 2], "self": [0, 1], "cross": [0, 1]}
    assert "enc 3, self 5, cross 2" in cli("prefixes", "list", tmp_path / "s").out
    assert json.loads(cli("prefixes", "list", tmp_path / "s", "--json").out)[0]["length"] == THREE
    assert cli("prefixes", "export", tmp_path / "s", tmp_path / "out").code == 0
    assert cli("prefixes", "import", tmp_path / "t", tmp_path / "out").code == 0
    assert cli("convert", tmp_path / "out" / "mill", tmp_path / "copy", "--verify").code == 0
    assert PrefixStore(tmp_path / "t")["mill"].digest == Prefix.from_pretrained(tmp_path / "copy").digest
    assert adapter_folders(tmp_path / "out") == [tmp_path / "out" / "mill"]


def test_the_card_tells_sites_lengths_and_layers():
    card = model_card(make_prefix(THREE, base={"name": "facebook/bart-base", "config": BART}), "ann/mill")
    for rows in (
        "3 rows of keys and values of encoder self-attention for each of 3 layers",
        "5 rows of keys and values of decoder self-attention for each of 2 layers",
        "2 rows of keys and values of cross-attention for each of 2 layers",
    ):
        assert rows in card
    assert "pipeline_tag: text2text-generation" in card
    part = {n: t for n, t in make_prefix({"enc": 3}).kv.items() if ".1." in n}
    card = model_card(Prefix(part, pos_start=0, base={"name": "facebook/bart-base", "config": BART}), "ann/mill")
    assert "encoder self-attention for each of the layers 1 (from 0)" in card
    own = make_prefix({"self": 5}, base={"name": "facebook/bart-base", "config": BART})
    assert "AutoModelForSeq2SeqLM.from_pretrained" in model_card(own, "ann/mill")


def test_concatenation_joins_each_site():
    first, second = make_prefix({"enc": 3, "self": 5}), make_prefix({"self": 4, "cross": 2}, seed=1)
    third = make_prefix({"enc": 1, "cross": 3}, seed=2, pos_start=7)
    joined = first.concat(second, third)
    assert joined.length == {"enc": 4, "self": 9, "cross": 5}
    assert joined.pos_start == 7
    parts = {"enc": (first, third), "self": (first, second), "cross": (second, third)}
    for name in joined.kv:
        assert torch.equal(joined.kv[name], torch.cat([p.kv[name] for p in parts[name.split(".")[0]]]))
    some = Prefix({n: t for n, t in third.kv.items() if not n.startswith("enc.0")}, pos_start=0)
    with pytest.raises(ConfigError, match="prefix 2 lies in other layers than prefix 0"):
        first.concat(second, some)
    assert second.concat(some).length == {"enc": 1, "self": 4, "cross": 5}
    half = Prefix({n: t.half() for n, t in third.kv.items()}, pos_start=0)
    with pytest.raises(ConfigError, match="another dtype than prefix 0"):
        first.concat(second, half)
    heads = Prefix({n: t[:, :1] for n, t in third.kv.items()}, pos_start=0)
    with pytest.raises(BaseMismatchError, match="prefix 2 has other heads than prefix 1"):
        make_prefix({"self": 5}).concat(second, heads)
    uneven = Prefix({n: t[: 1 + n.startswith("cross.0")] for n, t in third.kv.items()}, pos_start=0)
    with pytest.raises(ConfigError, match="layers of prefix 1 differ in length"):
        first.concat(uneven)


def test_each_site_is_compared_with_the_base():
    check_fits(model(), make_prefix(THREE))
    check_fits(model(), make_prefix({"enc": 3}))
    decoder_only = model(sites={"self": model().sites["self"]})
    check_fits(decoder_only, make_prefix({"self": 3}))
    for site, words in {"enc": "encoder self-attention", "cross": "cross-attention"}.items():
        with pytest.raises(
            BaseMismatchError, match=rf"rows for {words} \(site '{site}'\), and this base is decoder-on"
        ):
            check_fits(decoder_only, make_prefix({"self": 3, site: 2}))
    swapped = {
        n.replace("enc", "x").replace("cross", "enc").replace("x", "cross"): t for n, t in make_prefix(THREE).kv.items()
    }
    with pytest.raises(BaseMismatchError, match=r"cross\.0\.k: \(3, 4\) where \(2, 6\) is expected"):
        check_fits(model(), Prefix({n: t for n, t in swapped.items() if n.startswith("cross")}, pos_start=0))
    deeper = {**make_prefix(THREE).kv, **{f"enc.3.{x}": torch.zeros(3, *HEADS["enc"]) for x in "kv"}}
    with pytest.raises(BaseMismatchError, match=r"enc\.3\.k: \(3, 4\) where no layer is expected"):
        check_fits(model(), Prefix(deeper, pos_start=0, base={"config": BART}))
    part = {n: t for n, t in make_prefix(THREE).kv.items() if not n.startswith("enc.2")}
    with pytest.raises(BaseMismatchError, match="does not say for how many it was made"):
        check_fits(model(), Prefix(part, pos_start=0))
    uneven = dict(make_prefix({"self": 3}).kv) | {
        n: t for n, t in make_prefix({"self": 2}).kv.items() if n.startswith("self.1")
    }
    with pytest.raises(BaseMismatchError, match="of different lengths"):
        check_fits(model(), Prefix(uneven, pos_start=3))
