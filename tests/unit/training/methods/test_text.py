"""Methods `prompt` and `icl` make the prefix of a text, without training."""

from __future__ import annotations

import numpy as np
import pytest

import tiny
from prefixfast import ConfigError, Prefix, generate, load, score, train
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
