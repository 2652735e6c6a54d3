"""Malicious and broken folders are refused with `DataError`, without reading other files and without hanging."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from prefixfast import BaseMismatchError, DataError, Prefix, RequestError, generate, load
from prefixfast.io import untrusted as files

META, OWN, CONFIG, WEIGHTS = "prefixfast.json", "prefix.safetensors", "adapter_config.json", "adapter_model.safetensors"
Harm = Callable[[Path], object]


def edited(name: str, **changes: Any) -> Harm:
    return lambda p: (p / name).write_text(
        json.dumps(json.loads((p / name).read_text(encoding="utf8")) | changes), encoding="utf8"
    )


def raw(name: str, text: str) -> Harm:
    return lambda p: (p / name).write_text(text, encoding="utf8")


def safetensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def file_of(name: str, content: bytes) -> Harm:
    return lambda p: (p / name).write_bytes(content)


def tensors(name: str, kv: dict[str, torch.Tensor]) -> Harm:
    return lambda p: save_file(kv, p / name)


def table(dtype: str, begin: int, end: int) -> dict[str, Any]:
    return {"prompt_embeddings": {"dtype": dtype, "shape": [4, 192], "data_offsets": [begin, end]}}


def instead(name: str, make: Callable[[Path], object]) -> Harm:
    def harm(p: Path) -> None:
        (p / name).unlink()
        make(p / name)

    return harm


def pipe(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes with names")
    os.mkfifo(path)


def pair(name: str, t: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.k": t, f"{name}.v": t.clone()}


SIZE = 4 * 192 * 4
ADAPTER: dict[str, Harm] = {
    "header of 2^60 bytes": file_of(WEIGHTS, safetensors({}, length=2**60)),
    "header of 2^64 - 1 bytes": file_of(WEIGHTS, struct.pack("<Q", 2**64 - 1)),
    "header longer than the file": file_of(WEIGHTS, safetensors({}, length=4096)),
    "tensor of 2^60 bytes": file_of(WEIGHTS, safetensors(table("F32", 0, 2**60), bytes(SIZE))),
    "tensor behind the end": file_of(WEIGHTS, safetensors(table("F32", SIZE, 2 * SIZE), bytes(SIZE))),
    "tensor before its start": file_of(WEIGHTS, safetensors(table("F32", SIZE, 0), bytes(SIZE))),
    "negative offset": file_of(WEIGHTS, safetensors(table("F32", -SIZE, 0), bytes(SIZE))),
    "shape that does not fit": file_of(WEIGHTS, safetensors(table("F64", 0, SIZE), bytes(SIZE))),
    "shape whose product overflows": file_of(
        WEIGHTS, safetensors({"prompt_embeddings": {"dtype": "F32", "shape": [2**63, 2], "data_offsets": [0, 0]}})
    ),
    "unknown dtype": file_of(WEIGHTS, safetensors(table("F7", 0, SIZE), bytes(SIZE))),
    "bytes after the tensors": file_of(WEIGHTS, safetensors(table("F32", 0, SIZE), bytes(SIZE + 8))),
    "header is a list": file_of(WEIGHTS, safetensors([1, 2])),
    "header is deep": file_of(WEIGHTS, safetensors({}, b"", length=200_000) + b"[" * 200_000),
    "8-bit floats": tensors(WEIGHTS, {"prompt_embeddings": torch.ones(4, 192).to(torch.float8_e4m3fn)}),
    "complex numbers": tensors(WEIGHTS, {"prompt_embeddings": torch.ones(4, 192, dtype=torch.complex64)}),
    "switches": tensors(WEIGHTS, {"prompt_embeddings": torch.ones(4, 192, dtype=torch.bool)}),
    "traversal name beside the table": tensors(
        WEIGHTS, {"prompt_embeddings": torch.ones(4, 192), "../../../../etc/x": torch.ones(1)}
    ),
    "10^18 virtual tokens": edited(CONFIG, num_virtual_tokens=10**18),
    "10^400 layers": edited(CONFIG, num_layers=10**400),
    "2^62 heads": edited(CONFIG, num_attention_heads=2**62),
    "a number of 5,000 digits": raw(CONFIG, '{"peft_type": "CARTRIDGE", "num_layers": ' + "9" * 5000 + "}"),
    "layers as a text": edited(CONFIG, num_layers="3"),
    "layers with a fraction": edited(CONFIG, num_layers=3.5),
    "layers true": edited(CONFIG, num_layers=True),
    "configuration as a list": raw(CONFIG, '["PREFIX_TUNING"]'),
    "configuration as a word": raw(CONFIG, '"PREFIX_TUNING"'),
    "peft_type as a list": edited(CONFIG, peft_type=["PREFIX_TUNING"]),
    "another library's adapter": edited(CONFIG, peft_type="IA3"),
    "base as a list": edited(CONFIG, base_model_name_or_path=["gpt2"]),
    "deep configuration": raw(CONFIG, '{"a":' * 100_000),
    "configuration is a folder": instead(CONFIG, Path.mkdir),
    "tensors are a folder": instead(WEIGHTS, Path.mkdir),
    "configuration is a pipe": instead(CONFIG, pipe),
    "tensors are a pipe": instead(WEIGHTS, pipe),
    "configuration links to itself": instead(CONFIG, lambda p: p.symlink_to(p)),
    "tensors link to nowhere": instead(WEIGHTS, lambda p: p.symlink_to("/nowhere/x")),
}
OURS: dict[str, Harm] = {
    "traversal names": tensors(OWN, pair("self.../../../../etc/passwd", torch.ones(4, 4, 8))),
    "absolute name": tensors(OWN, pair("/etc/passwd", torch.ones(4, 4, 8))),
    "layer of another script": tensors(OWN, pair("self.٣", torch.ones(4, 4, 8))),
    "layer with a zero before": tensors(OWN, pair("self.00", torch.ones(4, 4, 8))),
    "layer with a sign": tensors(OWN, pair("self.-1", torch.ones(4, 4, 8))),
    "layer 10^30": tensors(OWN, pair(f"self.{10**30}", torch.ones(4, 4, 8))),
    "a very long name": tensors(OWN, pair("x" * 100_000, torch.ones(4, 4, 8))),
    "8-bit floats": tensors(OWN, pair("self.0", torch.ones(4, 4, 8).to(torch.float8_e5m2))),
    "other tensors": tensors(OWN, pair("self.0", torch.ones(4, 4, 8))),
    "header of 2^60 bytes": file_of(OWN, safetensors({}, length=2**60)),
    "positions beyond int32": edited(META, pos_start=2**31),
    "positions of 10^400": edited(META, pos_start=10**400),
    "positions with a fraction": edited(META, pos_start=4.0),
    "digest of another prefix": edited(META, digest="0" * 64),
    "base: configuration a number": edited(META, base={"name": "x", "config": 5}),
    "base: weights a list": edited(META, base={"weights": [1]}),
    "base: name an object": edited(META, base={"name": {}}),
    "training: num_trained a text": edited(META, training={"num_trained": "many"}),
    "training: num_trained negative": edited(META, training={"num_trained": -1}),
    "training: more frozen rows than rows": edited(META, training={"num_frozen_tokens": 5}),
    "training a list": edited(META, training=[]),
    "why not a list": edited(META, not_peft_because=[]),
    "version true": edited(META, version=True),
    "a lone surrogate": raw(META, '{"version": "\\ud800"}'),
    "description is a pipe": instead(META, pipe),
    "description is a folder": instead(META, Path.mkdir),
    "neither tensors nor adapter": lambda p: (p / OWN).unlink(),
}


def refused(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        Prefix.from_pretrained(folder)
    assert caught.value.path is not None
    assert len(str(caught.value)) < 2000
    return str(caught.value)


@pytest.mark.parametrize("harm", ADAPTER.values(), ids=ADAPTER)
def test_a_hostile_adapter_is_refused(tmp_path, make_prefix, harm):
    make_prefix().to_peft(tmp_path / "p")
    Prefix.from_pretrained(tmp_path / "p")  # valid before the change
    harm(tmp_path / "p")
    refused(tmp_path / "p")


@pytest.mark.parametrize("harm", OURS.values(), ids=OURS)
def test_a_hostile_prefix_folder_is_refused(tmp_path, make_prefix, harm):
    make_prefix(pos_start=0).save_pretrained(tmp_path / "p")
    Prefix.from_pretrained(tmp_path / "p")
    harm(tmp_path / "p")
    refused(tmp_path / "p")


BAD_NAMES = (
    "self.../../../../etc/passwd",
    "/etc/passwd",
    "self.٣",
    "self.00",
    "self.-1",
    "self.+1",
    "self. 1",
    "self.1_0",
    "self.1234567",
    "..",
    "",
)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_hostile_tensor_names_are_refused(name):
    """The check of names does not rely on the digest, which an attacker can compute."""
    with pytest.raises(DataError, match="tensor name: expected"):
        Prefix(pair(name, torch.ones(4, 4, 8)), 4)


@pytest.mark.parametrize("position", [2**31, 10**400, -1, 4.0, True, "4", None])
def test_hostile_positions_are_refused(position):
    with pytest.raises(DataError, match="expected pos_start >= 0"):
        Prefix(pair("self.0", torch.ones(4, 4, 8)), position)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.complex64, torch.int32, torch.bool])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(DataError, match=r"expected a float \[P, H, D\]"):
        Prefix(pair("self.0", torch.ones(4, 4, 8).to(dtype)), 4)


def test_a_huge_configuration_is_not_read(tmp_path, make_prefix, monkeypatch):
    make_prefix().to_peft(tmp_path / "p")
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 100)
    assert "expected at most 100 bytes" in refused(tmp_path / "p")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path, make_prefix):
    make_prefix().to_peft(tmp_path / "p")
    (tmp_path / "p" / CONFIG).chmod(0)
    assert "cannot be read" in refused(tmp_path / "p")


def test_the_error_names_the_files_that_were_looked_for(tmp_path):
    for name in "abcdefghijkl":
        (tmp_path / name).touch()
    message = refused(tmp_path)
    assert all(name in message for name in (META, CONFIG, WEIGHTS, "PREFIX_TUNING", "CARTRIDGE"))
    assert "found a, b, c, d, e, f, g, h, i, j and 2 more" in message


def test_a_tensor_file_is_no_folder(tmp_path, make_prefix):
    make_prefix().to_peft(tmp_path / "p")
    assert "this is a file, give the folder that holds it" in refused(tmp_path / "p" / WEIGHTS)


def test_a_pickle_is_never_opened(tmp_path, make_prefix):
    class Harmful:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "harmed",)

    make_prefix().to_peft(tmp_path / "p")
    (tmp_path / "p" / WEIGHTS).unlink()
    torch.save({"prompt_embeddings": Harmful()}, tmp_path / "p" / "adapter_model.bin")
    assert "is a pickle" in refused(tmp_path / "p")
    assert not (tmp_path / "harmed").exists()


# ---- valid folders, wrong use ----


def test_a_prefix_of_another_base_is_refused_wherever_it_is_used(base, make_prefix, tmp_path):
    with load(tiny.make("gpt2", seed=1)) as second:
        make_prefix(base=second.fingerprint).save_pretrained(tmp_path / "weights")
    make_prefix(heads=2).save_pretrained(tmp_path / "heads")
    make_prefix(base={**base.fingerprint, "config": {**base.fingerprint["config"], "vocab_size": 99}}).save_pretrained(
        tmp_path / "config"
    )
    for name, reason in {
        "weights": "weights differ",
        "heads": r"expected.*\(4, 8\)",
        "config": "vocab_size is 99 there and 101 here",
    }.items():
        prefix = Prefix.from_pretrained(tmp_path / name)
        uses = (
            lambda p: generate(["x"], p, model=base, max_new_tokens=1),
            lambda p: Prefix.from_text(base, "x", after=p),
            lambda p: p.inspect(base, ["x"], words=0),
        )
        for use in uses:
            with pytest.raises(BaseMismatchError, match=reason):
                use(prefix)


def test_wrong_decoding_defaults_are_refused(base, make_prefix):
    with pytest.raises(RequestError, match="num_beams"):
        generate(["x"], make_prefix(decoding={"num_beams": "many"}), model=base, max_new_tokens=1)
