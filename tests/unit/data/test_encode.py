"""Tokens and targets compared to those of TRL's SFTTrainer, requests of the same rows, and errors with their lines."""

from __future__ import annotations

import copy
import doctest
import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

import prefixfast.data.builtin_tasks
import prefixfast.data.rows
import prefixfast.data.task
import tiny
from oracles import gpt2
from prefixfast import ConfigError, DataError, GenerationParams, Prefix, RequestError, load, train
from prefixfast.data.builtin_tasks import TASKS, find_task, request_task
from prefixfast.data.columns import column_task
from prefixfast.data.encode import Example, encode_examples
from prefixfast.data.files import FileRow
from prefixfast.data.rows import read_rows
from prefixfast.data.task import Task
from prefixfast.engine.make_requests import make_requests
from prefixfast.model.tokenizer import Tokenizer
from prefixfast.prefix import peft_format as layout
from prefixfast.training.batching import micro_batches
from prefixfast.training.examples import TokenizeOptions, apply_overflow, tokenize_rows

HEAD = (
    "{% if tools %}{{ tools | length }}{% endif %}{% if shout %}!{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
)
TAIL = (
    "{% else %}[{{ m['role'][0] }}]{{ m['content'] }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
LAST = HEAD + "<a>{{ m['content'] }}</s>\n" + TAIL
MARKED = HEAD + "<a>{% generation %}{{ m['content'] }}</s>{% endgeneration %}{{ '\\n' }}" + TAIL
OPEN = HEAD + "<a>{{ m['content'] }}\n" + TAIL  # no special token closes an answer


@pytest.fixture
def tok(tokenizer):
    """Function that makes a tokenizer with a begin token ``<s>`` and a chat template."""
    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])

    def with_template(template: str | None = None) -> Tokenizer:
        made.chat_template = template
        return Tokenizer.from_hf(made)

    return with_template


def say(*turns: str) -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[t[0]], "content": t[2:]} for t in turns]


def trl(hf, row, assistant_only=False) -> tuple[list[int], list[int]]:
    """Token ids and indices of targets as in SFTTrainer (`_prepare_dataset` and the shift by one)."""
    eos = hf.eos_token
    if "prompt" in row and isinstance(row["prompt"], list):
        prompt = hf.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = hf.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    elif "prompt" in row:
        completion = row["completion"] if row["completion"].endswith(eos) else row["completion"] + eos
        prompt, ids = hf(row["prompt"])["input_ids"], hf(row["prompt"] + completion)["input_ids"]
        mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    elif "text" in row:
        ids = hf(row["text"] if row["text"].endswith(eos) else row["text"] + eos)["input_ids"]
        mask = [1] * len(ids)
    else:
        out = hf.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=assistant_only)
        ids = out["input_ids"]
        mask = out["assistant_masks"] if assistant_only else [1] * len(ids)
    targets = [i for i, m in enumerate(mask) if m and i > 0]
    return ids[: targets[-1] + 1], targets


def ours(tokenizer: Tokenizer, *rows, task=None) -> list[tuple[list[int], list[int]]]:
    found = encode_examples(tokenizer, tiny.VOCAB, rows, find_task(task, rows[0]))
    return [(e.ids.tolist(), e.targets.tolist()) for e in found]


CHAT = say("s:Be brief.", "u:Hi", "a:Hello", "u:2+2?", "a:4")
STRINGS = {
    "prompt and completion": {"prompt": "2+2=", "completion": "4"},
    "a completion with its end": {"prompt": "2+2=", "completion": "4</s>"},
    "an empty completion": {"prompt": "2+2=", "completion": ""},
    "an end inside": {"prompt": "2+2=", "completion": "4</s> 5"},
    "a text": {"text": "Once upon a time"},
    "a text with its end": {"text": "Once</s>"},
    "an empty text": {"text": ""},
}


@pytest.mark.parametrize("row", STRINGS.values(), ids=STRINGS)
def test_strings_equal_trl(tok, row):
    tokenizer = tok()
    assert ours(tokenizer, row) == [trl(tokenizer.hf, row)]


@pytest.mark.parametrize("template", [LAST, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT[:2], "completion": CHAT[2:3]},
        {"prompt": CHAT[:2], "completion": CHAT[2:]},
        {"prompt": CHAT[:4], "completion": say("a:</s>")},
    ],
    ids=["one answer", "several turns", "an end inside"],
)
def test_conversational_pairs_equal_trl(tok, template, row):
    tokenizer = tok(template)
    assert ours(tokenizer, row) == [trl(tokenizer.hf, row)]


def test_marked_turns_of_the_assistant_are_the_target(tok):
    tokenizer = tok(MARKED)
    (got,) = ours(tokenizer, {"messages": CHAT})
    assert got == trl(tokenizer.hf, {"messages": CHAT}, assistant_only=True)
    ids, targets = np.array(got[0]), got[1]
    assert tokenizer.decode([ids[targets].tolist()], skip_special_tokens=False) == ["Hello</s>4</s>"]
    assert got[0][:1] != [1], "the template writes the special tokens: none is added"


def test_without_marks_the_last_answer_is_the_target(tok):
    tokenizer = tok(LAST)
    (got,) = ours(tokenizer, {"messages": CHAT})
    assert got == trl(tokenizer.hf, {"prompt": CHAT[:-1], "completion": CHAT[-1:]})
    assert ours(tok(MARKED), {"messages": CHAT}, task=Task("m", input="messages", loss_on="last")) == [got]


def test_loss_on_all_and_on_unmarked_turns(tok):
    tokenizer = tok(LAST)
    assert ours(tokenizer, {"messages": CHAT}, task=Task("m", input="messages", loss_on="all")) == [
        trl(tokenizer.hf, {"messages": CHAT})
    ]
    with pytest.raises(ConfigError, match=r"does not mark the assistant's turns with \{% generation %\}"):
        ours(tokenizer, {"messages": CHAT}, task=Task("m", input="messages", loss_on="assistant"))


def test_an_answer_without_a_closing_token_gets_the_end_token(tok):
    ((ids, targets),) = ours(tok(OPEN), {"messages": CHAT})
    assert (ids[-1], targets[-1]) == (tiny.EOS, len(ids) - 1)
    unmarked = MARKED.replace("</s>{% endgen", "{% endgen").replace("{{ '\\n' }}", "")
    ((ids, targets),) = ours(tok(unmarked), {"messages": CHAT})
    assert (ids[-1], targets[-1]) == (tiny.EOS, len(ids) - 1)


def test_tools_and_template_arguments_reach_the_template(tok):
    tokenizer = tok(LAST)
    tool = {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
    row = {"prompt": CHAT[:2], "completion": CHAT[2:3], "chat_template_kwargs": {"shout": True}}
    text = tokenizer.decode([e[0] for e in ours(tokenizer, {**row, "tools": [tool]})], skip_special_tokens=False)
    assert text != tokenizer.decode([e[0] for e in ours(tokenizer, row)], skip_special_tokens=False)
    assert ours(tokenizer, {**row, "tools": json.dumps([tool])}) == ours(tokenizer, {**row, "tools": [tool]})


def test_kinds_of_prompts_mix_and_keep_their_order(tok):
    tokenizer = tok(LAST)
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": CHAT[:2], "completion": CHAT[2:3]},
        {"prompt": "c", "completion": "d"},
    ]
    assert ours(tokenizer, *rows) == [trl(tokenizer.hf, row) for row in rows]


def test_tables_and_documents(tok):
    tokenizer = tok()
    rows = [{"triples": [["a", "B", "c"]], "refs": ["x", "y"]}, {"triples": [["d", "E", "f"]], "ref": "z"}]
    encode = tokenizer.hf.backend_tokenizer.encode
    prompts = [encode(" a : b : c </s>").ids] * 2 + [encode(" d : e : f </s>").ids]
    targets = [encode(f" {r} </s>", add_special_tokens=False).ids for r in "xyz"]
    assert [ids for ids, _ in ours(tokenizer, *rows)] == [p + t for p, t in zip(prompts, targets, strict=True)]
    assert [len(t) for _, t in ours(tokenizer, *rows)] == [4, 4, 4]
    row = {"document": "long", "summary": "short", "title": "not read"}
    assert ours(tokenizer, row)[0][0] == encode("long\nshort</s>").ids
    assert ours(tokenizer, row, task="xsum")[0][0] == encode("long</s>short</s>").ids


def test_token_ids_equal_those_of_li_and_liang():
    """Token ids of E2E and WebNLG, with a single space before the begin and the end token."""
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(tokenizer_object=gpt2(), bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    tokenizer = Tokenizer.from_hf(hf)
    row = {"mr": "name[Alimentum], area[city centre], familyFriendly[no]", "ref": "There is ."}
    (example,) = encode_examples(tokenizer, 50257, [row], TASKS["e2e"])
    before = [1438, 1058, 978, 3681, 388, 930, 1989, 1058, 1748, 7372, 930, 1641, 8030, 1058, 645, 220, 50256]
    assert example.ids.tolist() == [*before, 1318, 318, 764, 220, 50256]
    assert example.targets.tolist() == list(range(17, 22))
    (example,) = encode_examples(tokenizer, 50257, [{"mr": row["mr"], "ref": "There is . "}], TASKS["e2e"])
    assert example.ids.tolist()[-4:] == [764, 220, 220, 50256]
    (example,) = encode_examples(tokenizer, 50257, [{"triples": [["A_B", "p", "o"]], "ref": "x"}], TASKS["webnlg"])
    assert example.ids.tolist()[:2] == [220, 930]


# ---- input_ids ----


@pytest.mark.parametrize(
    ("ids", "labels", "kept", "targets"),
    [
        ([5, 6, 7], [-100, 6, 7], 3, [1, 2]),
        ([5, 6, 7], [5, 6, 7], 3, [1, 2]),
        ([5, 6, 7, 8], [-100, 6, -100, 8], 4, [1, 3]),
        ([5, 6, 7, 8, 9], [-100, 6, -100, 8, -100], 4, [1, 3]),
        (np.array([5, 6]), np.array([-100, 6], np.int16), 2, [1]),
    ],
)
def test_labels_may_be_anywhere(ids, labels, kept, targets):
    (got,) = encode_examples(None, tiny.VOCAB, [{"input_ids": ids, "labels": labels}], Task("input_ids"))
    assert (got.ids.tolist(), got.targets.tolist()) == (list(ids[:kept]), targets)


def random_rows(seed: int, count: int) -> list[dict[str, list[int]]]:
    g = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        ids = g.integers(3, tiny.VOCAB, int(g.integers(3, 14)))
        mask = g.random(len(ids)) < 0.4
        mask[g.integers(1, len(ids))] = True
        out.append({"input_ids": ids.tolist(), "labels": np.where(mask, ids, -100).tolist()})
    return out


@given(st.integers(0, 2**32), st.integers(1, 7), st.integers(5, 60))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_micro_batches_predict_every_target_from_the_token_before_it(seed, count, budget):
    rows = random_rows(seed, count)
    with load(tiny.make("gpt2")) as model:
        examples = tokenize_rows(model, {"a": rows, "b": rows[::-1]}, TokenizeOptions(Task("input_ids"), 160))
    chosen = np.random.default_rng(seed).permutation(2 * count)
    prefix = np.sort((chosen >= count).astype(np.int32))
    chosen = chosen[np.argsort(chosen >= count, kind="stable")]
    expected = []
    for x in chosen:
        row = (rows + rows[::-1])[x]
        expected += [
            (int(x >= count), *row["input_ids"][: i + 1])
            for i, label in enumerate(row["labels"])
            if i and label != -100
        ]
    got = []
    for m in micro_batches(
        examples, chosen, prefix, token_budget=budget, sequence_sum=False, device=torch.device("cpu")
    ):
        first = np.concatenate([[0], np.cumsum(m.lengths)])
        assert first[-1] == len(m.ids)
        for at, target, user in zip(m.logits_at.tolist(), m.targets.tolist(), m.target_prefix.tolist(), strict=True):
            s = int(np.searchsorted(first, at, side="right")) - 1
            assert m.prefix[s] == user
            got.append((user, *m.ids[first[s] : at + 1].tolist(), target))
    assert sorted(got) == sorted(expected)


def test_the_loss_over_scattered_labels_equals_peft():
    rows = random_rows(0, 12)
    hf = tiny.make("llama", dtype=torch.float64)
    table = tiny.peft_table(hf, 4, seed=1).double()
    with load(tiny.make("llama", dtype=torch.float64)) as model:
        prefix = Prefix(layout.from_table(table, *tiny.shapes(hf)), pos_start=4, base=model.fingerprint)
        got = train(
            model,
            rows,
            init=prefix,
            reparameterization="none",
            max_steps=1,
            learning_rate=1e-15,
            eval_data=rows,
            token_budget=30,
        )
    peft, total, count = tiny.with_prefix(hf, table), 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = peft(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum").item()
            count += sum(x != -100 for x in row["labels"][1:])
    assert abs(got.training["metrics"]["eval_loss"] - total / count) < 1e-9


# ---- overflow ----


def example(length: int, *targets: int, has_no_prompt: bool = False) -> Example:
    return Example(np.arange(length, dtype=np.int32), np.array(targets), 0, has_no_prompt)


@pytest.mark.parametrize(
    ("made", "limit", "ids", "targets"),
    [
        (example(6, 4, 5), 6, [0, 1, 2, 3, 4, 5], [4, 5]),
        (example(6, 4, 5), 3, [3, 4, 5], [1, 2]),
        (example(6, 4, 5), 2, None, None),
        (example(6, 3, 5), 4, [2, 3, 4, 5], [1, 3]),
        (example(6, 3, 5), 3, None, None),
        (example(6, 1, 2, 3, 4, 5), 3, None, None),
        (example(6, 1, 2, 3, 4, 5, has_no_prompt=True), 3, [0, 1, 2], [1, 2]),
        (example(6, 4, 5, has_no_prompt=True), 3, None, None),
    ],
)
def test_truncation_shortens_the_prompt_first(made, limit, ids, targets):
    kept = apply_overflow(made, limit, "truncate")
    assert (ids, targets) == ((None, None) if kept is None else (kept.ids.tolist(), kept.targets.tolist()))
    assert apply_overflow(made, limit, "skip") is (made if limit >= 6 else None)


def test_errors_name_the_line_of_a_row_that_is_too_long(tmp_path, folder):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "b"}\n\n' + json.dumps({"prompt": "a" * 30, "completion": "b"}) + "\n",
        encoding="utf8",
    )
    with (
        load(folder, dtype="float32") as model,
        pytest.raises(DataError, match=r"prefix 'x', .*a\.jsonl:3: 32 tokens, at most 20 fit") as caught,
    ):
        tokenize_rows(model, {"x": read_rows(path)}, TokenizeOptions(TASKS["prompt"], 20))
    assert (caught.value.path, caught.value.line) == (str(path), 3)


# ---- requests ----


def request_ids(base, tokenizer: Tokenizer, *batch, prefixes=None) -> list[list[int]]:
    held, base.tokenizer = base.tokenizer, tokenizer
    try:
        return [r.ids.tolist() for r in make_requests(base, batch, prefixes, GenerationParams(), 150)]
    finally:
        base.tokenizer = held


def test_requests_are_the_prompts_of_training(base, tok):
    tokenizer = tok(LAST)
    training = [
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": CHAT[:2], "completion": CHAT[2:3]},
        {"messages": CHAT},
        {"document": "long", "summary": "short"},
        {"triples": [("a", "B", "c")], "ref": "x"},
        {"table": {"a": "b"}, "ref": "x"},
        {"mr": "name[a]", "ref": "x"},
    ]
    requests = [{"messages": CHAT[:-1], "id": 1} if "messages" in row else row for row in training]
    for row, ids in zip(training, request_ids(base, tokenizer, *requests), strict=True):
        ((whole, targets),) = ours(tokenizer, row)
        assert ids == whole[: targets[0]]
    assert request_ids(base, tokenizer, {"text": "Once"}) == [tokenizer.hf("Once")["input_ids"]]
    assert request_ids(base, tokenizer, {"messages": CHAT[:-1]}) == [
        tokenizer.hf.apply_chat_template(CHAT[:-1], add_generation_prompt=True)["input_ids"]
    ]


def test_the_task_of_a_prefix_reads_its_own_format_only(base, tok, make_prefix):
    own = Task("question", prompt="Q: {src}\nA:", target=" {ref}")
    prefix = make_prefix(task=own.spec())
    tokenizer = tok(LAST)
    ids = request_ids(base, tokenizer, {"prompt": "x"}, {"document": "x"}, "x", prefixes=prefix)
    assert ids == [tokenizer.hf(t)["input_ids"] for t in ("Q: x\nA:", "x\n", "x")]
    assert request_task(TASKS["e2e"], {"prompt": "x"}).strip
    assert not request_task(TASKS["messages"], {"prompt": "x"}).strip


REFUSED = {
    "two inputs": ({"mr": "name[a]", "table": {"a": "b"}}, "got mr and table; remove all but one"),
    "an input beside ids": ({"input_ids": [3], "prompt": "x"}, "got prompt and input_ids"),
    "an answered conversation": ({"messages": CHAT}, "expected a request, which ends before the answer"),
    "no messages": ({"messages": []}, "expected a list of messages"),
    "a message without role": ({"messages": [{"content": "x"}]}, "messages[0].role: expected a string, got None"),
    "a template that refuses": ({"messages": say("s:x")}, "the chat template refuses the conversation: no system"),
    "half a surrogate": ({"prompt": "a\ud800"}, "half a surrogate pair at character 1"),
    "an unknown key": ({"text": "x", "txet": "y"}, "unknown key 'txet'"),
}


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_errors_number_the_wrong_request(base, tok, row, message):
    tokenizer = tok("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LAST)
    with pytest.raises(RequestError) as caught:
        request_ids(base, tokenizer, "x", row)
    assert caught.value.index == 1
    assert message in str(caught.value)


def test_messages_without_a_chat_template_are_refused(base, tok):
    with pytest.raises(RequestError, match=r"request 1: this tokenizer has no chat template"):
        request_ids(base, tok(None), "x", {"messages": CHAT[:-1]})


# ---- bad rows ----

FINE = {"prompt": "a", "completion": "b"}
MR = "name[a]"
BAD = {
    "two inputs": (None, {"mr": MR, "table": {"a": "b"}, "ref": "x"}, "got mr and table"),
    "two inputs of a task": ("e2e", {"mr": MR, "triples": [["a", "b", "c"]], "ref": "x"}, "got mr and triples"),
    "two formats, no task": (None, {"prompt": "a", "completion": "b", "text": "c"}, "got prompt and text"),
    "two targets": ("e2e", {"mr": MR, "ref": "x", "refs": ["y"]}, "got ref and refs"),
    "no input": ("prompt", {"completion": "b"}, "expected one of the keys prompt, got the keys ['completion']"),
    "an input that is None": ("text", {"text": None}, "text: expected a string, got None"),
    "no completion": ("prompt", {"prompt": "a"}, "completion: expected a string, got None"),
    "a list as completion": ("prompt", {"prompt": "a", "completion": say("a:b")}, "completion: expected a string"),
    "a string as completion": ("prompt", {"prompt": say("u:a"), "completion": "b"}, "both strings or both lists"),
    "a number": ("prompt", {"prompt": 5, "completion": "b"}, "prompt: expected a string, got 5"),
    "half a surrogate": ("prompt", {"prompt": "a", "completion": "\udc00"}, "half a surrogate pair"),
    "half a surrogate in a table": ("table", {"table": {"a": "\udc00"}, "ref": "x"}, "half a surrogate pair"),
    "half a surrogate in a message": ("messages", {"messages": say("u:a", "a:\udc00")}, "half a surrogate pair"),
    "no summary": ("summary", {"document": "a"}, "summary: expected a string"),
    "a pair among triples": (
        "dart",
        {"triples": [["a", "b", "c"], ["a", "b"]], "ref": "x"},
        "a triple of subject, property and object",
    ),
    "no triples": ("webnlg", {"triples": [], "ref": "x"}, "there are no triples"),
    "triples for a template": ("table", {"triples": [["a", "b", "c"]], "ref": "x"}, "the table is triples"),
    "an empty meaning": ("e2e", {"mr": "", "ref": "x"}, "the table is empty"),
    "no references": ("dart", {"triples": [["a", "b", "c"]], "refs": []}, "refs: expected a list of strings"),
    "a number among references": (
        "dart",
        {"triples": [["a", "b", "c"]], "refs": ["x", 5]},
        "refs[1]: expected a string, got 5",
    ),
    "a message that is none": ("messages", {"messages": ["x"]}, "messages[0]: expected a message"),
    "a message without content": (
        "messages",
        {"messages": [{"role": "user"}]},
        "messages[0].content: expected a string",
    ),
    "a conversation without answer": (
        "messages",
        {"messages": say("u:a")},
        "expected messages that end with the assistant's",
    ),
    "nothing but an answer": ("messages", {"messages": say("a:b")}, "expected messages that end with the assistant's"),
    "bad tools": ("messages", {"messages": CHAT, "tools": 5}, "expected tools as a list"),
    "broken tools": ("messages", {"messages": CHAT, "tools": "["}, "tools: expected a list, or one as JSON"),
    "no ids": (None, {"input_ids": [], "labels": []}, "expected a list of token ids below"),
    "no labels": (None, {"input_ids": [3, 4]}, "expected input_ids and one of the keys labels"),
    "other labels": (None, {"input_ids": [3, 4], "labels": [-100, 5]}, "got 5 for 4 at 1"),
    "shifted labels": (
        None,
        {"input_ids": [3, 4, 5], "labels": [4, 5, -100]},
        "the shift to the next token is made here",
    ),
    "no target": (None, {"input_ids": [3, 4], "labels": [3, -100]}, "at least one target after the first token"),
    "ragged ids": (
        None,
        {"input_ids": [[3], [4, 5]], "labels": [3, 4]},
        "input_ids: expected a list of token ids below",
    ),
    "huge ids": (None, {"input_ids": [2**70], "labels": [3]}, "expected a list of token ids below"),
    "fractions": (None, {"input_ids": [3.0, 4.0], "labels": [3, 4]}, "expected a list of token ids below"),
}


@pytest.mark.parametrize(("task", "row", "message"), BAD.values(), ids=BAD)
def test_errors_name_the_line_of_a_wrong_row(tok, task, row, message):
    tokenizer = tok(LAST)
    rows = [FileRow(row, "a.jsonl", 9)]
    with pytest.raises(DataError) as caught:
        list(
            encode_examples(
                tokenizer, tiny.VOCAB, rows, Task("input_ids") if "input_ids" in row else find_task(task, rows[0])
            )
        )
    assert str(caught.value).startswith("a.jsonl:9: ")
    assert message in str(caught.value)
    assert (caught.value.path, caught.value.line) == ("a.jsonl", 9)


def test_errors_name_the_wrong_table_of_a_batch(tok):
    tables = [FileRow({"table": {"a": "b"}, "ref": "x"}, "a.jsonl", 3 * i) for i in range(1, 9)]
    tables[5]["table"] = {"a": 5}
    with pytest.raises(DataError, match=r"^a\.jsonl:18: expected text as the value of key"):
        list(encode_examples(tok(), tiny.VOCAB, tables, TASKS["table"]))


@pytest.mark.parametrize(
    "bad",
    [{"prompt": 5, "completion": "x"}, {"prompt": "a"}, {"prompt": CHAT[:2], "completion": []}],
    ids=["prompt", "target", "chat"],
)
def test_errors_number_the_wrong_row_of_mixed_prompts(tok, bad):
    rows = [{"prompt": CHAT[:2], "completion": CHAT[2:3]}, {"prompt": "a", "completion": "b"}, bad]
    with pytest.raises(DataError, match=r"^row 2: ") as caught:
        ours(tok(LAST), *rows)
    assert caught.value.line == 3


def test_other_columns_are_ignored(tok):
    row = {
        "prompt": "a",
        "completion": "b",
        "text": "c",
        "source": 5,
        "id": 7,
        "prefix": "ann",
        "params": {},
        "messages": None,
    }
    assert ours(tok(), row, task="prompt") == ours(tok(), {"prompt": "a", "completion": "b"})


def test_columns_with_none_count_as_absent(base, tok):
    """A table of mixed rows holds None in the columns that a row does not use."""
    empty = dict.fromkeys(
        (
            "prompt",
            "completion",
            "messages",
            "text",
            "mr",
            "table",
            "triples",
            "document",
            "summary",
            "ref",
            "refs",
            "tools",
        )
    )
    rows = [{"text": "a"}, {"prompt": "a", "completion": "b"}, {"messages": CHAT}, {"mr": MR, "ref": "x"}]
    for row in rows:
        assert ours(tok(LAST), {**empty, **row}) == ours(tok(LAST), row)
    assert request_ids(base, tok(LAST), {**empty, "text": "a"}) == request_ids(base, tok(LAST), {"text": "a"})


def test_a_chat_template_that_changes_the_context_is_refused(tok):
    tokenizer = tok(LAST.replace("<a>{% endif %}", "<a>think{% endif %}"))
    with pytest.raises(DataError, match="row 0: the chat template writes the conversation up to the answer as"):
        ours(tokenizer, {"messages": CHAT})


@pytest.mark.parametrize(
    "field",
    [{"input": "tables"}, {"loss_on": "first"}, {"input": "table"}, {"linearizer": "{}", "input": "text"}],
    ids=str,
)
def test_wrong_tasks_are_refused(field):
    with pytest.raises(ConfigError, match="expected"):
        Task("x", **field)
    with pytest.raises(ConfigError, match="expected"):
        Task.from_spec({"name": "x", **field})


def test_specs_without_new_fields_are_read():
    spec = TASKS["e2e"].spec()
    for name in ("input", "loss_on"):
        del spec[name]
    assert Task.from_spec(spec) == TASKS["e2e"]


@pytest.mark.parametrize(
    "module", [prefixfast.data.builtin_tasks, prefixfast.data.rows, prefixfast.data.task], ids=lambda m: m.__name__
)
def test_doctests(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


# ---- end to end ----


def test_training_on_conversations_and_generating(base, tok, tmp_path):
    held, base.tokenizer = base.tokenizer, tok(MARKED)
    try:
        prefix = train(base, [{"messages": CHAT}] * 4, prefix_length=3, max_steps=2, output_dir=tmp_path / "p")
        again = Prefix.from_pretrained(tmp_path / "p")
        (request,) = make_requests(base, [{"messages": CHAT[:-1]}], again, GenerationParams(), 150)
    finally:
        base.tokenizer = held
    assert request.task == TASKS["messages"]
    assert np.isfinite(prefix.training["metrics"]["loss"])


def spaced(normalizer, pre_tokenizer=None) -> Tokenizer:
    """A tokenizer of SentencePiece's kind for words of the letters a and b."""
    vocab = {c: i for i, c in enumerate(["?", "▁", "a", "b", "-", ">", "▁a", "▁b", "▁▁", "->", "▁->"])}
    merges = [("▁", "a"), ("▁", "b"), ("▁", "▁"), ("-", ">"), ("▁", "->")]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, unk_token="?"))
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    return Tokenizer.from_hf(transformers.PreTrainedTokenizerFast(tokenizer_object=made))


def llama2() -> Tokenizer:
    n = tokenizers.normalizers
    return spaced(n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")]))


@pytest.mark.parametrize("name", ["Llama 2", "always", "first", "never"])
def test_one_space_stands_between_prompt_and_target_also_where_the_tokenizer_writes_one(name):
    tokenizer = llama2() if name == "Llama 2" else spaced(None, tokenizers.pre_tokenizers.Metaspace("▁", name))
    task = column_task(prompt="{x} ->", target="y")
    (example,) = encode_examples(tokenizer, 100, [{"x": "b", "y": "a b"}], task)
    tokens = tokenizer.hf.convert_ids_to_tokens(example.ids.tolist())
    assert tokens == ["b" if name == "never" else "▁b", "▁->", "▁a", "▁b"]
    two = {"x": "b", "y": " a"}
    (example,) = encode_examples(tokenizer, 100, [two], task)
    assert tokenizer.hf.convert_ids_to_tokens(example.ids.tolist())[-2:] == ["▁", "▁a"]
    (without,) = tokenizer.encode_targets(["a"])
    assert tokenizer.hf.convert_ids_to_tokens(without.tolist()) == ["a" if name == "never" else "▁a"]
    assert [len(ids) for ids in tokenizer.encode_targets(["", " "])] == [0, 1]
