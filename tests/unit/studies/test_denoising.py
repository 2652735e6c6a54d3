"""Pretraining by denoising: corpus, noise, and a run that an interrupt cuts."""

import gzip
import json
import math
from itertools import pairwise
from random import Random

import pytest
import torch

from prefixfast.errors import ConfigError, DataError
from prefixfast.studies.denoising.base import SPECIAL, Shape, new_model, train_tokenizer
from prefixfast.studies.denoising.corpus import FILES, HELD_OUT, Corpus, Source, read_sources, sentences, source
from prefixfast.studies.denoising.noise import SHARE, infill, shuffle
from prefixfast.studies.denoising.pretrain import CHECKPOINT, LOG, Pretraining, Schedule, denoising_pairs, padded
from shared import folder

MASK = 4
SHAPE = Shape(vocab=300, width=16, layers=1, heads=2, positions=512)


def test_a_text_is_split_into_sentences():
    assert sentences("We show A.  It is 3.5 high!\nIs it? Yes") == ("We show A.", "It is 3.5 high!", "Is it?", "Yes")


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7, 50, 400])
def test_infilling_keeps_the_rest_in_order_and_masks_its_share(length):
    ids = list(range(10, 10 + length))
    for seed in range(30):
        noisy = infill(Random(seed), ids, MASK)
        kept = [i for i in noisy if i != MASK]
        assert kept == sorted(kept)
        assert length - len(kept) == round(SHARE * length)
        assert (MASK, MASK) not in set(pairwise(noisy))


def test_the_spans_have_a_mean_of_three_tokens_and_some_have_none():
    rng = Random(0)
    spans = []
    for _ in range(300):
        noisy = infill(rng, list(range(10, 210)), MASK)
        edges = [9, *(i for i in noisy if i != MASK), 210]
        at = [n for n, i in enumerate(noisy) if i == MASK]
        before = [([9] + [i for i in noisy[:n] if i != MASK])[-1] for n in at]
        spans += [edges[edges.index(b) + 1] - b - 1 for b in before]
    assert sum(spans) / len(spans) == pytest.approx(3, abs=0.25)
    assert spans.count(0) / len(spans) == pytest.approx(math.exp(-3), abs=0.02)


def test_shuffling_keeps_the_sentences():
    names = [str(i) for i in range(20)]
    assert sorted(shuffle(Random(0), names)) == sorted(names) != shuffle(Random(0), names)


def words(texts):
    return [len(t.split()) for t in texts]


def test_windows_come_from_one_source_by_its_share_and_fit():
    left = Source(3, tuple(sentences(f"a{i} b. c d. e f g h.") for i in range(5)))
    right = Source(1, (("one two three four five six seven eight nine ten",),))
    corpus, rng = Corpus([left, right], words), Random(0)
    found = [corpus.draw(rng, 7) for _ in range(800)]
    of_left = [t for t in found if t[0] != right.texts[0][0]]
    assert len(of_left) / len(found) == pytest.approx(0.75, abs=0.05)
    assert all(sum(words(t)) <= 7 for t in of_left)
    assert all(t == right.texts[0] for t in found if t not in of_left)  # longer than a window: alone
    assert {t[0] for t in of_left} >= {"c d.", "e f g h."}, "windows also begin inside a text"


LONG = "This sentence has more than sixty characters, so that no two abstracts share it"


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def test_files_are_read_by_their_field_and_without_versions_of_held_out_documents(tmp_path):
    for name, field, _ in FILES:
        values = ["x y. z.", "x y. z.", f"A. {LONG} 1.", f"B. {LONG} 2. C."]
        rows = [{field: values}] if field == "refs" else [{field: v, "summary": "secret"} for v in values]
        write_rows(tmp_path / name, rows)
    for name, document in zip(HELD_OUT, (f"Other. {LONG} 1.", "Other. z."), strict=True):
        write_rows(tmp_path / name, [{"document": document}])
    (tmp_path / "own.txt").write_text("mine.\n\nmine too.\n")
    found = read_sources(tmp_path, [tmp_path / "own.txt"])
    kept = (("x y.", "z."), ("B.", f"{LONG} 2.", "C."))
    assert [s.texts for s in found] == [kept] * 3 + [(("mine.",), ("mine too.",))]
    with pytest.raises(DataError, match="--data"):
        read_sources(None)


def test_no_document_or_summary_of_dev_and_test_is_in_the_corpus():
    """Neither whole nor in part, since SciTLDR has versions of the same abstract in two of its parts."""
    data = folder()
    texts = [t for s in read_sources(data) for t in s.texts]
    assert len(texts) > 40_000
    whole, parts = {" ".join(t) for t in texts}, {s for t in texts for s in t}
    for name in HELD_OUT:
        with gzip.open(data / name, "rt", encoding="utf8") as lines:
            rows = [json.loads(line) for line in lines]
        found = {" ".join(t.split()) for r in rows for t in (r["document"], r["summary"], *r.get("summaries", []))}
        assert len(found) > 1200
        assert not found & whole
        assert not {s for t in found for s in sentences(t) if len(s) >= 60} & parts


@pytest.fixture(scope="module")
def material():
    texts = [f"The {a} {b} sees a {c}. It is {a}. Then {b} goes." for a in "xyz" for b in "uvw" for c in "rst"]
    origin = source(1, texts)
    tok = train_tokenizer(texts, SHAPE)
    return tok, Corpus([origin], lambda t: [len(i) for i in tok(t, add_special_tokens=False).input_ids])


def test_the_tokenizer_wraps_texts_and_gives_them_back(material):
    tok, _ = material
    ids = tok("The x sees é.").input_ids
    assert tok.convert_ids_to_tokens([0, 1, 2, 3, 4]) == list(SPECIAL)
    assert (ids[0], ids[-1]) == (tok.bos_token_id, tok.eos_token_id)
    assert tok.decode(ids, skip_special_tokens=True) == "The x sees é."


def test_pairs_are_noise_and_text_and_padding_is_ignored(material):
    tok, corpus = material
    pairs = denoising_pairs(corpus, tok, 600, 0)
    assert pairs(3) == pairs(3) != pairs(4)
    batch = padded(pairs(3), tok.pad_token_id)
    for i, (noisy, text) in enumerate(pairs(3)):
        assert tok.mask_token_id in noisy
        assert tok.mask_token_id not in text
        assert batch["input_ids"][i, : len(noisy)].tolist() == noisy
        assert batch["attention_mask"][i].sum() == len(noisy)
        assert batch["labels"][i].tolist() == text + [-100] * (batch["labels"].shape[1] - len(text))


def training(material, folder, steps=9, **schedule):
    tok, corpus = material
    folder.mkdir(exist_ok=True)
    plan = Schedule(steps, tokens=100, **schedule)
    return Pretraining(new_model(SHAPE, 0), denoising_pairs(corpus, tok, plan.tokens, 0), plan, folder)


def test_a_resumed_run_equals_an_uncut_one_to_the_bit(material, tmp_path):
    whole = training(material, tmp_path / "whole")
    whole.run()
    training(material, tmp_path / "cut").run(until=4)
    rest = training(material, tmp_path / "cut")
    rest.resume()
    assert rest.step == 4
    rest.run()
    assert whole.step == rest.step == 9
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), rest.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    new = new_model(SHAPE, 0)
    assert not torch.equal(new.lm_head.weight, whole.model.lm_head.weight)


def test_time_ends_a_run_and_counts_over_all_calls(material, tmp_path):
    run = training(material, tmp_path, minutes=1e-6)
    run.run()
    assert (run.step, run.seconds > 0) == (1, True)
    again = training(material, tmp_path, minutes=1e-6)
    again.resume()
    again.run()
    assert again.step == 1
    assert again.schedule.rate_at(1, again.seconds) == 0


def test_the_loss_falls_and_is_logged(material, tmp_path):
    run = training(material, tmp_path, steps=100)
    run.run()
    first, last = (json.loads(line) for line in (tmp_path / LOG).read_text().splitlines())
    assert last["loss"] < first["loss"] < math.log(SHAPE.vocab) + 0.1
    assert (tmp_path / CHECKPOINT).exists()


def test_resume_without_a_checkpoint_is_refused(material, tmp_path):
    with pytest.raises(ConfigError, match="checkpoint"):
        training(material, tmp_path).resume()
