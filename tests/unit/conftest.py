"""Fixtures: the command line, a tokenizer for the tiny models, a saved tiny GPT-2, and random prefixes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from prefixfast import Model, Prefix, load, unload
from prefixfast.cli import main

SPECIAL = ("<pad>", "<s>", "</s>")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


class Result(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    unload()

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["prefixfast", *map(str, arguments)])
        message, code = "", 0
        try:
            main()
        except SystemExit as e:
            message, code = (e.code, 1) if isinstance(e.code, str) else ("", e.code or 0)
        logging.disable(logging.NOTSET)  # --quiet is for a whole process
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err + message)

    return run


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with one token per byte of printable ASCII, the line break and the pound sign, `tiny.VOCAB` in all."""
    characters = ["Ġ", *(chr(c) for c in range(33, 127)), "Ċ", "Â", "£"]
    vocab = {t: i for i, t in enumerate((*SPECIAL, *characters))}
    assert len(vocab) == tiny.VOCAB
    core = Tokenizer(models.BPE(vocab, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Folder of a saved tiny GPT-2 with its tokenizer."""
    path = tmp_path_factory.mktemp("bases") / "tiny-gpt2"
    tiny.make("gpt2").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def base(folder: Path) -> Iterator[Model]:
    """The saved tiny GPT-2, loaded."""
    with load(folder, dtype="float32") as model:
        yield model


MakePrefix = Callable[..., Prefix]


@pytest.fixture(scope="session")
def make_prefix() -> MakePrefix:
    """Function that makes a random prefix for `tiny` models, by default for GPT-2 with 3 layers and 4 heads of 8."""

    def make(
        seed: int = 0,
        *,
        length: int = 4,
        heads: int = 4,
        dim: int = 8,
        layers: Any = 3,
        dtype: torch.dtype = torch.float32,
        **fields: Any,
    ) -> Prefix:
        g = torch.Generator().manual_seed(seed)
        numbers = range(layers) if isinstance(layers, int) else layers
        kv = {f"self.{i}.{x}": torch.randn(length, heads, dim, generator=g).to(dtype) for i in numbers for x in "kv"}
        return Prefix(kv, **{"pos_start": length, **fields})

    return make
