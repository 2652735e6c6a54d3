"""Tokens that the embedding lacks: an error of the request or row that has them, before any forward."""

from __future__ import annotations

import copy

import pytest
from tokenizers import AddedToken

import tiny
from prefixfast import ConfigError, DataError, Engine, Prefix, RequestError, generate, load, score, train
from prefixfast.data import Task

FEW = {"max_new_tokens": 2, "progress": False}


@pytest.fixture(scope="module")
def base(tokenizer):
    """Base model whose tokenizer has two tokens more than its embedding."""
    own = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken("<new>"), AddedToken("<more>")])
    own.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    with load(tiny.make("gpt2"), tokenizer=own) as model:
        assert model.vocab_size == tiny.VOCAB < len(own)
        yield model


BAD = {
    "a text": "a<new>",
    "a prompt": {"prompt": "a <more>"},
    "a table": {"table": {"a": "<new>"}},
    "messages": {"messages": [{"role": "user", "content": "<new>"}]},
    "ids": [5, tiny.VOCAB],
    "negative ids": [5, -1],
    "ids of a row": {"input_ids": [tiny.VOCAB + 1]},
    "masked ids": {"input_ids": [5, tiny.VOCAB], "attention_mask": [1, 1]},
}


@pytest.mark.parametrize("item", BAD.values(), ids=BAD)
def test_only_the_request_with_the_token_fails(base, item):
    with pytest.raises(RequestError, match="request 1") as caught:
        generate(["a", item], model=base, **FEW)
    assert caught.value.index == 1
    alone = generate(["a"], model=base, **FEW)[0]
    first, second, third = generate(["a", item, "a"], model=base, on_error="return", **FEW)
    assert first.token_ids == third.token_ids == alone.token_ids
    assert second.error.startswith("RequestError: request 1")
    with Engine(base, max_num_seqs=2, max_model_len=32) as engine:
        running = engine.submit("a", max_new_tokens=2)
        with pytest.raises(RequestError):
            engine.submit(item)
        assert running.result().token_ids == alone.token_ids


@pytest.mark.parametrize("target", ["<new>", [tiny.VOCAB], [-1]], ids=str)
def test_a_target_with_the_token_is_an_error_of_its_request(base, target):
    with pytest.raises(RequestError, match="request 1: target"):
        score(["a", "b"], targets=["b", target], model=base)


@pytest.mark.parametrize("row", [{"prompt": "a", "completion": "<new>"}, {"text": "a<new>"}], ids=str)
def test_a_row_with_the_token_is_an_error_of_its_request(base, row):
    with pytest.raises(RequestError, match=r"request 1: .*embedding"):
        score([{"prompt": "a", "completion": "b"}, row], model=base)


def test_texts_of_prefixes_are_checked(base):
    with pytest.raises(ConfigError, match=r"text: .*embedding"):
        Prefix.from_text(base, "a<new>")
    with pytest.raises(ConfigError, match=r"init_text: .*embedding"):
        train(base, [{"prompt": "a", "completion": "b"}], init_text="<new>", max_steps=1, progress=False)
    with pytest.raises(RequestError, match=r"request 0: .*bad_words_ids"):
        generate(["a"], model=base, bad_words_ids=[[tiny.VOCAB]], **FEW)


GOOD = [{"prompt": "a", "completion": "b"}, {"prompt": "b", "completion": "c"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "<new>"},
        {"prompt": "<new>", "completion": "a"},
        {"prompt": "a", "completion": "b" * 3 + "<more>"},
    ],
    ids=str,
)
def test_one_users_token_does_not_end_the_training_of_another(base, row, tmp_path):
    how = {"init": "random", "prefix_length": 2, "max_steps": 2, "progress": False}
    run = train(base, {"ada": GOOD, "bob": [*GOOD, row]}, **how)
    assert list(run) == ["ada"]
    assert "row 2" in run.failed["bob"]
    assert run["ada"].digest == train(base, {"ada": GOOD}, **how)["ada"].digest
    with pytest.raises(DataError, match="row 2"):
        train(base, {"ada": GOOD, "bob": [*GOOD, row]}, on_error="raise", **how)
    file = tmp_path / "bob.csv"
    file.write_text("\n".join(["prompt,completion", "a,b", f"{row['prompt']},{row['completion']}"]))
    failed = train(base, {"ada": GOOD, "bob": str(file)}, **how).failed["bob"]
    assert f"{file}:3" in failed


def test_an_end_token_that_the_embedding_lacks_is_named(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"eos_token": "<end>"})
    with load(tiny.make("gpt2"), tokenizer=own) as base:
        assert len(generate(["a"], model=base, max_new_tokens=3, progress=False)[0].token_ids) == 3
        with pytest.raises(DataError, match=r"row 0: .*embedding"):
            train(base, GOOD, init="random", max_steps=1, progress=False)
        with pytest.raises(RequestError, match=r"request 0: .*embedding"):
            score(["a"], targets=["b"], model=base, end_token=True)


def test_bad_words_that_cannot_be_generated_are_left_out(base):
    task = Task("own", bad_words=["<new>", "x"])
    prefix = train(base, GOOD, task=task, init="random", max_steps=1, progress=False)
    assert len(prefix.decoding["bad_words_ids"]) == 1
    assert generate(["a"], prefix, model=base, **FEW)[0].error is None
