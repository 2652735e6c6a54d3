"""`Prefix` on disk: bit-exact round trips, folders that PEFT reads and writes, and damaged folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from prefixfast import DataError, Prefix
from prefixfast.prefix import peft_format as layout

META, OWN, CONFIG, WEIGHTS = "prefixfast.json", "prefix.safetensors", "adapter_config.json", "adapter_model.safetensors"
NOT_PEFT = {
    "zero": ({"pos_start": 0}, "text starts at another position than the prefix's length"),
    "always": ({"window": "always"}, "sliding windows do not slide over it"),
    "no first layer": ({"layers": (1, 2)}, "some layers have no prefix"),
    "no middle layer": ({"layers": (0, 2)}, "some layers have no prefix"),
}


def same(a: Prefix, b: Prefix) -> bool:
    """Whether two prefixes are equal in all attributes, to the bit."""
    fields = ("pos_start", "window", "base", "task", "decoding", "training")
    tensors = a.kv.keys() == b.kv.keys() and all(
        t.dtype == b.kv[n].dtype and torch.equal(t, b.kv[n]) for n, t in a.kv.items()
    )
    return tensors and all(getattr(a, f) == getattr(b, f) for f in fields) and a.digest == b.digest


def reread(prefix: Prefix, folder: Path) -> Prefix:
    prefix.save_pretrained(folder)
    return Prefix.from_pretrained(folder)


DETAILS: dict[str, Any] = {
    "base": {"name": "x/y", "config": {"vocab_size": 101}, "tokenizer": None, "weights": "00"},
    "task": {"name": "prompt", "prompt": "£ {src}é\n"},
    "decoding": {"num_beams": 5},
    "training": {"num_trained": 7, "metrics": {"loss": 0.1}},
}


@pytest.mark.parametrize("details", [{}, DETAILS], ids=["bare", "described"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [{}, {"pos_start": 0}], ids=["peft", "own"])
def test_round_trip_is_exact(tmp_path, make_prefix, kind, dtype, details):
    prefix = make_prefix(dtype=dtype, **kind, **details)
    assert same(reread(prefix, tmp_path / "p"), prefix)


def test_a_folder_that_peft_can_hold_is_an_adapter(tmp_path, make_prefix):
    make_prefix().save_pretrained(tmp_path / "p")
    assert {p.name for p in (tmp_path / "p").iterdir()} == {META, CONFIG, WEIGHTS}
    assert json.loads((tmp_path / "p" / META).read_text(encoding="utf8"))["not_peft_because"] is None


@pytest.mark.parametrize(("kind", "reason"), NOT_PEFT.values(), ids=NOT_PEFT)
def test_a_folder_that_peft_cannot_hold_gives_the_reason(tmp_path, make_prefix, kind, reason):
    prefix = make_prefix(**kind)
    assert same(reread(prefix, tmp_path / "p"), prefix)
    assert {p.name for p in (tmp_path / "p").iterdir()} == {META, OWN}
    assert json.loads((tmp_path / "p" / META).read_text(encoding="utf8"))["not_peft_because"] == reason


def test_layers_of_different_shapes_round_trip(tmp_path, make_prefix):
    a, b = make_prefix(layers=(0,)), make_prefix(layers=(1,), length=2, heads=1, dim=16)
    prefix = Prefix({**a.kv, **b.kv}, pos_start=4)
    assert same(reread(prefix, tmp_path / "p"), prefix)


def test_layers_of_different_dtypes_round_trip(tmp_path, make_prefix):
    a, b = make_prefix(layers=(0,)), make_prefix(layers=(1,), dtype=torch.bfloat16)
    prefix = Prefix({**a.kv, **b.kv}, pos_start=4)
    assert same(reread(prefix, tmp_path / "p"), prefix)


@pytest.mark.parametrize("kind", [{}, {"pos_start": 0}], ids=["peft", "own"])
def test_views_of_one_tensor_round_trip(tmp_path, kind):
    whole = torch.randn(4, 6, 2, 8, generator=torch.Generator().manual_seed(0))
    kv = {f"self.{i // 2}.{'kv'[i % 2]}": t for i, t in enumerate(whole.unbind(1))}
    prefix = Prefix(kv, **{"pos_start": 4, **kind})
    assert same(reread(prefix, tmp_path / "p"), prefix)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_peft_reads_our_folder(tmp_path, family):
    table = tiny.peft_table(tiny.make(family), 5, seed=1)
    Prefix(layout.from_table(table, *tiny.shapes(tiny.make(family))), pos_start=5).save_pretrained(tmp_path / "p")
    theirs = PeftModel.from_pretrained(tiny.make(family), tmp_path / "p").eval()
    assert torch.equal(theirs.prompt_encoder["default"].embedding.weight, table)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(theirs(input_ids=ids).logits, tiny.with_prefix(tiny.make(family), table)(input_ids=ids).logits)
    assert not torch.equal(theirs(input_ids=ids).logits, tiny.make(family)(input_ids=ids).logits)


def peft_adapter(folder: Path, *, projection: bool) -> None:
    """A PEFT prefix after two steps of training."""
    torch.manual_seed(4)
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=12
    )
    model = get_peft_model(tiny.make("llama"), config)
    optimizer, ids = (
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5),
        torch.arange(3, 20)[None],
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "projection"])
def test_a_folder_of_peft_survives_our_round_trip(tmp_path, projection):
    peft_adapter(tmp_path / "theirs", projection=projection)
    Prefix.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "projection"])
def test_attributes_of_an_imported_adapter(tmp_path, projection):
    peft_adapter(tmp_path, projection=projection)
    prefix = Prefix.from_pretrained(tmp_path)
    assert (prefix.pos_start, prefix.window, prefix.base, prefix.training) == (
        5,
        "slide",
        None,
        {"imported_from": "peft"},
    )


def test_equal_content_has_an_equal_digest(make_prefix):
    assert make_prefix().digest == make_prefix().digest


def changed(prefix: Prefix, name: str) -> Prefix:
    """Copy of a prefix with one difference."""
    kv, first = dict(prefix.kv), prefix.kv["self.0.k"]
    if name == "one bit":
        bits = first.clone().view(torch.int32)
        bits[-1, -1, -1] ^= 1
        kv["self.0.k"] = bits.view(torch.float32)
    if name == "swapped":
        kv["self.0.k"], kv["self.0.v"] = kv["self.0.v"], first
    if name == "shape":
        kv |= {f"self.0.{x}": kv[f"self.0.{x}"].reshape(4, 8, 4) for x in "kv"}
    if name == "a layer less":
        del kv["self.2.k"], kv["self.2.v"]
    return Prefix(kv, pos_start=0 if name == "pos_start" else 4, window="always" if name == "window" else "slide")


@pytest.mark.parametrize("what", ["one bit", "swapped", "shape", "a layer less", "pos_start", "window"])
def test_any_change_changes_the_digest(make_prefix, what):
    assert changed(make_prefix(), what).digest != make_prefix().digest


def test_what_only_builds_requests_is_not_in_the_digest(make_prefix):
    """Equal digests have the same effect on the base; prompts and default options can differ."""
    prefix = make_prefix()
    other = Prefix(prefix.kv, pos_start=prefix.pos_start, task={"name": "text"}, decoding={"num_beams": 3})
    assert other.digest == prefix.digest
    assert (other.task, other.decoding) != (prefix.task, prefix.decoding)


def test_the_same_bytes_in_another_dtype_have_another_digest(make_prefix):
    half = make_prefix(dtype=torch.float16)
    assert Prefix({n: t.view(torch.bfloat16) for n, t in half.kv.items()}, pos_start=4).digest != half.digest


def test_zero_and_minus_zero_have_different_digests():
    plus, minus = (Prefix({f"self.0.{x}": torch.full((2, 1, 4), z) for x in "kv"}, pos_start=2) for z in (0.0, -0.0))
    assert plus.digest != minus.digest


def test_other_files_survive_a_second_save(tmp_path, make_prefix):
    make_prefix(1).save_pretrained(tmp_path / "p")
    (tmp_path / "p" / "notes.txt").write_text("mine", encoding="utf8")
    (tmp_path / "p" / "logs").mkdir()
    (tmp_path / "p" / "logs" / "a.txt").write_text("too", encoding="utf8")
    assert reread(make_prefix(2), tmp_path / "p").digest == make_prefix(2).digest
    assert (tmp_path / "p" / "notes.txt").read_text(encoding="utf8") == "mine"
    assert (tmp_path / "p" / "logs" / "a.txt").read_text(encoding="utf8") == "too"


@pytest.mark.parametrize(
    ("first", "then"), [({}, {"pos_start": 0}), ({"pos_start": 0}, {})], ids=["peft to own", "own to peft"]
)
def test_a_second_save_in_the_other_form_leaves_nothing_of_the_first(tmp_path, make_prefix, first, then):
    make_prefix(1, **first).save_pretrained(tmp_path / "p")
    assert same(reread(make_prefix(2, **then), tmp_path / "p"), make_prefix(2, **then))


BAD_TENSORS = {
    "empty": {},
    "wrong name": {"self.0.q": (4, 4, 8)},
    "unknown site": {"other.0.k": (4, 4, 8), "other.0.v": (4, 4, 8)},
    "layer is no number": {"self.x.k": (4, 4, 8), "self.x.v": (4, 4, 8)},
    "no partner": {"self.0.k": (4, 4, 8)},
    "partner of another shape": {"self.0.k": (4, 4, 8), "self.0.v": (3, 4, 8)},
    "two dimensions": {"self.0.k": (4, 8), "self.0.v": (4, 8)},
    "no rows": {"self.0.k": (0, 4, 8), "self.0.v": (0, 4, 8)},
}


@pytest.mark.parametrize("shapes", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_bad_tensors_are_refused_in_memory(shapes):
    with pytest.raises(DataError):
        Prefix({n: torch.ones(s) for n, s in shapes.items()}, pos_start=4)


@pytest.mark.parametrize("fields", [{"pos_start": -1}, {"window": "never"}], ids=str)
def test_bad_conventions_are_refused_in_memory(make_prefix, fields):
    with pytest.raises(DataError, match="expected pos_start >= 0 and window"):
        make_prefix(**fields)


# ---- damaged folders: the damage, and the file that the error names ----

Damage = Callable[[Path], object]


def json_with(name: str, **changes: Any) -> Damage:
    """Change keys of a JSON file; None deletes one."""

    def damage(p: Path) -> None:
        value = json.loads((p / name).read_text(encoding="utf8")) | changes
        (p / name).write_text(json.dumps({k: v for k, v in value.items() if v != "delete"}), encoding="utf8")

    return damage


def content(name: str, data: bytes) -> Damage:
    return lambda p: (p / name).write_bytes(data)


def cut(name: str, keep: float) -> Damage:
    return lambda p: (p / name).write_bytes((p / name).read_bytes()[: int((p / name).stat().st_size * keep)])


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    return lambda p: save_file(change(load_file(p / name)), p / name)


def table(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors(WEIGHTS, lambda t: {"prompt_embeddings": change(t["prompt_embeddings"]).contiguous()})


def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: torch.cat([torch.full_like(t[:1], value), t[1:]])


def each(change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return tensors(OWN, lambda ts: {n: change(t).contiguous() for n, t in ts.items()})


def without(name: str) -> Damage:
    return lambda p: (p / name).unlink()


def pickle_only(p: Path) -> None:
    torch.save({"prompt_embeddings": torch.ones(4, 192)}, p / "adapter_model.bin")
    (p / WEIGHTS).unlink()


JSON_DAMAGE = {
    "cut": lambda n: cut(n, 0.5),
    "empty": lambda n: content(n, b""),
    "not UTF-8": lambda n: content(n, b'{"a": "\xff"}'),
    "a list": lambda n: content(n, b"[]"),
    "deep": lambda n: content(n, b"[" * 200_000),
}
TENSOR_DAMAGE = {
    "missing": without,
    "cut in the data": lambda n: cut(n, 0.9),
    "cut in the header": lambda n: cut(n, 0.03),
    "empty": lambda n: content(n, b""),
    "garbage": lambda n: content(n, b"\xff" * 64),
    "header is no JSON": lambda n: content(n, (8).to_bytes(8, "little") + b"notjson!"),
}
ADAPTER = {
    "another tensor's name": (tensors(WEIGHTS, lambda t: {"lora_A": t["prompt_embeddings"]}), WEIGHTS),
    "a second tensor": (tensors(WEIGHTS, lambda t: {**t, "lora_A": torch.ones(1)}), WEIGHTS),
    "NaN": (table(poke(float("nan"))), WEIGHTS),
    "infinity": (table(poke(float("inf"))), WEIGHTS),
    "integers": (table(lambda t: t.int()), WEIGHTS),
    "a row less": (table(lambda t: t[1:]), WEIGHTS),
    "a column less": (table(lambda t: t[:, 1:]), WEIGHTS),
    "no columns": (table(lambda t: t[:, :0]), WEIGHTS),
    "three dimensions": (table(lambda t: t.view(4, 2, 96)), WEIGHTS),
    "pickle only": (pickle_only, "adapter_model.bin"),
    "other peft_type": (json_with(CONFIG, peft_type="LORA"), CONFIG),
    "no peft_type": (json_with(CONFIG, peft_type="delete"), CONFIG),
    "task of classes": (json_with(CONFIG, task_type="SEQ_CLS"), CONFIG),
    "two submodules": (json_with(CONFIG, num_transformer_submodules=2), CONFIG),
    "layers: a word": (json_with(CONFIG, num_layers="three"), CONFIG),
    "layers: null": (json_with(CONFIG, num_layers=None), CONFIG),
    "layers: zero": (json_with(CONFIG, num_layers=0), CONFIG),
    "layers: negative": (json_with(CONFIG, num_layers=-3), CONFIG),
    "layers: infinite": (json_with(CONFIG, num_layers=float("inf")), CONFIG),
    "layers: missing": (json_with(CONFIG, num_layers="delete"), CONFIG),
    "missing configuration": (without(CONFIG), CONFIG),
    **{f"configuration {k}": (f(CONFIG), CONFIG) for k, f in JSON_DAMAGE.items()},
    **{f"tensors {k}": (f(WEIGHTS), WEIGHTS) for k, f in TENSOR_DAMAGE.items()},
}
OURS = {
    "wrong name": (tensors(OWN, lambda t: {"self.0.q": t["self.0.k"]}), OWN),
    "no tensors": (tensors(OWN, lambda t: {}), OWN),
    "no partner": (tensors(OWN, lambda t: {n: x for n, x in t.items() if n != "self.0.v"}), OWN),
    "NaN": (each(poke(float("nan"))), OWN),
    "integers": (each(lambda t: t.int()), OWN),
    "two dimensions": (each(lambda t: t.flatten(1)), OWN),
    "no rows": (each(lambda t: t[:0]), OWN),
    "overwritten by another program": (each(lambda t: t + 1), META),
    "unknown key": (json_with(META, extra=1), META),
    "missing key": (json_with(META, window="delete"), META),
    "newer version": (json_with(META, version=3), META),
    "no version": (json_with(META, version="delete"), META),
    "window": (json_with(META, window="sometimes"), META),
    "pos_start negative": (json_with(META, pos_start=-1), META),
    "pos_start true": (json_with(META, pos_start=True), META),
    "digest null": (json_with(META, digest=None), META),
    "decoding a list": (json_with(META, decoding=[]), META),
    "base a word": (json_with(META, base="gpt2"), META),
    "linearizer a word": (json_with(META, linearizer="e2e"), META),
    **{f"description {k}": (f(META), META) for k, f in JSON_DAMAGE.items()},
    **{f"tensors {k}": (f(OWN), OWN) for k, f in TENSOR_DAMAGE.items() if k != "missing"},
}


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        Prefix.from_pretrained(folder)
    return f"{caught.value.path} {caught.value}"


@pytest.mark.parametrize(("damage", "file"), ADAPTER.values(), ids=ADAPTER)
def test_a_damaged_adapter_is_refused_by_file(tmp_path, make_prefix, damage, file):
    make_prefix().save_pretrained(tmp_path / "p")
    (tmp_path / "p" / META).unlink()
    Prefix.from_pretrained(tmp_path / "p")  # valid before the damage
    damage(tmp_path / "p")
    assert file in refusal(tmp_path / "p")


@pytest.mark.parametrize(("damage", "file"), OURS.values(), ids=OURS)
def test_a_damaged_prefix_folder_is_refused_by_file(tmp_path, make_prefix, damage, file):
    make_prefix(pos_start=0).save_pretrained(tmp_path / "p")
    damage(tmp_path / "p")
    assert file in refusal(tmp_path / "p")


def test_tensors_that_another_program_replaced_are_refused(tmp_path, make_prefix):
    """PEFT trains on in the folder, and prefixfast.json still describes the old tensors."""
    make_prefix(1).save_pretrained(tmp_path / "p")
    make_prefix(2).save_pretrained(tmp_path / "other")
    (tmp_path / "p" / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    assert "another program changed the folder" in refusal(tmp_path / "p")


@pytest.mark.parametrize(
    "make",
    [lambda p: None, lambda p: p.write_text("x", encoding="utf8"), lambda p: p.mkdir()],
    ids=["nothing", "a file", "empty folder"],
)
def test_something_that_is_no_prefix_folder_is_refused(tmp_path, make):
    make(tmp_path / "thing")
    assert str(tmp_path / "thing") in refusal(tmp_path / "thing")
