"""Methods `prompt` and `icl` make the prefix of a text, without training."""

from __future__ import annotations

import numpy as np
import pytest

import tiny
from prefixfast import ConfigError, DataError, Prefix, generate, load, score, train
from prefixfast.training.estimate import estimate
from token_rows import rows

ROWS = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(6)]


@pytest.fixture(scope="module")
def base(tokenizer):
    with load(tiny.make("gpt2"), tokenizer=tokenizer) as loaded:
        yield loaded


def test_a_prompt_is_the_prefix_of_its_text(base):
    made = train(base, ROWS, method="prompt", init_text="sums", eval_data=ROWS[:2])
    expected = Prefix.from_text(base, "sums")
    assert made.digest == expected.digest
    assert (made.num_trained, made.training["method"], made.task["name"]) == (0, "prompt", "prompt")
    metrics = made.training["metrics"]
    scores = score(ROWS[:2], made, model=base, end_token=True)
    mean = -sum(s.logprob for s in scores) / sum(len(s.token_ids) for s in scores)
    assert metrics["eval_loss"] == metrics["eval_loss_before"] == pytest.approx(mean, rel=1e-5)
    assert (metrics["steps"], metrics["best_step"]) == (0, 0)
    assert metrics["loss"] == metrics["first_loss"] > 0


def test_examples_are_those_that_the_seed_draws_with_their_end_token(base):
    made = train(base, ROWS, method="icl", num_examples=3, seed=4)
    drawn = np.random.default_rng(4).permutation(6)[:3]
    own = base.require_tokenizer()
    ids = []
    for i in drawn:
        text = ROWS[i]["prompt"] + ROWS[i]["completion"]
        ids += [*own.encode([text])[0].tolist(), own.eos_id]
    assert made.digest == Prefix.from_text(base, ids).digest
    with_prefix = generate(["4 + 4 ="], made, model=base, max_new_tokens=4)[0]
    prompt = [*ids, *own.encode(["4 + 4 ="])[0].tolist()]
    assert with_prefix.token_ids == generate([prompt], model=base, max_new_tokens=4)[0].token_ids
    assert train(base, ROWS, method="icl", num_examples=3, seed=5).digest != made.digest


def test_names_have_examples_of_their_own_and_files_of_a_run(tmp_path):
    data = {"a": rows(0, 4), "b": rows(1, 5)}
    with load(tiny.make("gpt2")) as base:
        run = train(base, data, method="icl", num_examples=2, output_dir=tmp_path / "out", store=tmp_path / "store")
        alone = train(base, data["b"], method="icl", num_examples=2)
        again = train(base, data, method="icl", num_examples=2, output_dir=tmp_path / "out", resume=True)
    assert run["b"].digest == alone.digest != run["a"].digest
    assert {n: p.digest for n, p in again.items()} == {n: p.digest for n, p in run.items()}
    assert Prefix.from_pretrained(tmp_path / "out" / "a").digest == run["a"].digest
    assert run.best().digest in {p.digest for p in run.values()}
    assert not run.advice()


def test_more_examples_than_rows_and_options_of_training_are_refused():
    with load(tiny.make("gpt2")) as base:
        with pytest.raises(ConfigError, match="num_examples: expected at most the 2 rows"):
            train(base, rows(0, 2), method="icl")
        for name, value in {
            "max_steps": 3,
            "learning_rate": 0.1,
            "batch_size": 2,
            "init": "text",
            "layers": [0],
        }.items():
            with pytest.raises(ConfigError, match=f"{name}: method 'icl' does not read it"):
                train(base, rows(0, 5), method="icl", **{name: value})


def test_a_name_whose_rows_make_no_text_does_not_stop_the_others(base):
    long = [{"prompt": "word " * 40, "completion": " x"}] * 4
    data = {"ann": ROWS, "few": ROWS[:1], "long": long, "bob": ROWS[::-1]}
    run = train(base, data, method="icl", num_examples=2)
    assert list(run) == ["ann", "bob"]
    assert "at most the 1 rows of 'few', got 2" in run.failed["few"]
    assert "tokens" in run.failed["long"]
    assert run["bob"].digest == train(base, ROWS[::-1], method="icl", num_examples=2).digest
    for on_error, names in (("raise", ("ann", "few")), ("raise", ("ann", "long")), ("isolate", ("few", "long"))):
        with pytest.raises((ConfigError, DataError), match=names[-1] if on_error == "raise" else "no prefix is left"):
            train(base, {n: data[n] for n in names}, method="icl", num_examples=2, on_error=on_error)
    told = estimate(base, data, method="icl", num_examples=2)
    assert (told.prefixes, set(told.failed)) == (2, {"few", "long"})


@pytest.mark.parametrize("method", ["full", "lora", "prompt"])
def test_a_name_with_rows_that_are_too_long_does_not_stop_the_others(base, tmp_path, method):
    data = {"long": [{"prompt": "word " * 90, "completion": " x"}], "ann": ROWS}
    steps = {} if method == "prompt" else {"max_steps": 1}
    run = train(base, data, method=method, output_dir=tmp_path, **steps)
    assert (list(run), list(run.failed)) == (["ann"], ["long"])
    assert "long" in (tmp_path / "failed.jsonl").read_text()
    with pytest.raises(DataError, match="no prefix is left"):
        train(base, dict.fromkeys("ab", data["long"]), method=method, **steps)


@pytest.mark.parametrize("overflow", ["skip", "truncate"])
def test_the_text_of_examples_has_the_length_limit(base, overflow):
    data = [*ROWS[:2], {"prompt": "ab " * 30, "completion": " x"}, *ROWS[2:4]]
    made = train(base, data, method="icl", num_examples=4, max_length=20, overflow=overflow)
    assert made.training["metrics"]["skipped_rows"] + made.training["metrics"]["truncated_rows"] == 1
    if overflow == "skip":
        drawn = [i for i in np.random.default_rng(made.training["config"]["seed"]).permutation(5) if i != 2]
        own = base.require_tokenizer()
        texts = [data[i]["prompt"] + data[i]["completion"] for i in drawn]
        ids = [token for text in texts for token in [*own.encode([text])[0].tolist(), own.eos_id]]
        assert made.digest == Prefix.from_text(base, ids).digest
        with pytest.raises(DataError, match="at most the 4 rows"):
            train(base, data, method="icl", num_examples=5, max_length=20, overflow=overflow)
    else:
        assert made.length <= 4 * 20
        assert made.length > train(base, ROWS[:4], method="icl", num_examples=4).length
    with pytest.raises(DataError, match="at most 20 fit; shorten it, raise max_length"):
        train(base, data, method="icl", num_examples=5, max_length=20)


def test_weights_have_reasons_against_a_store_and_a_frozen_prefix(base, tmp_path):
    shared = Prefix.from_text(base, "ab")
    cases = {"store": (tmp_path / "s", "a store holds prefixes"), "on_top_of": (shared, "act in the base")}
    for name, (value, reason) in cases.items():
        with pytest.raises(ConfigError, match=f"{name}: method 'lora' does not read it; .*{reason}"):
            train(base, ROWS, method="lora", **{name: value})
        assert not (tmp_path / "s").exists()
    with pytest.raises(ConfigError, match=r"of the methods prefix, infix$"):
        train(base, ROWS, method="icl", on_top_of=shared)
    with pytest.raises(ConfigError, match=r"of the method icl$"):
        train(base, ROWS, num_examples=2)


def test_advice_names_an_option_that_the_method_reads(base):
    long = [{"prompt": "word " * 9, "completion": " x"}] * 4
    with pytest.raises(DataError, match="lower num_examples"):
        train(base, long, method="icl", num_examples=4)
    with pytest.raises(ConfigError, match="give a shorter init_text"):
        train(base, ROWS, method="prompt", init_text="word " * 90)
    with pytest.raises(DataError, match="shorten it, or set overflow"):
        train(base, [{"prompt": "word " * 90, "completion": " x"}], method="top2", max_steps=1)
    with pytest.raises(DataError, match=r"shorten it, use a shorter prefix \(prefix_length\), or set overflow"):
        train(base, [{"prompt": "word " * 90, "completion": " x"}], max_steps=1)
    split = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]}]
    with pytest.raises(DataError, match="label the last of them alone"):
        train(base, split, method="infix", prefix_length=2, max_steps=1)
