"""The tensors of a prefix belong to it alone: no later change of anything outside reaches them."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch

from prefixfast import Prefix, PrefixStore, train
from prefixfast.errors import DataError
from prefixfast.prefix.tensors import PrefixTensors, shared_tensors


def given(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {f"self.{i}.{x}": torch.randn(3, 2, 4, generator=g) for i in range(2) for x in "kv"}


def fresh_digest(prefix: Prefix) -> str:
    """Digest of the tensors as they are now."""
    return Prefix({n: t.clone() for n, t in prefix.kv.items()}, prefix.pos_start).digest


def write_to(t: torch.Tensor) -> None:
    """Change a tensor in the ways that leave a trace and in those that leave none."""
    t.detach().add_(1)
    t.data.mul_(2)
    t.detach().numpy()[0] = 7


def of_numpy() -> tuple[Prefix, list[torch.Tensor]]:
    arrays = {n: t.numpy().copy() for n, t in given().items()}
    views = {n: torch.from_numpy(a) for n, a in arrays.items()}
    return Prefix(views, 3), list(views.values())


def of_tensors() -> tuple[Prefix, list[torch.Tensor]]:
    kv = given()
    return Prefix(kv, 3), list(kv.values())


def of_parameters() -> tuple[Prefix, list[torch.Tensor]]:
    kv = {n: torch.nn.Parameter(t) for n, t in given().items()}
    return Prefix(kv, 3), list(kv.values())


def of_views() -> tuple[Prefix, list[torch.Tensor]]:
    whole = torch.randn(4, 5, 2, 4)
    return Prefix({f"self.{i // 2}.{'kv'[i % 2]}": whole[i, 1:4] for i in range(4)}, 3), [whole]


def of_the_getter() -> tuple[Prefix, list[torch.Tensor]]:
    prefix, _ = of_tensors()
    got = [prefix.kv["self.0.k"], *prefix.kv.values(), *(t for _, t in prefix.kv.items()), prefix.kv.get("self.1.v")]
    return prefix, got


def of_another_prefix() -> tuple[Prefix, list[torch.Tensor]]:
    first, _ = of_tensors()
    return dataclasses.replace(first, window="always"), list(first.kv.values())


def of_concat() -> tuple[Prefix, list[torch.Tensor]]:
    a, b = Prefix(kv := given(1), 3), Prefix(given(2), 3)
    return a.concat(b), [*kv.values(), *a.kv.values(), *b.kv.values()]


@pytest.mark.parametrize(
    "make", [of_tensors, of_numpy, of_parameters, of_views, of_the_getter, of_another_prefix, of_concat]
)
@pytest.mark.parametrize("digest_first", [True, False], ids=["digest first", "change first"])
def test_a_later_change_does_not_reach_the_prefix(tmp_path, make, digest_first):
    untouched = make()[0] if make is not of_views else None
    prefix, others = make()
    before = prefix.digest if digest_first else fresh_digest(dataclasses.replace(prefix))
    for t in others:
        write_to(t)
    if make is not of_another_prefix:  # whose digest also depends on its window
        assert prefix.digest == before == fresh_digest(prefix)
    assert untouched is None or untouched.digest == prefix.digest
    store = PrefixStore(tmp_path)
    store.put("a", prefix)
    assert store["a"].digest == prefix.digest
    assert store.verify().ok
    assert not any(t.requires_grad for t in prefix.kv.values())


def test_prefixes_that_share_tensors_do_not_copy_them():
    first = Prefix(given(), 3)
    second = dataclasses.replace(first, decoding={"num_beams": 2})
    ours, theirs = shared_tensors(first.kv), shared_tensors(second.kv)
    assert all(ours[n].data_ptr() == theirs[n].data_ptr() for n in ours)
    assert isinstance(second.kv, PrefixTensors)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copied_prefix_is_equal(again):
    prefix = Prefix(given(), 3, training={"steps": 2})
    assert again(prefix).digest == prefix.digest
    assert again(prefix).training == {"steps": 2}


@pytest.mark.parametrize("field", ["base", "task", "decoding", "training"])
def test_a_later_change_of_a_mapping_does_not_reach_the_prefix(field):
    value = {"name": "x", "inner": {"list": [1]}}
    prefix = Prefix(given(), 3, **{field: value})
    value["inner"]["list"].append(2)
    value["more"] = 1
    assert getattr(prefix, field) == {"name": "x", "inner": {"list": [1]}}


@pytest.mark.parametrize(
    "wrong",
    [
        np.ones((3, 2, 4), np.float32),
        [[[1.0]]],
        None,
        torch.ones(3, 2, 4).to_sparse(),
    ],
    ids=["numpy", "list", "None", "sparse"],
)
def test_a_value_that_is_no_dense_tensor_is_refused(wrong):
    with pytest.raises(DataError, match=r"self\.0\.k: expected a dense torch\.Tensor"):
        Prefix({"self.0.k": wrong, "self.0.v": wrong}, 3)
    with pytest.raises(DataError, match="tensor name"):
        Prefix({0: torch.ones(3, 2, 4)}, 3)


def test_the_prefixes_of_a_run_share_no_memory_with_it_or_with_each_other(base):
    rows = [{"prompt": "2+2=", "completion": "4"}]
    saved: dict[str, str] = {}

    class Note:
        def on_prefix_end(self, name, prefix, metrics):
            saved[name] = prefix.digest
            for t in prefix.kv.values():
                t.zero_()

    run = train(
        base,
        {"a": rows, "b": rows},
        overrides={"a": {"max_steps": 1}},
        max_steps=3,
        prefix_length=2,
        callbacks=[Note()],
        progress=False,
    )
    assert {n: fresh_digest(p) for n, p in run.items()} == saved
    pointers = [t.data_ptr() for p in run.values() for t in shared_tensors(p.kv).values()]
    assert len(set(pointers)) == len(pointers)
    storages = {t.untyped_storage().nbytes() for p in run.values() for t in shared_tensors(p.kv).values()}
    assert storages == {2 * 4 * 8 * 4}, "a view would keep the tensors of the whole run"


def test_a_frozen_prefix_is_unchanged_by_the_training_on_top_of_it(base):
    rows = [{"prompt": "2+2=", "completion": "4"}]
    below = Prefix.from_text(base, "Be brief.")
    digest = below.digest
    new = train(base, rows, on_top_of=below, init=below, prefix_length=below.length, max_steps=2, progress=False)
    assert fresh_digest(below) == digest
    assert new.training["on_top_of"] == digest


@pytest.mark.parametrize("name", ["base", "task", "decoding"])
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), object(), {1}, b"x"], ids=["nan", "infinity", "object", "set", "bytes"]
)
def test_a_mapping_that_the_files_cannot_hold_is_refused_when_the_prefix_is_made(name, value):
    with pytest.raises(DataError):
        Prefix(given(), 3, **{name: {"temperature": value}})


def test_tensors_without_numbers_are_refused():
    with pytest.raises(DataError):
        Prefix({n: t.to("meta") for n, t in given().items()}, 3)
