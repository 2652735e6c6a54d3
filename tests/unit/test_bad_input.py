"""Wrong input to the public API: an error of the documented class with a useful message, and no half-written files."""

from __future__ import annotations

import errno
import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

import prefixfast
import tiny
from prefixfast import (
    BaseMismatchError,
    CapacityError,
    ConfigError,
    DataError,
    Engine,
    EngineConfig,
    GenerationParams,
    Prefix,
    PrefixConfig,
    PrefixStore,
    RequestError,
    TrainConfig,
    UnknownPrefixError,
    generate,
    load,
    score,
    train,
)

OK = [5, 6, 7]
ROWS = [{"prompt": "ab", "completion": "cd"}] * 3
FEW = {"max_num_seqs": 2, "max_model_len": 32, "max_new_tokens": 2}


def files_of(folder):
    return sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*"))


class World:
    """Objects that the cases use."""

    def __init__(self, base, folder, tmp_path, make_prefix):
        self.base, self.folder, self.tmp, self.make = base, folder, tmp_path, make_prefix
        self.good = make_prefix()
        self.good.save_pretrained(tmp_path / "good")
        self.store = PrefixStore(tmp_path / "store")
        self.store.put("known", self.good)

    def generate(self, batch, prefixes=None, **fields):
        return generate(batch, prefixes, model=self.base, progress=False, **{**FEW, **fields})

    def train(self, rows=ROWS, **fields):
        return train(self.base, rows, progress=False, **{"prefix_length": 2, "max_steps": 1, **fields})

    def broken(self, change):
        """Read a saved prefix after a change of its tensor file."""
        self.good.save_pretrained(self.tmp / "broken")
        file = self.tmp / "broken" / "adapter_model.safetensors"
        (self.tmp / "broken" / "prefixfast.json").unlink()
        change(file)
        return Prefix.from_pretrained(self.tmp / "broken")

    def file(self, name, text):
        path = self.tmp / name
        path.write_text(text, encoding="utf8")
        return path


def other_weights(w):
    other = tiny.make("gpt2", seed=1)
    with load(other, tokenizer=w.base.tokenizer.hf) as second:
        return generate([OK], w.train(), model=second, progress=False, **FEW)


def wrong_base(w):
    with load(tiny.make("llama")) as other:
        return generate([OK], w.good, model=other, progress=False, **FEW)


def header(size):
    return lambda file: file.write_bytes(struct.pack("<Q", size) + b"{}")


def traversal(file):
    save_file({"../../outside": torch.zeros(4, 4), "prompt_embeddings": torch.zeros(4, 192)}, file)


def with_nan(file):
    save_file({"prompt_embeddings": torch.full((4, 192), float("nan"))}, file)


def integers(file):
    save_file({"prompt_embeddings": torch.zeros(4, 192, dtype=torch.int32)}, file)


def config(**values):
    def change(file):
        path = file.parent / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


CASES = {
    # bases
    "wrong base": (wrong_base, BaseMismatchError, "expected one length|made for base"),
    "same shape, other weights": (other_weights, BaseMismatchError, "weights"),
    "a base that is not there": (lambda w: load("no/such-base"), ConfigError, "no/such-base"),
    "a base that is no model": (lambda w: load(torch.nn.Linear(2, 2)), ConfigError, "Linear"),
    "an architecture that cannot work": (lambda w: load(bloom()), ConfigError, "bloom"),
    "unknown backend": (lambda w: load(w.folder, backend="fast"), ConfigError, "backend"),
    "unknown dtype": (lambda w: load(w.folder, dtype="int4"), ConfigError, "dtype"),
    "unknown device": (lambda w: load(w.folder, device="gpu:9"), ConfigError, "device"),
    "another dtype than the base has": (lambda w: Engine(w.base, dtype="bfloat16"), ConfigError, "dtype: this base"),
    "a closed base": (lambda w: closed(w), ConfigError, "closed"),
    # prefix folders
    "no folder": (lambda w: Prefix.from_pretrained(w.tmp / "nothing"), DataError, "no such folder|nothing"),
    "an empty folder": (
        lambda w: (w.tmp.joinpath("empty").mkdir(), Prefix.from_pretrained(w.tmp / "empty")),
        DataError,
        "empty",
    ),
    "truncated tensors": (lambda w: w.broken(lambda f: os.truncate(f, f.stat().st_size - 7)), DataError, "damaged"),
    "an empty file": (lambda w: w.broken(lambda f: f.write_bytes(b"")), DataError, "damaged"),
    "a huge header": (lambda w: w.broken(header(2**60)), DataError, "damaged"),
    "a header longer than the file": (lambda w: w.broken(header(900)), DataError, "damaged"),
    "traversal names": (lambda w: w.broken(traversal), DataError, "prompt_embeddings"),
    "NaN": (lambda w: w.broken(with_nan), DataError, "finite"),
    "integers": (lambda w: w.broken(integers), DataError, "float"),
    "a config that lies about rows": (lambda w: w.broken(config(num_virtual_tokens=10**9)), DataError, "rows"),
    "a config that lies about heads": (lambda w: w.broken(config(num_attention_heads=7)), DataError, "heads"),
    "another method's adapter": (lambda w: w.broken(config(peft_type="LORA")), DataError, "LORA"),
    "a config that is a list": (
        lambda w: w.broken(lambda f: f.with_name("adapter_config.json").write_text("[]")),
        DataError,
        "object",
    ),
    "no tensors in a prefix": (lambda w: Prefix({}, 1), DataError, "at least one"),
    # requests
    "a bare dict as batch": (lambda w: w.generate({"prompt": "ab"}), ConfigError, "sequence of requests"),
    "a bare string as batch": (lambda w: w.generate("ab"), ConfigError, "sequence of requests"),
    "a flat list of tokens": (lambda w: w.generate(OK), ConfigError, "flat list"),
    "too few prefixes": (lambda w: w.generate([OK, OK], [w.good]), ConfigError, "one entry for each"),
    "a name without a store": (lambda w: w.generate([OK], ["known"]), RequestError, "store"),
    "unknown prefix": (lambda w: w.generate([OK], "nobody", store=w.store), UnknownPrefixError, "nobody"),
    "an unknown name in a mapping": (
        lambda w: w.generate([{"prompt": "a", "prefix": "x"}], {"y": w.good}),
        RequestError,
        "'x'",
    ),
    "a mapping without names": (lambda w: w.generate([{"prompt": "a"}], {"y": w.good}), RequestError, "prefix"),
    "a folder for a prefix": (lambda w: w.generate([OK], w.tmp), ConfigError, "from_pretrained"),
    "too long a prompt": (lambda w: w.generate([[5] * 40]), RequestError, "exceed"),
    "an empty prompt": (lambda w: w.generate([[]]), RequestError, "no tokens"),
    "tokens outside the vocabulary": (lambda w: w.generate([[5, 10**6]]), RequestError, "token ids"),
    "an empty table": (lambda w: w.generate([{"table": {}}]), RequestError, "table|empty"),
    "a row with an unknown key": (lambda w: w.generate([{"promt": "a"}]), RequestError, "promt"),
    "a row with two inputs": (lambda w: w.generate([{"prompt": "a", "mr": "name[b]"}]), RequestError, "prompt"),
    "bad parameters of one request": (
        lambda w: w.generate([OK, {"input_ids": OK, "params": {"top_p": 3}}]),
        RequestError,
        "request 1.*top_p",
    ),
    "unknown option": (lambda w: w.generate([OK], temprature=1.0), ConfigError, "temperature"),
    "another library's option": (lambda w: w.generate([OK], max_tokens=3), ConfigError, "max_new_tokens"),
    "a temperature without sampling": (lambda w: w.generate([OK], temperature=0.5), RequestError, "do_sample"),
    "temperature zero": (lambda w: w.generate([OK], temperature=0.0, do_sample=True), ConfigError, "temperature"),
    "beams that sample": (lambda w: w.generate([OK], num_beams=2, do_sample=True), RequestError, "beams"),
    "several greedy texts": (lambda w: w.generate([OK], num_return_sequences=2), RequestError, "do_sample"),
    "more texts than beams": (lambda w: w.generate([OK], num_beams=2, num_return_sequences=3), RequestError, "beams"),
    "a bad word outside the vocabulary": (
        lambda w: w.generate([OK], bad_words_ids=[[10**6]]),
        RequestError,
        "bad_words_ids",
    ),
    "a stop string with beams": (
        lambda w: w.generate([OK], num_beams=2, stop_strings="a"),
        RequestError,
        "stop_strings",
    ),
    "more beams than rows": (lambda w: w.generate([OK], num_beams=5), CapacityError, "max_num_seqs"),
    "a score without a target": (lambda w: score([OK], model=w.base), RequestError, "target"),
    "targets that do not fit": (lambda w: score([OK, OK], targets=[OK], model=w.base), ConfigError, "targets"),
    # options
    "a wrong type": (lambda w: GenerationParams(max_new_tokens="many"), ConfigError, "max_new_tokens"),
    "a share above one": (lambda w: EngineConfig(gpu_memory_utilization=1.5), ConfigError, "gpu_memory_utilization"),
    "no memory for anything": (lambda w: Engine(w.base, kv_cache_memory=1000), CapacityError, "kv_cache_memory"),
    "dropout of one": (lambda w: PrefixConfig(prefix_dropout=1.0), ConfigError, "prefix_dropout"),
    "a rate of zero": (lambda w: TrainConfig(learning_rate=0.0), ConfigError, "learning_rate"),
    # rows
    "a malformed row, by its line": (
        lambda w: w.train(w.file("a.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": \n')),
        DataError,
        "a.jsonl:2",
    ),
    "a row without its target": (lambda w: w.train([*ROWS, {"prompt": "x"}]), DataError, "row 3|completion"),
    "no rows": (lambda w: w.train([]), DataError, "at least one row"),
    "a file that is not there": (lambda w: w.train(w.tmp / "none.jsonl"), DataError, "none.jsonl"),
    "a file of another kind": (lambda w: w.train(w.file("a.xlsx", "x")), DataError, "jsonl"),
    "an unknown task": (lambda w: w.train(task="poetry"), ConfigError, "poetry"),
    "an unknown init": (lambda w: w.train(init="magic"), ConfigError, "magic"),
    "no names": (lambda w: w.train({}), DataError, "at least one name"),
    # stores
    "a store that is a file": (lambda w: PrefixStore(w.file("s", "x")), ConfigError, "directory"),
    "a read-only store": (
        lambda w: PrefixStore(w.store.path, read_only=True).put("a", w.good),
        ConfigError,
        "read-only",
    ),
    "a name that is empty": (lambda w: w.store.put("", w.good), ConfigError, "name"),
    "a version that is not there": (lambda w: w.store.rollback("known", 9), UnknownPrefixError, "9"),
    # PEFT
    "a prefix that PEFT cannot hold": (lambda w: w.make(pos_start=0).to_peft(w.tmp / "out"), ConfigError, "position"),
}


def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2))


def closed(w):
    base = load(tiny.make("gpt2"))
    base.close()
    generate([OK], model=base, **FEW)


@pytest.fixture
def world(base, folder, tmp_path, make_prefix):
    return World(base, folder, tmp_path, make_prefix)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_an_error_with_a_useful_message(world, case):
    act, kind, words = CASES[case]
    before = files_of(world.store.path)
    with pytest.raises(kind, match=words) as caught:
        act(world)
    assert type(caught.value) is kind
    assert isinstance(caught.value, prefixfast.PrefixFastError)
    assert len(str(caught.value)) > 20
    assert files_of(world.store.path) == before
    assert not (world.tmp / "out").exists()
    assert world.generate([OK], world.good)[0].error is None, "the base model still works"


def test_there_are_enough_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize("what", ["save", "put", "train"])
def test_a_full_disk_leaves_the_old_version(world, what, monkeypatch):
    target = world.tmp / "place"
    acts = {
        "save": lambda prefix: prefix.save_pretrained(target),
        "put": lambda prefix: world.store.put("known", prefix),
        "train": lambda prefix: world.train(
            init=prefix, prefix_length=prefix.length, output_dir=target, overwrite=True
        ),
    }
    acts[what](world.good)
    held = {"save": target, "put": world.store.path, "train": target}[what]
    before, digest = files_of(held), (world.store["known"] if what == "put" else Prefix.from_pretrained(target)).digest
    real, written = os.fsync, []

    def full(fd):
        written.append(fd)
        if what != "train" or len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        acts[what](world.make(3))
    monkeypatch.undo()
    after = (world.store["known"] if what == "put" else Prefix.from_pretrained(target)).digest
    assert after == digest
    if what != "train":
        assert files_of(held) == before
