"""Requests of a prefix that reads a user's own columns: rows, strings, other formats, reserved keys, composition."""

from __future__ import annotations

import numpy as np
import pytest

from prefixfast import Engine, GenerationParams, PrefixStore, RequestError, generate, score
from prefixfast.data import TASKS, column_task
from prefixfast.engine.make_requests import make_good_requests, make_requests

MILL = {"product_name": "Mill", "price": 12.5}
OWN = column_task(prompt="{product_name}, {price} ->", target="description")
PROMPT = "Mill, 12.5 ->"
FEW = {"max_new_tokens": 4}


@pytest.fixture(scope="module")
def mill(make_prefix):
    return make_prefix(1, task=OWN.spec())


@pytest.fixture
def requests(base):
    """Function that makes the requests of a batch."""
    return lambda batch, prefixes: make_requests(base, batch, prefixes, GenerationParams(), 100)


def ids(base, text):
    return base.require_tokenizer().encode([text])[0].tolist()


READ = {
    "its columns": (MILL, PROMPT),
    "a target is not read": (MILL | {"description": None}, PROMPT),
    "further columns": (MILL | {"colour": {"a": 1}, "prompt": "x", "text": "y", "messages": 3}, PROMPT),
    "ids in another column": (MILL | {"input_ids": "none", "labels": "x"}, PROMPT),
    "another case": ({" Product_Name": "Mill", "PRICE": "12.5"}, PROMPT),
    "a string": ("{product_name}", "{product_name}"),
    "a row with a prompt": ({"prompt": "Fan ->"}, "Fan ->"),
    "a row with a text": ({"text": "Fan ->", "id": 3}, "Fan ->"),
    "a row of another task": ({"document": "Fan"}, TASKS["summary"].prompts([{"document": "Fan"}], None)[0]),
}


@pytest.mark.parametrize(("item", "text"), READ.values(), ids=READ)
def test_a_request_is_read_by_the_mapping_of_its_prefix(base, requests, mill, item, text):
    (request,) = requests([item], mill)
    assert request.ids.tolist() == ids(base, text)


@pytest.mark.parametrize("item", [MILL, "Mill ->", {"prompt": "Mill ->"}, [3, 4]])
def test_the_text_loses_the_space_that_joins_it_to_the_prompt(requests, mill, item):
    assert requests([item], mill)[0].task.clean(" A mill.\n") == "A mill."


def test_ids_are_used_unchanged(requests, mill):
    for item in ([3, 4, 5], {"input_ids": [3, 4, 5]}):
        assert requests([item], mill)[0].ids.tolist() == [3, 4, 5]


REFUSED = {
    "a column is missing": ({"product_name": "Mill", "prise": 1}, r"prompt: expected a column 'price'.*'prise'\?"),
    "no value": (MILL | {"price": None}, "prompt: expected a value in column 'price', got none"),
    "no column of the mapping": ({"title": "Mill", "text": "x"}, "prompt: expected a column 'product_name'"),
    "no column of any format": ({"title": "Mill"}, "prompt: expected a column 'product_name', got the columns 'title'"),
    "only the target": ({"description": "x"}, "prompt: expected a column 'product_name'"),
    "an empty row": ({}, "prompt: expected a column 'product_name'"),
    "params of another type": (MILL | {"params": "greedy"}, "params: expected"),
    "a prefix by name": (MILL | {"prefix": "mill"}, "needs prefixes to be a mapping"),
}


@pytest.mark.parametrize(("item", "message"), REFUSED.values(), ids=REFUSED)
def test_a_request_that_the_mapping_cannot_read_is_refused(requests, mill, item, message):
    with pytest.raises(RequestError, match=f"^request 1: .*{message}") as caught:
        requests([MILL, item], mill)
    assert caught.value.index == 1
    good, errors = make_good_requests([item, MILL], mill, requests)
    assert ([r.index for r in good], list(errors)) == ([1], [0])


def test_without_a_mapping_unknown_columns_are_refused(requests, make_prefix):
    for prefix in (None, make_prefix(2), make_prefix(2, task=TASKS["e2e"].spec())):
        with pytest.raises(RequestError, match="request 0: unknown key 'price'"):
            requests([MILL | {"prompt": "x"}], prefix)


def test_a_reserved_key_keeps_its_meaning_unless_the_mapping_reads_it(base, requests, make_prefix, mill):
    row = MILL | {"id": 7, "params": {"max_new_tokens": 3}}
    (request,) = requests([row], mill)
    assert (request.id, request.params.max_new_tokens) == (7, 3)
    named = {"mill": mill, "other": make_prefix(3)}
    (request,) = requests([row | {"prefix": "mill"}], named)
    assert request.prefixes == (mill,)
    reads = make_prefix(4, task=column_task(prompt="{ID}:{prefix}:{params}", target="text").spec())
    row = {"id": 7, "prefix": "ab", "params": "c", "text": "d"}
    (request,) = requests([row], [reads])
    assert request.id is None
    assert request.ids.tolist() == ids(base, "7:ab:c")
    with pytest.raises(RequestError, match="request 0: the prefix reads column 'prefix' as text"):
        requests([row | {"prefix": "reads"}], {"reads": reads})
    (scored,) = score([row], reads, model=base)
    assert scored.id is None


def test_the_last_prefix_of_a_composition_reads_the_row(base, requests, make_prefix, mill):
    fan = make_prefix(5, task=column_task(table=["price", "product_name"], target="text").spec())
    plain = make_prefix(6)
    expected = {(mill, fan): "price : 12.5 | product_name : Mill\n", (fan, mill): PROMPT, (mill, plain): PROMPT}
    for prefixes, text in expected.items():
        assert requests([MILL], [list(prefixes)])[0].ids.tolist() == ids(base, text)
    assert mill.concat(plain, mill, fan).task == fan.task
    with pytest.raises(RequestError, match="request 0: prompt: expected a column 'product_name'"):
        requests([{"name": "x"}], [[fan, mill]])


def test_generate_stream_submit_and_a_store_read_the_same_rows(base, mill, tmp_path):
    store = PrefixStore(tmp_path / "store")
    store.put("mill", mill)
    row = MILL | {"further": 1}
    (expected,) = generate([PROMPT], mill, model=base, **FEW)
    with Engine(base, store=store) as engine:
        found = [
            *engine.generate([row], "mill", **FEW),
            *engine.generate([row | {"prefix": "mill"}], **FEW),
            engine.submit(row, "mill", **FEW).result(timeout=60),
        ]
        assert "".join(engine.stream(row, "mill", **FEW)) == expected.text
    assert [g.token_ids for g in found] == [expected.token_ids] * 3
    assert expected.text == expected.text.strip()


def test_score_and_inspect_read_the_target_as_training_does(base, mill):
    row = MILL | {"Description": "A mill."}
    (scored,) = score([row], mill, model=base)
    (given,) = score([PROMPT], mill, targets=[" A mill."], model=base)
    assert scored.logprob == pytest.approx(given.logprob, abs=1e-4)
    assert scored.token_ids == given.token_ids
    with pytest.raises(RequestError, match="request 0: target: expected a column 'description'"):
        score([MILL], mill, model=base)
    with_target, without = (mill.inspect(base, [r]).divergence[0] for r in (row, MILL))
    assert len(with_target) == len(scored.token_ids) + 1, "the end token follows"
    assert len(without) == len(ids(base, PROMPT))
    for same in ({"input_ids": ids(base, PROMPT)}, PROMPT):
        np.testing.assert_allclose(mill.inspect(base, [same]).divergence[0], without, atol=1e-5)
    with pytest.raises(RequestError, match="prompt 0: prompt: expected a column 'product_name'"):
        mill.inspect(base, [{"name": "x"}])
