"""Token ids against Hugging Face `tokenizers`, streams against whole decodes, and threads after a fork."""

import itertools
import json
import os
import subprocess
import sys
import threading
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Theirs
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from oracles import ROOT, SHARED, int32
from prefixfast._rust import Tokenizer
from prefixfast.errors import ConfigError, DataError

CORPUS = [
    "the cat sat on the mat, £20-25 a head",
    "naïve café 😀 👨‍👩‍👧 日本語のテキスト",
    "  two  spaces\nand lines\t\n",
] * 3
TEXTS = st.text(
    st.one_of(st.sampled_from("the cat é😀日本 <s>\n£"), st.characters(blacklist_categories=("Cs",))), max_size=30
)


def byte_level() -> Theirs:
    made = Theirs(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.enable_truncation(4)
    made.enable_padding(length=50)
    return made


def metaspace() -> Theirs:
    made = Theirs(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    made.train_from_iterator(
        CORPUS[:1],
        trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>", "<s>", "</s>", *alphabet], show_progress=False),
    )
    state = json.loads(made.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Theirs.from_str(json.dumps(state))


@cache
def pair(name: str) -> tuple[Tokenizer, Theirs]:
    if name in ("byte_level", "metaspace"):
        theirs = byte_level() if name == "byte_level" else metaspace()
        text = theirs.to_str()
    else:
        path = SHARED / "data" / "lm" / name / "tokenizer.json"
        if not path.is_file():
            pytest.skip(f"no tokenizer at {path}")
        text = path.read_text(encoding="utf-8")
        theirs = Theirs.from_str(text)
    theirs.no_truncation()
    theirs.no_padding()
    return Tokenizer(text), theirs


NAMES = ["byte_level", "metaspace", "nlg-10m", "stories260K/hf"]
every = pytest.mark.parametrize("name", NAMES)


def split(ids: np.ndarray, indptr: np.ndarray) -> list[list[int]]:
    return [ids[a:b].tolist() for a, b in itertools.pairwise(indptr)]


@every
@given(texts=st.lists(TEXTS, max_size=12), special=st.booleans())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_encodes_as_theirs(name: str, texts: list[str], special: bool) -> None:
    ours, theirs = pair(name)
    ids, indptr = ours.encode_batch(texts, add_special_tokens=special)
    assert (ids.dtype, indptr.dtype, len(indptr)) == (np.int32, np.int32, len(texts) + 1)
    assert split(ids, indptr) == [theirs.encode(text, add_special_tokens=special).ids for text in texts]
    assert ours.decode_batch(ids, indptr, skip_special_tokens=special) == [
        theirs.decode(one, skip_special_tokens=special) for one in split(ids, indptr)
    ]


@every
def test_large_batches(name: str) -> None:
    ours, theirs = pair(name)
    texts = [f"{text} {number}" for number in range(200) for text in CORPUS]
    ids, indptr = ours.encode_batch(texts, add_special_tokens=True)
    assert split(ids, indptr) == [encoding.ids for encoding in theirs.encode_batch(texts)]
    assert ours.decode_batch(ids, indptr, skip_special_tokens=True) == theirs.decode_batch(split(ids, indptr))


@every
def test_vocabulary(name: str) -> None:
    ours, theirs = pair(name)
    assert ours.vocab_size == theirs.get_vocab_size(with_added_tokens=True)
    for id in (0, 1, ours.vocab_size - 1):
        assert ours.id_to_token(id) == theirs.id_to_token(id)
        assert ours.token_to_id(theirs.id_to_token(id)) == id
    for id in (-1, ours.vocab_size, 2**40):
        assert ours.id_to_token(id) is None
    assert ours.token_to_id("no such token, surely") is None


@every
@given(data=st.data(), skip=st.booleans())
@settings(derandomize=True, deadline=None, max_examples=150)
def test_streams_join_to_the_whole(name: str, data: st.DataObject, skip: bool) -> None:
    ours, theirs = pair(name)
    any_ids = st.lists(st.integers(0, ours.vocab_size + 1), max_size=30)
    ids = data.draw(st.one_of(TEXTS.map(lambda text: theirs.encode(text).ids), any_ids))
    stream = ours.stream(skip_special_tokens=skip)
    sizes = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    for _ in range(2):
        parts, rest, pieces = [], ids, itertools.cycle(sizes)
        while rest:
            size = next(pieces)
            parts.append(stream.push(rest[:size]))
            rest = rest[size:]
        assert "".join([*parts, stream.finish()]) == theirs.decode(ids, skip_special_tokens=skip)


@every
def test_streams_hold_back_half_characters(name: str) -> None:
    ours, theirs = pair(name)
    text = "naïve 😀 日本語 end"
    stream = ours.stream(skip_special_tokens=True)
    parts = [stream.push([id]) for id in theirs.encode(text).ids]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) + stream.finish() == text


def test_streams_return_whole_characters_at_once() -> None:
    ours, theirs = pair("byte_level")
    stream = ours.stream(skip_special_tokens=True)
    assert all(stream.push([id]) for id in theirs.encode("the cat sat", add_special_tokens=False).ids)


@pytest.mark.parametrize("wrong", ["", "{}", "[]", "tokenizer.json", "\x00", '{"model": 3}', "{" * 10_000])
def test_refuses_other_text(wrong: str) -> None:
    with pytest.raises(ConfigError, match="no tokenizer"):
        Tokenizer(wrong)


def test_refuses_hostile_arrays() -> None:
    ours, _ = pair("byte_level")
    good = int32([1, 2, 3, 4])
    for indptr in ([], [0], [0, 3], [0, 5], [1, 4], [0, 3, 2, 4], [0, -1, 4], [-4, 4]):
        with pytest.raises(ConfigError, match="indptr"):
            ours.decode_batch(good, int32(indptr), skip_special_tokens=True)
    with pytest.raises(DataError, match="id -1 at place 0"):
        ours.decode_batch(int32([-1]), int32([0, 1]), skip_special_tokens=True)
    with pytest.raises(ConfigError, match="contiguous"):
        ours.decode_batch(good[::2], int32([0, 2]), skip_special_tokens=True)
    for dtype in (np.int64, np.float32, np.uint32, object):
        with pytest.raises(TypeError):
            ours.decode_batch(good.astype(dtype), int32([0, 4]), skip_special_tokens=True)
    with pytest.raises(TypeError):
        ours.decode_batch(good.reshape(2, 2), int32([0, 4]), skip_special_tokens=True)
    for texts in (["a", 3], [None], 3, "text"):
        with pytest.raises(TypeError):
            ours.encode_batch(texts, add_special_tokens=True)
    with pytest.raises(UnicodeEncodeError):
        ours.encode_batch(["\ud800"], add_special_tokens=True)
    stream = ours.stream(skip_special_tokens=False)
    for id in (-1, 2**31):
        with pytest.raises(DataError, match="id"):
            stream.push([id])
    with pytest.raises(OverflowError):
        stream.push([2**70])
    assert stream.push([2**31 - 1]) == stream.finish() == ""


def many(ours: Tokenizer) -> list[list[int]]:
    return split(*ours.encode_batch(CORPUS * 4, add_special_tokens=True))


def test_many_threads_share_one_tokenizer() -> None:
    ours, _ = pair("byte_level")
    expected, found = many(ours), []
    threads = [threading.Thread(target=lambda: found.append(many(ours))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


def test_works_after_fork() -> None:
    ours, _ = pair("byte_level")
    expected = many(ours)
    child = os.fork()
    if child == 0:
        signal = 1
        try:
            grandchild = os.fork()
            signal = 0 if many(ours) == expected else 2
            if grandchild:
                signal |= os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
        finally:
            os._exit(signal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert many(ours) == expected


class Rows:
    def __init__(self) -> None:
        self.ours, _ = pair("byte_level")
        self.expected = many(self.ours)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        return index if many(self.ours) == self.expected else -1


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
def test_works_in_forked_data_loaders() -> None:
    data = pytest.importorskip("torch.utils.data")
    loader = data.DataLoader(Rows(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert [int(index) for index in loader] == list(range(6))


@pytest.mark.parametrize(("value", "works"), [("1", True), ("3", True), ("0", False), ("many", False), ("", False)])
def test_reads_the_number_of_threads(value: str, works: bool) -> None:
    pair("byte_level")
    code = """
import sys
from prefixfast._rust import Tokenizer
from prefixfast.errors import ConfigError
ours = Tokenizer(sys.stdin.read())
ours.encode_batch(["small"] * 7, add_special_tokens=True)
try:
    ours.encode_batch(["large"] * 8, add_special_tokens=True)
except ConfigError as error:
    print(error)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "python"), "PREFIXFAST_NUM_THREADS": value}
    run = subprocess.run(
        [sys.executable, "-c", code], input=byte_level().to_str(), env=env, capture_output=True, text=True, check=True
    )
    assert ("PREFIXFAST_NUM_THREADS" in run.stdout) != works
