"""BART checkpoints of Li & Liang's code: the formula of the prefix, and files that are damaged or hostile."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from prefixfast import DataError, Prefix
from prefixfast.io import pickle_worker
from prefixfast.io.pickle_worker import read_pickle
from prefixfast.prefix import authors_format
from prefixfast.prefix.header import read_header

P, LAYERS, HEADS, DIM, HIDDEN = 4, 3, 2, 8, 5  # DIM is the width of the base, not of a head
WIDTH = 2 * LAYERS * DIM
CONFIG = {
    "_name_or_path": "facebook/bart-large",
    "model_type": "bart",
    "is_encoder_decoder": True,
    "d_model": DIM,
    "decoder_layers": LAYERS,
    "encoder_layers": LAYERS,
    "decoder_attention_heads": HEADS,
    "preseqlen": P,
}
NAMES = {"self": ("wte", "control_trans"), "enc": ("wte_enc", "control_trans_enc"), "cross": ("wte2", "control_trans2")}


class Authors(nn.Module):
    """The modules of the authors' class, with their names and their formula."""

    def __init__(self, sites: tuple[str, ...], deep: bool = False) -> None:
        super().__init__()
        self.sites = sites
        for site in sites:
            between = [nn.Linear(HIDDEN, HIDDEN), nn.Tanh()] if deep else []
            wte, mlp = NAMES[site]
            setattr(self, wte, nn.Embedding(P, DIM))
            layers = nn.Linear(DIM, HIDDEN), nn.Tanh(), *between, nn.Linear(HIDDEN, WIDTH)
            setattr(self, mlp, nn.Sequential(*layers))

    def get_prompt(self, site: str) -> tuple[torch.Tensor, ...]:
        wte, mlp = (getattr(self, name) for name in NAMES[site])
        past = mlp(wte(torch.arange(P)[None])).view(1, P, LAYERS * 2, HEADS, DIM // HEADS)
        return past.permute([2, 0, 3, 1, 4]).split(2)  # by layer: [2, batch, heads, P, head dim]


def write(folder: Path, state: object, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}), encoding="utf8")
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Read pickles in this process, which saves the start of another one."""
    monkeypatch.setattr(authors_format, "read_pickle", lambda path: torch.load(path, weights_only=True))


@pytest.mark.parametrize(
    ("sites", "deep"), [(("enc", "self", "cross"), False), (("self", "cross"), True)], ids=["three", "two, deep"]
)
def test_a_checkpoint_is_the_prefix_of_its_formula(tmp_path, in_process, sites, deep):
    torch.manual_seed(1)
    model = Authors(sites, deep)
    prefix = Prefix.from_pretrained(write(tmp_path / "c", model.state_dict()))
    assert (prefix.sites, prefix.length, prefix.pos_start) == (sites, P, 0)
    with torch.no_grad():
        for site in sites:
            for i, past in enumerate(model.get_prompt(site)):
                for j, x in enumerate("kv"):
                    assert torch.allclose(prefix.kv[f"{site}.{i}.{x}"], past[j, 0].transpose(0, 1), atol=1e-6)
    assert prefix.training == {
        "imported_from": "li-liang",
        "num_trained": sum(p.numel() for p in model.parameters()),
    }
    assert prefix.base == read_header(tmp_path / "c").base == {"name": "facebook/bart-large"}


def test_checkpoints_are_converted(tmp_path, cli):
    torch.manual_seed(1)
    model = Authors(("enc", "self", "cross"))
    write(tmp_path / "c", model.state_dict())
    assert cli("convert", tmp_path, tmp_path.parent / "converted", "--recursive", "--verify").code == 0
    rows = Prefix.from_pretrained(tmp_path.parent / "converted" / "c").kv["cross.2.v"]
    assert torch.allclose(rows, model.get_prompt("cross")[2][1, 0].transpose(0, 1), atol=1e-6)


def without(state: dict, *names: str) -> dict:
    return {n: t for n, t in state.items() if n not in names}


STATE = Authors(("enc", "self", "cross")).state_dict()
WRONG = {
    "flat": ({**without(STATE, "control_trans.0.weight"), "control_trans": torch.zeros(9)}, {}, "flat tensor"),
    "gpt2": (STATE, {"model_type": "gpt2", "is_encoder_decoder": False}, "those of GPT-2 are not read"),
    "other tensors": ({**STATE, "model.shared.weight": torch.zeros(2)}, {}, "got 'model.shared.weight'"),
    "no tensors": ({}, {}, "expected the tensors of"),
    "no bias": (without(STATE, "control_trans2.0.bias"), {}, r"control_trans2\.0\.bias: expected \[5\], got None"),
    "no embedding": (without(STATE, "wte.weight"), {}, r"expected wte\.weight"),
    "a gap": (without(STATE, "control_trans.0.weight", "control_trans.0.bias"), {}, r"expected wte\.weight"),
    "rows": (STATE, {"preseqlen": 5}, r"expected 5 rows \(preseqlen\)"),
    "layers": (STATE, {"decoder_layers": 2, "encoder_layers": 2}, "expected rows of 32 numbers"),
    "an encoder of its own": (STATE, {"encoder_layers": 6}, "as many encoder layers as decoder layers"),
    "heads": (STATE, {"decoder_attention_heads": 3}, "d_model: expected a multiple"),
    "complex": ({**STATE, "wte.weight": STATE["wte.weight"] * 1j}, {}, r"wte\.weight: expected floating-point numbers"),
    "sizes": (STATE, {"d_model": "8"}, "expected numbers of at least 1"),
}


@pytest.mark.parametrize(("state", "changes", "message"), WRONG.values(), ids=WRONG)
def test_other_checkpoints_are_refused_with_the_reason(tmp_path, in_process, state, changes, message):
    with pytest.raises(DataError, match=message) as caught:
        Prefix.from_pretrained(write(tmp_path / "c", state, **changes))
    assert caught.value.path is not None
    assert len(str(caught.value)) < 2000


class Hostile:
    """A pickle that would run a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [pytest.param(True), pytest.param(False, marks=pytest.mark.long)])
def test_code_in_a_checkpoint_does_not_run(tmp_path, zipped):
    folder = write(tmp_path / "c", {"wte.weight": Hostile(tmp_path / "ran")})
    if not zipped:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(DataError, match=r"pytorch_model\.bin: expected tensors.*hostile") as caught:
        Prefix.from_pretrained(folder)
    assert "weights_only" not in str(caught.value), "torch's advice is to run the code"
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_pickles_and_slow_ones_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "x.bin"
    with pytest.raises(DataError, match="cannot be read"):
        read_pickle(file)
    file.write_bytes(b"PK\x03\x04" + bytes(50))
    monkeypatch.setattr(pickle_worker, "SECONDS", 0.01)
    with pytest.raises(DataError, match=r"not read within 0\.01 seconds"):
        read_pickle(file)


@pytest.mark.long
@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x02", bytes(range(100)), b"PK\x03\x04" + bytes(50), [torch.zeros(2)], {"wte.weight": 1}],
    ids=repr,
)
def test_files_that_hold_no_tensors_are_refused(tmp_path, content):
    file = tmp_path / "x.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(DataError, match=r"x\.bin: expected tensors of torch\.save"):
        read_pickle(file)


def test_a_small_file_of_a_huge_tensor_is_refused(tmp_path):
    with pytest.raises(DataError, match="too large"):
        Prefix.from_pretrained(write(tmp_path / "c", {"wte.weight": torch.zeros(1).expand(10**12)}))


@pytest.mark.long
def test_the_reader_has_less_memory_than_the_tensors_need(tmp_path, monkeypatch):
    file = tmp_path / "x.bin"
    torch.save({"x": torch.zeros(10**4).expand(2000, 10**4)}, file)
    assert read_pickle(file)["x"].shape == (2000, 10**4)
    monkeypatch.setattr(pickle_worker, "MEMORY", 2**26)
    with pytest.raises(DataError, match="too large"):
        read_pickle(file)
