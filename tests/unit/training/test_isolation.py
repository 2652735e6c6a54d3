"""Assignment of rows to prefixes, isolation of failures, overrides and the store."""

from __future__ import annotations

import json

import pytest
import torch

import prefixfast
import tiny
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, DataError
from prefixfast.training.trainer import train
from token_rows import distance, rows

HOW = {
    "max_steps": 3,
    "batch_size": 2,
    "prefix_length": 3,
    "learning_rate": 1e-2,
    "init": "random",
    "reparameterization": "none",
}
MALFORMED = {"input_ids": [5, 6, 700], "labels": [-100, 6, 700]}
LONG = {"input_ids": list(range(3, 53)), "labels": [-100] * 48 + [51, 52]}


@pytest.fixture(scope="module")
def model():
    with prefixfast.load(tiny.make("gpt2", dtype=torch.float64)) as loaded:
        yield loaded


def tagged(data: dict) -> list[dict]:
    """Rows of all names, interleaved."""
    out = []
    for i in range(max(map(len, data.values()))):
        out += [{**own[i], "user": name} for name, own in data.items() if i < len(own)]
    return out


def test_a_column_names_the_prefix_of_each_row(model, tmp_path):
    data = {"ann": rows(0, 5), "bob": rows(1, 4), "eve": rows(2, 1)}
    held_out = {n: rows(9 + i, 2) for i, n in enumerate(data)}
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in tagged(data)), encoding="utf8")
    by_name = train(model, data, eval_data=held_out, **HOW)
    by_column = train(model, tmp_path / "all.jsonl", prefix_column="user", eval_data=tagged(held_out), **HOW)
    assert list(by_column) == list(data)
    assert all(distance(by_name[n], by_column[n]) == 0 for n in data)
    assert by_column.metrics == by_name.metrics


def test_held_out_rows_without_the_column_serve_all_prefixes(model):
    data = {"ann": rows(0, 3), "bob": rows(1, 3)}
    shared = rows(5, 4)
    run = train(model, tagged(data), prefix_column="user", eval_data=shared, **HOW)
    by_name = train(model, data, eval_data=dict.fromkeys(data, shared), **HOW)
    alone = train(model, data["bob"], eval_data=shared, **HOW)
    assert run.metrics["bob"]["eval_loss"] == pytest.approx(by_name.metrics["bob"]["eval_loss"], abs=1e-12)
    assert alone.training["metrics"]["eval_loss"] == pytest.approx(by_name.metrics["bob"]["eval_loss"], abs=1e-9)


def test_values_of_the_column_may_be_numbers(model):
    run = train(model, [{**r, "user": 7} for r in rows(0, 2)], prefix_column="user", **HOW)
    assert list(run) == ["7"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": {"a": rows(0, 2)}}, ConfigError, "leave one of them out"),
        ({"data": [{**r, "user": None} for r in rows(0, 2)]}, DataError, "row 0: user: expected the name"),
        (
            {"data": [{**rows(0, 1)[0], "user": "a"}, rows(0, 1)[0]]},
            DataError,
            "row 1: prefix_column: .*'user'",
        ),
        (
            {"data": tagged({"a": rows(0, 2)}), "eval_data": tagged({"b": rows(0, 2)})},
            ConfigError,
            r"names of data, got \['a', 'b'\]",
        ),
    ],
)
def test_wrong_columns_are_refused(model, change, error, message):
    with pytest.raises(error, match=message):
        train(model, prefix_column="user", **HOW, **change)


BAD_ROWS = {
    "malformed": ([*rows(3, 2), MALFORMED], "0 to 100"),
    "too long": ([*rows(3, 2), LONG], "50 tokens, at most 20 fit"),
    "no mapping": ([*rows(3, 2), "text"], "expected a mapping"),
    "no rows": ([], "at least one row"),
    "no such file": ("nowhere.jsonl", "cannot be read"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_malformed_rows_fail_their_prefix_only(model, tmp_path, bad, message):
    data = {"ann": rows(0, 5), "bad": bad, "bob": rows(1, 4)}
    run = train(model, data, max_length=20, output_dir=tmp_path, **HOW)
    assert list(run) == ["ann", "bob"]
    assert list(run.failed) == ["bad"]
    assert message in run.failed["bad"]
    assert [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()] == [
        {"prefix": "bad", "error": run.failed["bad"]}
    ]
    for name in run:
        assert distance(run[name], train(model, data[name], **HOW)) < 1e-9
    with pytest.raises(DataError, match=message):
        train(model, data, max_length=20, on_error="raise", **HOW)


def test_malformed_held_out_rows_fail_their_prefix_only(model):
    run = train(model, {"ann": rows(0, 3), "bob": rows(1, 3)}, eval_data={"ann": [MALFORMED], "bob": rows(2, 2)}, **HOW)
    assert list(run) == ["bob"]
    assert "0 to 100" in run.failed["ann"]


def test_errors_number_the_row_in_the_whole_data(model):
    data = tagged({"ann": rows(0, 3), "bob": [*rows(1, 2), MALFORMED]})
    run = train(model, data, prefix_column="user", **HOW)
    assert "row 6 of the data" in run.failed["bob"]


def test_errors_name_the_line_of_a_file(model, tmp_path):
    data = tagged({"ann": rows(0, 3), "bob": [*rows(1, 2), MALFORMED]})
    path = tmp_path / "all.jsonl"
    path.write_text("\n" + "".join(json.dumps(r) + "\n" for r in data), encoding="utf8")
    run = train(model, path, prefix_column="user", **HOW)
    assert f"{path}:7: " in run.failed["bob"]
    assert "of the data" not in run.failed["bob"]


def test_no_prefix_left_is_an_error(model):
    with pytest.raises(DataError, match="no prefix is left"):
        train(model, {"a": [MALFORMED], "b": [MALFORMED]}, **HOW)
    with pytest.raises(DataError, match="none of the 2 prefixes"):
        train(model, {"a": [], "b": []}, **HOW)


def test_nonfinite_gradients_fail_their_prefix_only(model, tmp_path):
    good = train(model, rows(0, 4), **HOW)
    bad = prefixfast.Prefix({n: torch.full_like(t, 1e200) for n, t in good.kv.items()}, good.pos_start)
    how = {**HOW, "max_steps": 30}
    how.pop("init"), how.pop("prefix_length")
    run = train(
        model,
        {"good": rows(0, 4), "bad": rows(0, 4)},
        init={"good": good, "bad": bad},
        output_dir=tmp_path,
        logging_steps=1,
        **how,
    )
    assert list(run) == ["good"]
    assert "not finite in 10 steps in a row" in run.failed["bad"]
    assert [line["prefixes"] for line in run.log if "loss" in line] == [2] * 10 + [1] * 20, "it left the batches"
    assert not (tmp_path / "bad").exists()
    assert distance(run["good"], train(model, rows(0, 4), init=good, **how)) < 1e-9
    with pytest.raises(ConfigError, match=r"prefix 'bad'.*lower learning_rate"):
        train(model, {"good": rows(0, 4), "bad": rows(0, 4)}, init={"good": good, "bad": bad}, on_error="raise", **how)


def test_skipped_and_truncated_rows_are_counted_by_prefix(model):
    data = {"ann": [*rows(0, 3), LONG], "bob": rows(1, 3)}
    skipped = train(model, data, max_length=20, overflow="skip", **HOW).metrics
    cut = train(model, data, max_length=20, overflow="truncate", **HOW).metrics
    assert [(m["examples"], m["skipped_rows"], m["truncated_rows"]) for m in skipped.values()] == [(3, 1, 0), (3, 0, 0)]
    assert [(m["examples"], m["skipped_rows"], m["truncated_rows"]) for m in cut.values()] == [(4, 0, 1), (3, 0, 0)]


def test_overrides_apply_to_one_prefix(model):
    data = {"ann": rows(0, 6), "bob": rows(1, 6), "eve": rows(2, 6)}
    own = {
        "bob": {
            "learning_rate": 3e-2,
            "seed": 5,
            "max_steps": 5,
            "batch_size": 3,
            "warmup_steps": 2,
            "max_grad_norm": 0.1,
            "weight_decay": 0.1,
        },
        "eve": {"lr_scheduler_type": "cosine", "shuffle": False},
    }
    how = {**HOW, "prefix_dropout": 0.2}
    run = train(model, data, overrides=own, **how)
    for name in data:
        assert distance(run[name], train(model, data[name], **how | own.get(name, {}))) < 1e-9
        if name in own:
            assert distance(run[name], train(model, data[name], **how)) > 1e-4
    assert run.metrics["bob"]["steps"] == 5
    assert run["bob"].training["config"]["seed"] == 5


@pytest.mark.parametrize("given", [{"max_steps": 5}, {"recipe": "low-data", "prefix_length": 2, "fit_steps": 0}])
def test_epochs_of_one_prefix_replace_the_steps_of_the_run(model, given):
    how = {k: v for k, v in HOW.items() if k != "max_steps"} | {"batch_size": 2, "eval_steps": None} | given
    data = {"ann": rows(0, 6), "bob": rows(1, 6)}
    run = train(model, data, overrides={"bob": {"num_train_epochs": 1}}, **how)
    assert run.metrics["bob"]["steps"] == 3
    assert run.metrics["ann"]["steps"] == given.get("max_steps", 200)
    swept = train(model, rows(0, 6), sweep={"num_train_epochs": [1, 2]}, **how)
    assert [m["steps"] for m in swept.metrics.values()] == [3, 6]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"anm": {"seed": 1}}, "did you mean 'ann'"),
        ({"ann": {"loss": "token_mean"}}, "unknown option 'loss'"),
        ({"ann": {"seed": "x"}}, "TrainConfig.seed"),
        ({"ann": 3}, "expected a mapping"),
        ([("ann", {})], "expected a mapping"),
    ],
)
def test_wrong_overrides_are_refused(model, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train(model, {"ann": rows(0, 2)}, overrides=overrides, **HOW)


def test_each_prefix_is_stored_when_it_is_finished(model, tmp_path):
    store = prefixfast.PrefixStore(tmp_path / "store")
    seen = []

    class Watch:
        def on_step(self, step, losses, grad_norms, active):
            seen.append(sorted(store))

    run = train(
        model,
        {"short": rows(0, 2), "long": rows(1, 2)},
        overrides={"long": {"max_steps": 5}},
        store=store,
        callbacks=[Watch()],
        **HOW,
    )
    assert seen == [[], [], [], ["short"], ["short"]], "after 3 steps the short one is there, while the other goes on"
    assert {n: store[n].digest for n in store} == {n: run[n].digest for n in run}
    train(model, rows(0, 2), store=tmp_path / "store", **HOW)
    assert "prefix" in store


def test_bad_words_of_a_task_become_token_ids(base):
    rows_ = [{"mr": "name[ab]", "ref": "ab is."}] * 3
    prefix = train(base, rows_, task="e2e", max_steps=1, prefix_length=2, progress=False)
    (line,) = base.require_tokenizer().encode(["\n"], add_special_tokens=False)
    assert prefix.decoding["bad_words_ids"] == [[int(line[0])] * 2, [int(line[0])]]
    (got,) = prefixfast.generate(
        [{"mr": "name[ab]"}], prefix, model=base, max_new_tokens=8, min_new_tokens=8, progress=False
    )
    assert int(line[0]) not in got.token_ids
    assert Task.from_spec(prefix.task).bad_words == ("\n\n", "\n")
