"""Sites, lengths and layers of prefixes and of their entries in a store, and their tensors by site."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from prefixfast import DataError, Prefix, PrefixStore
from prefixfast.config.sites import SITES, BySite
from prefixfast.prefix.kv import site_prefixes
from prefixfast.prefix.site_rows import SiteRows
from sites import FakeModel, make_prefix


def test_a_prefix_tells_its_sites_lengths_and_layers(tmp_path):
    prefix = make_prefix({"self": 5, "cross": 2, "enc": 3})
    entry = PrefixStore(tmp_path).put("mill", prefix)
    for found in (prefix, entry, copy.copy(prefix), pickle.loads(pickle.dumps(entry))):
        assert found.sites == ("enc", "self", "cross")
        assert found.length == {"enc": 3, "self": 5, "cross": 2}
        assert [found.length_at(s) for s in SITES] == [3, 5, 2]
        assert [found.layers_at(s) for s in SITES] == [(0, 1, 2), (0, 1), (0, 1)]
        assert (found.num_rows, found.layers) == (10, (0, 1))
    assert "length={'enc': 3, 'self': 5, 'cross': 2}, layers={'enc': 3, 'self': 2, 'cross': 2}" in repr(prefix)
    encoder = make_prefix({"enc": 4})
    assert (encoder.sites, encoder.length, encoder.num_rows, encoder.layers) == (("enc",), 4, 4, ())
    assert (encoder.length_at("self"), encoder.layers_at("cross")) == (0, ())
    assert make_prefix({"enc": 4, "cross": 4}).length == 4
    some = Prefix({n: t for n, t in prefix.kv.items() if n.startswith("cross.1")}, pos_start=0)
    assert (some.layers_at("cross"), some.length) == ((1,), 2)


def test_shapes_are_read_once_for_all_questions():
    """A load into the KV arena asks for the layers of each site, and reading all shapes takes microseconds."""

    class Counted(SiteRows):
        reads = 0

        @property
        def shapes(self) -> dict[str, tuple[int, int, int]]:
            self.reads += 1
            return {f"{site}.{i}.{x}": (4, 1, 8) for site in ("self", "enc") for i in range(2) for x in "kv"}

    counted = Counted()
    answers = [(counted.layers_at(s), counted.length_at(s), counted.layers, counted.num_rows) for s in SITES * 5]
    assert answers[:3] == answers[3:6] == [((0, 1), 4, (0, 1), 8), ((0, 1), 4, (0, 1), 8), ((), 0, (0, 1), 8)]
    assert counted.reads == 3, "lengths, and the layers of two sites"


def test_frozen_rows_count_for_each_site():
    lengths = {"enc": 3, "self": 5}
    assert make_prefix(lengths, training={"num_frozen_tokens": 3}).length == BySite(lengths)
    with pytest.raises(DataError, match="expected a number from 0 to the 3 rows"):
        make_prefix(lengths, training={"num_frozen_tokens": 4})


def test_tables_of_a_batch_by_site():
    first, second = make_prefix({"self": 5, "enc": 3}), make_prefix({"cross": 2, "enc": 1}, seed=1)
    second = Prefix({n: t for n, t in second.kv.items() if n.split(".")[:2] != ["enc", "1"]}, pos_start=0)
    found = site_prefixes([first, second], FakeModel())
    assert list(found) == list(SITES)
    rows, kv = found["self"]
    assert rows.table[:, :, :3].tolist() == [[[0, 5, 5], [5, 0, 0]]]
    assert all(torch.equal(kv[i][j], first.kv[f"self.{i}.{x}"]) for i in range(2) for j, x in enumerate("kv"))
    rows, kv = found["cross"]
    assert rows.table[:, :, :2].tolist() == [[[0, 0], [0, 2]]]
    assert all(torch.equal(kv[i][j], second.kv[f"cross.{i}.{x}"]) for i in range(2) for j, x in enumerate("kv"))
    rows, kv = found["enc"]
    by_layer = [rows.table[view, :, :2].tolist() for view in rows.view_of]
    assert by_layer == [[[0, 3], [3, 1]], [[0, 3], [3, 0]], [[0, 3], [3, 1]]]
    for i, parts in enumerate(([first, second], [first], [first, second])):
        for j, x in enumerate("kv"):
            assert torch.equal(kv[i][j], torch.cat([p.kv[f"enc.{i}.{x}"] for p in parts]))
    assert all(rows.table.shape[1] == 0 and kv is None for rows, kv in site_prefixes([], FakeModel()).values())
