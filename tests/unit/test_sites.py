"""Tests of sites: mappings by site, and lengths and layers by site in `PrefixConfig` and its flags."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import yaml
from typer.testing import CliRunner

from prefixfast import ConfigError, PrefixConfig
from prefixfast.cli import app
from prefixfast.config.sites import SITES, BySite, one_or_by_site

ENCDEC = ("enc", "self", "cross")


def test_a_mapping_by_site_is_an_immutable_dict_in_canonical_order():
    lengths = BySite({"cross": 2, "enc": 3})
    assert list(lengths) == ["enc", "cross"]
    assert lengths == {"cross": 2, "enc": 3} != BySite({"enc": 3})
    assert hash(lengths) == hash(BySite({"enc": 3, "cross": 2}))
    for again in (copy.copy(lengths), copy.deepcopy(lengths), pickle.loads(pickle.dumps(lengths))):
        assert again == lengths
        assert type(again) is BySite
    assert json.loads(json.dumps({"length": lengths})) == {"length": {"enc": 3, "cross": 2}}
    with pytest.raises(ValueError, match="got 'decoder'"):
        BySite({"decoder": 1})
    changes = ("__setitem__", "setdefault", "update", "pop", "popitem", "clear", "__delitem__", "__ior__")
    for change in changes:
        with pytest.raises(TypeError, match="immutable"):
            getattr(lengths, change)("enc", 5)
    assert lengths == {"enc": 3, "cross": 2}
    assert BySite.of(4, ("cross", "self")) == {"self": 4, "cross": 4}
    assert one_or_by_site({"enc": 3, "self": 3}) == one_or_by_site({"cross": 3}) == 3
    assert one_or_by_site({"self": 5, "enc": 3}) == lengths.__class__({"enc": 3, "self": 5})


def test_lengths_layers_and_sites_of_a_config():
    each = PrefixConfig(prefix_length={"cross": 2, "enc": 3, "self": 5})
    assert each.sites == SITES
    assert each.lengths(ENCDEC) == {"enc": 3, "self": 5, "cross": 2}
    assert [each.length_at(s) for s in SITES] == [3, 5, 2]
    two = PrefixConfig(prefix_length={"self": 5, "enc": 3}, sites=["self", "enc"], layers={"enc": range(2)})
    assert two.lengths(ENCDEC) == {"enc": 3, "self": 5}
    assert (two.length_at("cross"), two.layers_at("enc"), two.layers_at("self")) == (0, (0, 1), None)
    assert {two: 1}[PrefixConfig.make(two)] == 1
    same = PrefixConfig(prefix_length={"self": 4, "cross": 4})
    assert same == PrefixConfig(prefix_length=4, sites=("cross", "self"))
    assert (same.length_at("enc"), same.length_at("cross")) == (0, 4)
    assert PrefixConfig(prefix_length=7).lengths(ENCDEC) == BySite.of(7, SITES)
    assert PrefixConfig(prefix_length=7).lengths(("self",)) == {"self": 7}
    assert PrefixConfig(layers=[1]).layers_at("cross") == (1,)
    assert PrefixConfig(sites="self") == PrefixConfig(sites=["self"])
    assert PrefixConfig.make(each, prefix_length=6).lengths(ENCDEC) == BySite.of(6, SITES)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"prefix_length": {"enc": 3}, "sites": ["self"]}, "prefix_length"),
        ({"prefix_length": {"enc": 3, "self": 5}, "sites": ["enc"]}, "prefix_length"),
        ({"prefix_length": {"decoder": 3}}, "prefix_length"),
        ({"sites": ["enc", "enc"]}, "sites"),
        ({"sites": 3}, "sites"),
        ({"sites": "enc,self"}, "sites"),
        ({"sites": [["enc"]]}, "sites"),
        ({"layers": {"enc": []}}, "layers"),
        ({"layers": {"enc": [0]}, "sites": ["self"]}, "layers"),
        ({"layers": {1: [0]}}, "layers"),
        ({"prefix_length": {"enc": 3, "self": 9}, "frozen_rows": 3}, "frozen_rows"),
        ({"position": "infix", "sites": ["enc"]}, "sites"),
    ],
)
def test_what_excludes_each_other_is_refused(fields, name):
    with pytest.raises(ConfigError, match=rf"PrefixConfig\.{name}: expected"):
        PrefixConfig(**fields)


def test_sites_that_a_base_does_not_have_are_refused():
    for fields in ({"sites": ["self", "cross"]}, {"prefix_length": {"cross": 3}}, {"layers": {"cross": [0]}}):
        with pytest.raises(ConfigError, match=r"got 'cross' \(cross-attention\); this base is decoder-only"):
            PrefixConfig(**fields).sites_of(["self"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--prefix-length", "enc=3,self=5,cross=2"], {"prefix_length": {"enc": 3, "self": 5, "cross": 2}}),
        (["--prefix-length", "enc=3", "--prefix-length", "self=5"], {"prefix_length": {"enc": 3, "self": 5}}),
        (["--prefix-length", "7"], {"prefix_length": 7}),
        (["--prefix-length", "text"], {"prefix_length": "text"}),
        (["--sites", "enc,self"], {"sites": ["enc", "self"]}),
        (["--layers", "0,2"], {"layers": [0, 2]}),
        (["--layers", "enc=0,1,self=2"], {"layers": {"enc": [0, 1], "self": [2]}}),
    ],
)
def test_flags_by_site(tmp_path, flags, expected):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    command = ["train", "gpt2", str(rows), "-o", "out", "--print-config"]
    first = CliRunner().invoke(app, [*command, *flags])
    values = json.loads(json.dumps(yaml.safe_load(first.stdout)))
    assert expected.items() <= values.items()
    file = tmp_path / "options.yaml"
    file.write_text(first.stdout)
    again = CliRunner().invoke(app, [*command, "--config", str(file)])
    assert again.stdout == first.stdout
    assert PrefixConfig(**{n: v for n, v in values.items() if n in PrefixConfig.names()}) is not None


@pytest.mark.parametrize("given", ["enc=3,4", "3,enc=4", "enc=", "enc=x", "=3"])
def test_malformed_flags_by_site_are_refused(given):
    result = CliRunner().invoke(app, ["train", "gpt2", "rows.jsonl", "-o", "out", f"--prefix-length={given}"])
    assert result.exit_code
    assert "--prefix-length: expected" in result.output + str(result.exception)
