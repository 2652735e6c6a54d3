"""`score` reads rows as training does: row by row, its log-probabilities are the loss of training."""

from __future__ import annotations

import copy

import pytest

import tiny
from prefixfast import DataError, RequestError, generate, load, score, train
from prefixfast.data import Task
from prefixfast.prefix.prefix import Prefix

LAST = (
    "{% for m in messages %}[{{ m['role'][0] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'][0] }}]{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
TURNS = [("user", "Hi"), ("assistant", "Hello"), ("user", "2+2?"), ("assistant", "4")]
CHAT = [{"role": role, "content": text} for role, text in TURNS]
IDS = [5, 6, 7, 8, 9, 10]
ROWS = {
    "prompt": {"prompt": "2+2=", "completion": "4"},
    "messages as prompt": {"prompt": CHAT[:3], "completion": CHAT[3:]},
    "messages": {"messages": CHAT},
    "text": {"text": "Once upon a time"},
    "mr and ref": {"mr": "name[Aromi], food[French]", "ref": "Aromi is French."},
    "mr and refs": {"mr": "name[Aromi]", "refs": ["Aromi.", "It is Aromi."]},
    "table": {"table": {"a": "b"}, "ref": "a is b"},
    "triples": {"triples": [["a", "b", "c"]], "refs": ["a b c", "c is b"]},
    "document": {"document": "A long text", "summary": "short"},
    "labels": {"input_ids": IDS, "labels": [-100, 6, -100, -100, 9, -100]},
    "labels everywhere": {"input_ids": IDS, "labels": IDS},
    "completion_mask": {"input_ids": IDS, "completion_mask": [0, 0, 0, 1, 1, 1]},
    "assistant_masks": {"input_ids": IDS, "assistant_masks": [0, 1, 0, 0, 1, 0]},
    "padding": {"input_ids": [0, 0, *IDS], "completion_mask": [0] * 5 + [1] * 3, "attention_mask": [0, 0] + [1] * 6},
}


@pytest.fixture(scope="module", params=[LAST, MARKED], ids=["plain", "marked"])
def base(request, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = request.param
    with load(tiny.make("llama", dtype=tiny.torch.float64), tokenizer=own) as model:
        yield model


@pytest.fixture(scope="module")
def prefix(base):
    return Prefix.from_text(base, "A prefix")


def training_loss(base, prefix, row, task=None) -> float:
    """Mean loss of a row's target tokens in the evaluation of a run."""
    made = train(base, [row], task=task, init=prefix, eval_data=[row], max_steps=1, learning_rate=1e-30, progress=False)
    return made.training["metrics"]["eval_loss"]


@pytest.mark.parametrize("name", ROWS)
def test_the_score_of_a_row_is_its_loss_in_training(base, prefix, name):
    row = ROWS[name]
    (got,) = score([row], prefix, model=base, end_token=True)
    assert got.logprob == pytest.approx(-training_loss(base, prefix, row) * len(got.token_ids), rel=1e-9)
    assert got.logprob == pytest.approx(sum(got.token_logprobs))
    assert len(got.token_ids) == len(got.token_logprobs) == got.usage["completion_tokens"]


def test_the_task_of_the_prefix_reads_the_rows(base, prefix):
    task = Task("chat", input="messages", loss_on="all")
    row = {"messages": CHAT}
    trained = train(base, [row], task=task, init=prefix, max_steps=1, learning_rate=1e-30, progress=False)
    (got,) = score([row], trained, model=base, end_token=True)
    assert got.logprob == pytest.approx(-training_loss(base, trained, row, task) * len(got.token_ids), rel=1e-9)
    assert len(got.token_ids) > len(score([row], prefix, model=base, end_token=True)[0].token_ids)


def test_rows_of_all_formats_in_one_call_score_as_alone(base, prefix):
    rows = list(ROWS.values())
    together = score(rows, prefix, model=base, max_num_batched_tokens=40)
    alone = [score([row], prefix, model=base)[0] for row in rows]
    assert [s.token_ids for s in together] == [s.token_ids for s in alone]
    assert [s.logprob for s in together] == pytest.approx([s.logprob for s in alone])


def test_without_the_end_token_only_an_added_one_is_missing(base, prefix):
    for name in ("prompt", "text", "mr and ref"):
        without, having = (score([ROWS[name]], prefix, model=base, end_token=e)[0].token_ids for e in (False, True))
        assert having == [*without, tiny.EOS]
    for name in ("labels", "completion_mask", "messages"):
        without, having = (score([ROWS[name]], prefix, model=base, end_token=e)[0].token_ids for e in (False, True))
        assert having == without


@pytest.mark.parametrize(
    "row",
    [
        "text alone",
        [5, 6],
        {"prompt": "a"},
        {"input_ids": [5, 6]},
        {"input_ids": [5, 6], "labels": [-100, -100]},
        {"input_ids": [5, 6], "completion_mask": [1, 0]},
        {"messages": CHAT[:1]},
        {"text": ""},
    ],
    ids=str,
)
def test_a_row_without_a_target_is_named(base, row):
    with pytest.raises(RequestError, match="request 1: ") as caught:
        score([ROWS["prompt"], row], model=base)
    assert caught.value.index == 1


# ---- token ids of rows ----

TOKENIZED = {
    "left padding": ({"input_ids": [0, 0, 5, 6, 7], "labels": [-100, -100, -100, 6, 7]}, [0, 0, 1, 1, 1]),
    "right padding": ({"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100]}, [1, 1, 1, 0]),
    "padding inside": ({"input_ids": [5, 0, 6, 7], "labels": [-100, -100, 6, 7]}, [1, 0, 1, 1]),
    "a mask of booleans": ({"input_ids": [0, 5, 6, 7], "completion_mask": [False, False, True, True]}, [0, 1, 1, 1]),
    "a completion in padding": ({"input_ids": [5, 6, 7, 0], "completion_mask": [0, 1, 1, 1]}, [1, 1, 1, 0]),
    "both masks": (
        {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 1, 0]},
        [1, 1, 1, 1],
    ),
    "labels and a mask": (
        {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 0]},
        [1, 1, 1, 1],
    ),
}


@pytest.mark.parametrize("name", TOKENIZED)
def test_padding_is_left_out_wherever_it_stands(base, prefix, name):
    row, attended = TOKENIZED[name]
    plain = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    padded = row | {"attention_mask": attended}
    assert score([padded], prefix, model=base)[0].logprob == score([plain], prefix, model=base)[0].logprob
    assert training_loss(base, prefix, padded) == training_loss(base, prefix, plain)
    prompts = [{"input_ids": [5]}, padded]
    first, second = generate(prompts, prefix, model=base, max_new_tokens=4, progress=False)
    assert first.token_ids == second.token_ids, "the prompt of a request ends before its target"


WRONG = {
    "a short mask": {"completion_mask": [1, 1]},
    "a mask of other numbers": {"completion_mask": [0, 1, 2]},
    "a mask of words": {"assistant_masks": ["0", "1", "1"]},
    "a nested mask": {"completion_mask": [[0, 1, 1]]},
    "a mask of fractions": {"completion_mask": [0.0, 1.0, 1.0]},
    "padding alone": {"labels": [-100] * 3, "attention_mask": [0, 0, 0]},
    "a label in padding": {"labels": [-100, 6, 7], "attention_mask": [1, 1, 0]},
    "several sequences": {"labels": [-100, 6, 7], "position_ids": [0, 0, 1]},
    "a huge label": {"labels": [-100, 6, 2**70]},
    "no target": {"completion_mask": [1, 0, 0]},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mask_is_an_error_of_its_row(base, name):
    row = {"input_ids": [5, 6, 7], **WRONG[name]}
    with pytest.raises(RequestError, match="request 1"):
        score([ROWS["labels"], row], model=base)
    with pytest.raises(DataError, match="row 1"):
        train(base, [ROWS["labels"], row], init="random", max_steps=1, progress=False)


def test_positions_of_one_sequence_are_taken(base):
    row = {"input_ids": [0, 5, 6], "labels": [-100, -100, 6], "attention_mask": [0, 1, 1], "position_ids": [0, 0, 1]}
    assert score([row], model=base)[0].token_ids == [6]
