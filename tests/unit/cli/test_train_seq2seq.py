"""``prefixfast train`` with encoder-decoder bases."""

from __future__ import annotations

import json

import pytest

import tiny
from prefixfast import Prefix
from prefixfast.io.yaml import read_yaml
from seq2seq import make_seq2seq

ROWS = [{"document": f"the mill {i} by the river was sold", "summary": f"mill {i} sold"} for i in range(3)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("bases")
    for name in ("bart", "t5"):
        make_seq2seq(name, vocab_size=tiny.VOCAB).save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_flags_of_sites_and_lengths(cli, bases, tmp_path):
    words = ("--sites", "enc,self", "--prefix-length", "enc=3,self=5", "--layers", "enc=0,2,self=1")
    words += ("--max-source-length", 9, "--max-target-length", 4, "--overflow", "truncate", "--dtype", "float32")
    done = cli("train", bases / "bart", bases / "rows.jsonl", "-o", tmp_path / "p", "--max-steps", 1, *words)
    assert done.code == 0, done.err
    assert "3 truncated" in done.out
    prefix = Prefix.from_pretrained(tmp_path / "p")
    assert (prefix.length, prefix.layers_at("enc"), prefix.layers_at("self")) == ({"enc": 3, "self": 5}, (0, 2), (1,))
    assert prefix.decoding["max_source_length"] == 9


def test_the_printed_recipe_is_that_of_the_kind_of_base(cli, bases, folder, tmp_path):
    words = (bases / "rows.jsonl", "-o", tmp_path / "p", "--task", "xsum", "--recipe", "paper", "--print-config")
    names = ("max_length", "max_source_length", "max_target_length", "pos_start")
    shown = {base: cli("train", base, *words) for base in (bases / "bart", bases / "t5", folder)}
    found = [tuple(read_yaml(done.out)[n] for n in names) for done in shown.values()]
    assert found == [(None, 512, 60, "zero"), (None, 512, 60, "after"), (572, None, None, "after")]
    config = tmp_path / "c.yaml"
    config.write_text(shown[bases / "bart"].out)
    small = ("--config", config, "--prefix-length", 2, "--encoder-hidden-size", 4, "--max-steps", 1, "--dry-run")
    done = cli("train", bases / "bart", *words[:-3], *small)
    assert json.loads(done.out)["sites"]["cross"]["rows"] == 2, done.err
