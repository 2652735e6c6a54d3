"""Where the rows of a prefix lie in the KV arena: every site in its own rows, and every encoder layer in its fold."""

from __future__ import annotations

import itertools

import pytest
import torch

from prefixfast import Prefix
from prefixfast.attention.plan import Arena
from prefixfast.config.sites import SITES
from prefixfast.engine.arena_sites import PARTS, ROW_UNIT, ArenaSites, prefix_run
from prefixfast.model.dry_run import LayerShape

DECODER, ROWS = LayerShape(4, 2, 6, 6), 400
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(SITES, n)]


def sites(encoder_depth: int, decoder_depth: int, encoder: LayerShape = DECODER):
    return {"enc": (encoder,) * encoder_depth, "self": (DECODER,) * decoder_depth, "cross": (DECODER,) * decoder_depth}


def arena(shapes) -> Arena:
    """An arena of NaN, so that a row that nothing was copied to shows."""
    layers = [(torch.full((ROWS, 2, 6), torch.nan), torch.full((ROWS, 2, 6), torch.nan)) for _ in shapes["self"]]
    encoder = [
        tuple(t.view(ROWS, s.num_kv_heads, s.attention_dim) for t in layers[i % len(layers)])
        for i, s in enumerate(shapes.get("enc", ()))
    ]
    return Arena(layers, torch.zeros(1, 1, dtype=torch.int32), encoder_layers=encoder)


def make_prefix(shapes, lengths, layers=None) -> Prefix:
    g = torch.Generator().manual_seed(sum(lengths.values()))
    return Prefix(
        {
            f"{site}.{i}.{x}": torch.randn(n, shapes[site][i].num_kv_heads, shapes[site][i].head_dim, generator=g)
            for site, n in lengths.items()
            for i in range(len(shapes[site]))
            if layers is None or i in layers[site]
            for x in "kv"
        },
        pos_start=0,
    )


def load(places: ArenaSites, prefix: Prefix, row: int) -> None:
    for target, x in places.targets(places.run(prefix), row, places.kv(prefix)):
        assert target.shape == x.shape
        assert target.isnan().all(), "two layers share a row"
        target.copy_(x)


@pytest.mark.parametrize("depths", [(3, 3), (2, 3), (3, 2), (12, 3), (5, 4)], ids=str)
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_every_layer_of_every_site_lies_in_rows_of_its_own(subset, depths):
    shapes = sites(*depths, encoder=LayerShape(3, 3, 4, 4))  # other heads of the same width
    memory = arena(shapes)
    places = ArenaSites(memory, shapes)
    prefixes = [
        make_prefix(shapes, {s: n for s, n in zip(SITES, lengths, strict=True) if s in subset})
        for lengths in ((3, 5, 2), (17, 16, 1))
    ]
    folds, row = -(-depths[0] // depths[1]), 32
    for prefix in prefixes:
        run = places.run(prefix)
        load(places, prefix, row)
        found = {}
        for site in subset:
            offset, rows, layers = run.sites[site]
            assert offset % ROW_UNIT == 0
            assert rows == prefix.length_at(site)
            assert layers is None
            for i in range(len(shapes[site])):
                start = row + offset + (i // depths[1] if site == "enc" else 0) * rows
                k, v = (memory.encoder_layers if site == "enc" else memory.layers)[i]
                found |= {f"{site}.{i}.k": k[start : start + rows], f"{site}.{i}.v": v[start : start + rows]}
        assert found.keys() == prefix.kv.keys()
        assert all(torch.equal(found[name], t) for name, t in prefix.kv.items())
        ends = [s.offset + s.rows * (folds if site == "enc" else 1) for site, s in run.sites.items() if s.rows]
        assert run.rows == max(ends)
        row += -(-run.rows // ROW_UNIT) * ROW_UNIT
    for k, _ in memory.layers:  # the rows between the parts and behind the prefixes
        used = sum(p.length_at(s) for p in prefixes for s in ("self", "cross"))
        assert (~k[:, 0, 0].isnan()).sum() >= used
        assert k[:32].isnan().all()
        assert k[row:].isnan().all()


def test_layers_that_a_prefix_leaves_out_have_no_rows_there():
    shapes = sites(4, 2)
    memory = arena(shapes)
    places = ArenaSites(memory, shapes)
    prefix = make_prefix(shapes, {"enc": 3, "cross": 2}, layers={"enc": (0, 3), "cross": (1,)})
    run = places.run(prefix)
    assert run.sites["enc"].layers == [True, False, False, True]
    assert run.sites["cross"].layers == [False, True]
    assert run.sites["self"].rows == 0
    load(places, prefix, 0)
    first, last = (k[:, 0, 0] for k, _ in memory.layers)
    offset = run.sites["enc"].offset
    assert first.isfinite().nonzero()[:, 0].tolist() == [offset, offset + 1, offset + 2]  # layer 0, fold 0
    cross = [run.sites["cross"].offset + i for i in range(2)]
    assert last.isfinite().nonzero()[:, 0].tolist() == cross + [offset + 3 + i for i in range(3)]  # layer 3, fold 1
    places.clear(0, run.rows)
    assert all(t[: run.rows].eq(0).all() and t[run.rows :].isnan().all() for kv in memory.layers for t in kv)


def test_a_decoder_only_base_has_the_rows_of_the_prefix_alone():
    shapes = {"self": (DECODER, DECODER)}
    prefix = make_prefix(shapes, {"self": 5}, layers={"self": (1,)})
    run = prefix_run(prefix, shapes)
    assert (run.rows, dict(run.sites)) == (5, {"self": (0, 5, [False, True])})
    assert PARTS[0] == "self"
    memory = arena(shapes)
    load(ArenaSites(memory, shapes), prefix, 7)
    assert memory.layers[0][0].isnan().all()
    assert torch.equal(memory.layers[1][1][7:12], prefix.kv["self.1.v"])
