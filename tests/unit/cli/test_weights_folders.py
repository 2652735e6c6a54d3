"""Every command that takes a prefix refuses a folder of trained weights with the commands that take it."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest

from prefixfast import ConfigError, DataError, Prefix, PrefixStore, load, train

ROWS = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(4)]
KINDS = ("full", "adapter", "lora", "peft")  # the last is LoRA without prefixfast.json
EXACT = ("--dtype", "float32")


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """Weights in memory, and a folder with one folder of each kind."""
    root = tmp_path_factory.mktemp("weights")
    with load(folder, dtype="float32") as base:
        found = {kind: train(base, ROWS, method=kind, max_steps=1) for kind in KINDS[:-1]}
    for kind, weights in found.items():
        weights.save_pretrained(root / kind)
    shutil.copytree(root / "lora", root / "peft")
    (root / "peft" / "prefixfast.json").unlink()
    return found, root


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_commands_that_take_a_prefix(cli, made, folder, data, tmp_path, kind):
    weights, store = made[1] / kind, tmp_path / "s"
    for arguments in (
        ("try", folder, "a", "--prefix", weights),
        ("chat", "--model", folder, "--prefix", weights),
        ("prefixes", "add", store, "ann", weights),
        ("convert", weights, tmp_path / "c"),
        ("train", folder, data, "-o", tmp_path / "t", "--init", weights),
        ("train", folder, data, "-o", tmp_path / "t", "--on-top-of", weights),
    ):
        done = cli(*arguments)
        assert done.code == 1, arguments
        assert "--prefix FOLDER" in done.err
        assert done.err.count("prefixfast.json") <= 1
    for flag, shown in (("--store", ("generate", data, "-o", "-")), ("STORE", ("prefixes", "list"))):
        done = cli(*shown, *((flag,) if flag.startswith("--") else ()), weights)
        assert (done.code, "trained weights" in done.err) == (1, True), done.err


def test_folders_of_weights(cli, made, folder, data, tmp_path):
    done = cli("prefixes", "import", tmp_path / "s", made[1])
    assert (done.code, done.out.count("refused"), done.out.count("--prefix FOLDER")) == (3, 4, 4)
    done = cli("convert", made[1], tmp_path / "c", "--recursive")
    assert (done.code, done.out.count("refused")) == (3, 4)
    for arguments in (("prefixes", "list", made[1]), ("generate", data, "-o", "-", "--prefixes", made[1])):
        done = cli(*arguments)
        assert (done.code, "a folder of trained weights" in done.err) == (1, True), done.err
    named = tmp_path / "named.jsonl"
    named.write_text(json.dumps(ROWS[0] | {"prefix": "full"}) + "\n")
    shutil.copytree(made[1] / "full", tmp_path / "mixed" / "full")
    Prefix.from_text(str(folder), "ab").save_pretrained(tmp_path / "mixed" / "ann")
    done = cli("generate", named, "-o", "-", "--prefixes", tmp_path / "mixed", "--model", folder, *EXACT)
    assert (done.code, "weights of method 'full' change the base" in done.err) == (1, True)


def test_chat_stays_with_the_prefix_that_it_has(cli, made, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/prefix {made[1] / 'lora'}\n"))
    done = cli("chat", "--model", folder, *EXACT)
    assert "weights of method 'lora'" in done.err


def test_a_store_keeps_prefixes_only(made, tmp_path):
    store = PrefixStore(tmp_path / "s")
    with pytest.raises(ConfigError, match="got TunedWeights; they change the base for all requests"):
        store.put("ann", made[0]["full"])
    with pytest.raises(DataError, match="weights of method 'adapter'"):
        Prefix.from_pretrained(made[1] / "adapter")


def test_the_search_for_a_digest_reads_weights(made, tmp_path):
    store = PrefixStore(tmp_path / "s")
    own = made[0]["lora"].digest
    assert store.verify(absent="0" * 64, also=[made[1]]).damaged == ()
    found = store.verify(absent=own, also=[made[1]])
    assert str(made[1] / "peft") not in found.holding  # whose options are names of layers
    assert str(made[1] / "lora") in found.holding
