"""Rows of encoder-decoder base models: texts of the encoder, labels, truncation, and micro-batches."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MBart50Tokenizer,
    MBartConfig,
    MBartForConditionalGeneration,
    MBartTokenizer,
    NllbTokenizer,
)
from transformers.models.mbart.modeling_mbart import shift_tokens_right as wrapped

import tiny
from prefixfast import DataError, RequestError
from prefixfast.data.builtin_tasks import TASKS, find_task
from prefixfast.data.columns import column_task
from prefixfast.data.encode import check_examples, encode_examples, encode_prompts, encode_target, vocabulary_error
from prefixfast.data.task import Task
from prefixfast.model.tokenizer import Tokenizer
from prefixfast.training.batching import micro_batches
from prefixfast.training.dataset import _digest
from prefixfast.training.examples import TokenizeOptions, concat_examples, tokenize_rows
from prefixfast.training.text_limits import TextLimits, kept

START, PAD, EOS = 2, 0, 2


@dataclass(frozen=True)
class Decoder:
    """Tokens of a decoder as `Model.seq2seq` has them."""

    wraps: bool = False
    vocab_size: int = tiny.VOCAB
    encoder_positions: int = 160
    pad: int = PAD
    skips_pads: bool = False

    def decoder_ids(self, labels):
        first = labels[-1] if self.wraps else START
        return np.array([first, *np.where(labels == -100, self.pad, labels)], np.int32)


@pytest.fixture(scope="module")
def tok(tokenizer):
    """Tokenizer that puts ``<s>`` before a text and ``</s>`` behind it, as BART's."""
    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return Tokenizer.from_hf(made)


def fake(tokenizer=None, **decoder):
    return SimpleNamespace(
        seq2seq=Decoder(**decoder), vocab_size=tiny.VOCAB, tokenizer=tokenizer, require_tokenizer=lambda: tokenizer
    )


def encoded(tokenizer, *rows, task=None, decoder=Decoder(), **options):
    found = encode_examples(tokenizer, tiny.VOCAB, list(rows), find_task(task, rows[0]), decoder=decoder, **options)
    return [(e.encoder_ids.tolist(), e.ids.tolist(), e.targets.tolist()) for e in found]


# ---- texts ----


@pytest.mark.parametrize(
    ("row", "task", "source", "target"),
    [
        ({"prompt": " a b ", "completion": " c "}, None, " a b ", " c "),
        ({"document": " a \n", "summary": " c\n"}, None, "a", "c"),
        ({"document": "a", "summary": "c"}, "xsum", "a", "c"),
        ({"instruction": "a", "output": "c"}, None, "a", "c"),
        ({"mr": "name[X]", "ref": "It is X ."}, "e2e", "name : X", "It is X ."),
        ({"x": "a ", "y": "c"}, column_task(prompt="{x}->", target="{y}"), "a ->", "c"),
    ],
)
def test_the_encoder_reads_the_prompt_and_the_decoder_writes_the_target(tok, row, task, source, target):
    (got,) = encoded(tok, row, task=task)
    labels = tok.hf(text_target=target).input_ids
    assert got == (tok.hf(source).input_ids, [START, *labels], list(range(1, len(labels) + 1)))
    (prompt,) = encode_prompts(fake(tok), [row], [find_task(task, row)])
    assert prompt.tolist() == got[0]
    assert encode_target(fake(tok), target, 0).tolist() == labels[:-1]


def test_a_row_with_several_references_is_an_example_for_each(tok):
    found = encoded(tok, {"document": "a", "refs": ["b", "c d"]}, {"document": "e", "summary": "f"}, task="summary")
    assert [tok.decode([i])[0] for _, i, _ in found] == ["b", "c d", "f"]
    assert [tok.decode([e])[0] for e, _, _ in found] == ["a", "a", "e"]


def test_an_end_token_that_the_tokenizer_does_not_add_is_appended(tok, tokenizer):
    plain = Tokenizer.from_hf(tokenizer)
    row = {"prompt": "a", "completion": "b"}
    assert encoded(plain, row)[0][1][-1] == EOS
    assert encoded(plain, row, append_eos=False)[0][1][-1] != EOS
    assert encoded(tok, row)[0][1].count(EOS) == 2  # start and end
    assert encoded(tok, row, append_eos=False)[0][1] == encoded(tok, row)[0][1][:-1]


def test_targets_are_tokenized_in_the_language_of_targets():
    made = NllbTokenizer(
        vocab={w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b", "eng_Latn", "deu_Latn"])},
        merges=[],
        src_lang="eng_Latn",
        tgt_lang="deu_Latn",
    )
    ours, row = Tokenizer.from_hf(made), {"prompt": "a", "completion": "b"}
    for languages in (("eng_Latn", "deu_Latn"), ("deu_Latn", "eng_Latn")):
        made.src_lang, made.tgt_lang = languages
        ((source, ids, _),) = encoded(ours, row)
        first, second = made.convert_tokens_to_ids(list(languages))
        assert source == made("a").input_ids
        assert first in source
        assert second not in source
        assert ids[1:] == made(text_target="b").input_ids
        assert second in ids
        assert first not in ids


@pytest.mark.parametrize("kind", [MBartTokenizer, MBart50Tokenizer])
def test_language_and_end_tokens_are_those_of_mbarts_tokenizers(kind):
    """A text of mBART ends with the end token and the language, and one of mBART-50 stands between the two."""
    languages = ["en_XX", "de_DE"]
    words = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", "\u2581a", "\u2581b", "c", *languages, "<mask>"]
    made = kind(vocab=[(word, -float(i > 3)) for i, word in enumerate(words)])
    ours, end = Tokenizer.from_hf(made), made.eos_token_id
    for made.src_lang, made.tgt_lang in (languages, languages[::-1]):
        expected = made("ac b", text_target="b c")
        decoder = Decoder(wraps=True, vocab_size=len(made), pad=made.pad_token_id)
        ((source, ids, targets),) = encoded(ours, {"prompt": "ac b", "completion": "b c"}, decoder=decoder)
        assert source == expected["input_ids"]
        assert ids[1:] == expected["labels"]
        assert ids[:-1] == wrapped(torch.tensor([ids[1:]]), made.pad_token_id)[0].tolist()
        assert targets == list(range(1, len(ids)))
        read, written = made.convert_tokens_to_ids([made.src_lang, made.tgt_lang])
        if kind is MBartTokenizer:
            assert (source[-2:], ids[0], ids[-2:]) == ([end, read], written, [end, written])
        else:
            assert (source[0], source[-1], ids[:2], ids[-1]) == (read, end, [end, written], end)
        assert made.unk_token_id not in source + ids


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"text": "a"}, "text"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "prompt",
        ),
    ],
)
def test_conversations_and_whole_texts_are_refused_by_name(tok, row, task):
    with pytest.raises(DataError, match="encoder-decoder"):
        encoded(tok, row, task=task)
    with pytest.raises(RequestError, match="encoder-decoder"):
        encode_prompts(fake(tok), [row], [TASKS[task]])


# ---- token ids ----


def test_labels_have_a_length_of_their_own_and_places_without_a_target():
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [9, 4]},
        {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0], "labels": [-100, 9, -100, 0, 3, -100, -100]},
    ]
    for row in rows:
        check_examples([row], Task("input_ids"))
    assert encoded(None, *rows, task="prompt") == [
        ([5, 6, 7, 8], [START, 9, 4], [1, 2]),
        ([5, 6], [START, PAD, 9, PAD, 0, 3], [2, 4, 5]),
    ]
    (got,) = encode_prompts(fake(), [rows[1]], [TASKS["prompt"]])
    assert got.tolist() == [5, 6]


@pytest.mark.parametrize("wraps", [False, True])
def test_labels_give_the_losses_of_hugging_face(wraps):
    sizes = {"vocab_size": tiny.VOCAB, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.0}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": START, "max_position_embeddings": 30}
    torch.manual_seed(0)
    make = MBartForConditionalGeneration if wraps else BartForConditionalGeneration
    hf = make((MBartConfig if wraps else BartConfig)(**sizes)).eval()
    for labels in ([9, 4, 7], [-100, 9, 4], [9, 0, 4]) if not wraps else ([9, 4, 7], [9, 3]):
        ((source, ids, targets),) = encoded(
            None, {"input_ids": [5, 6, 7], "labels": labels}, task="prompt", decoder=Decoder(wraps)
        )
        with torch.no_grad():
            given = torch.tensor([labels])
            expected = hf(input_ids=torch.tensor([[5, 6, 7]]), labels=given)
            logits = hf(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([ids[:-1]])).logits[0]
        at = torch.tensor(targets)
        loss = torch.nn.functional.cross_entropy(logits[at - 1], torch.tensor(ids)[at])
        assert torch.allclose(loss, expected.loss, atol=1e-6)
        if wraps:
            assert wrapped(given, PAD)[0].tolist() == ids[:-1]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "labels"),
        ({"input_ids": [5, 6], "labels": [[1]]}, "labels"),
        ({"input_ids": [5, 6], "labels": [tiny.VOCAB]}, "labels"),
        ({"input_ids": [5, 6], "labels": [-1]}, "labels"),
        ({"input_ids": [5, 6], "labels": [5], "completion_mask": [0, 1]}, "completion_mask"),
        ({"input_ids": [5, 6], "labels": [5], "assistant_masks": [0, 1]}, "assistant_masks"),
        ({"input_ids": [5, 6], "completion_mask": [0, 1]}, "completion_mask|labels"),
        ({"input_ids": [5, tiny.VOCAB], "labels": [5]}, "input_ids"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0], "labels": [5]}, "attention_mask"),
    ],
)
def test_wrong_token_ids_are_named(row, match):
    with pytest.raises(DataError, match=match):
        encoded(None, row, task="prompt")


@pytest.mark.parametrize(
    ("row", "is_right"),
    [
        ({"input_ids": [5, PAD], "labels": [6]}, False),
        ({"input_ids": [5, PAD], "attention_mask": [1, 0], "labels": [6, PAD]}, True),
        ({"input_ids": [5], "labels": [6, -100, 7]}, False),
        ({"input_ids": [5], "labels": [6, PAD, 7]}, False),
        ({"input_ids": [5], "labels": [6, 7, -100]}, True),
    ],
)
def test_padding_that_takes_no_position_is_refused_inside_a_text(row, is_right):
    assert encoded(None, row, task="prompt")
    if is_right:
        assert encoded(None, row, task="prompt", decoder=Decoder(skips_pads=True))
        return
    with pytest.raises(DataError, match="padding token 0 inside a text"):
        encoded(None, row, task="prompt", decoder=Decoder(skips_pads=True))
    if PAD in row["input_ids"]:
        with pytest.raises(RequestError, match="padding token 0 inside a text"):
            encode_prompts(fake(skips_pads=True), [row["input_ids"]], [TASKS["prompt"]])


def test_padding_that_takes_no_position_is_refused_in_texts_too(tok):
    decoder = Decoder(skips_pads=True)
    for row in ({"prompt": "a<pad>b", "completion": "c"}, {"prompt": "a", "completion": "b<pad>c"}):
        assert encoded(tok, row, task="prompt")
        with pytest.raises(DataError, match="padding token 0 inside a text"):
            encoded(tok, row, task="prompt", decoder=decoder)


@pytest.mark.parametrize("wrong", [-1, -100, tiny.VOCAB])
def test_only_ids_beyond_the_embedding_get_the_advice_to_enlarge_it(wrong):
    """An id below 0 is no token that a larger embedding has, such as -100 of labels in a place of its own."""
    errors = [vocabulary_error(np.array([5, wrong]), tiny.VOCAB)]
    for row in ({"input_ids": [5, wrong], "labels": [6]}, {"input_ids": [5], "labels": [wrong, 6]}):
        if (wrong, len(row["labels"])) != (-100, 2):  # -100 is a place without a target
            with pytest.raises(DataError) as found:
                encoded(None, row, task="prompt")
            errors.append(str(found.value))
    for error in errors:
        assert str(wrong) in error
        assert ("resize_token_embeddings" in error) == (wrong > 0)


def test_labels_without_a_padding_token_in_the_embedding():
    decoder = Decoder(pad=tiny.VOCAB)
    assert encoded(None, {"input_ids": [5], "labels": [6, 7, -100]}, task="prompt", decoder=decoder)
    with pytest.raises(DataError, match=f"padding token {tiny.VOCAB}, which the base's embedding lacks"):
        encoded(None, {"input_ids": [5], "labels": [6, -100, 7]}, task="prompt", decoder=decoder)


@pytest.mark.parametrize(
    ("given", "is_right"),
    [
        ({"decoder_input_ids": [START, 6, PAD]}, True),
        ({"decoder_input_ids": [START, 6]}, True),
        ({"decoder_input_ids": [START]}, False),
        ({"decoder_input_ids": [4, 6]}, False),
        ({"decoder_input_ids": [[START, 6]]}, False),
        ({"decoder_attention_mask": [1, 1, 0]}, True),
        ({"decoder_attention_mask": [1, 0]}, False),
    ],
)
def test_inputs_of_the_decoder_are_those_of_the_labels(given, is_right):
    row = {"input_ids": [5], "labels": [6, 7, -100], **given}
    if is_right:
        assert encoded(None, row, task="prompt")
        return
    with pytest.raises(DataError, match=rf"{next(iter(given))}: expected the ones that the labels give"):
        encoded(None, row, task="prompt")


def test_a_decoder_only_base_keeps_the_check_of_equal_lengths():
    row = {"input_ids": [5, 6, 7], "labels": [6, 7]}
    check_examples([row], Task("input_ids"))
    with pytest.raises(DataError, match="one integer for each of the 3 input_ids, got 2 labels"):
        list(encode_examples(None, tiny.VOCAB, [row], Task("input_ids")))


# ---- truncation ----


@pytest.mark.parametrize("limit", range(1, 9))
def test_truncation_keeps_the_end_token_as_the_tokenizer_does(tok, limit):
    text, special = "a b c", tok.special_ids
    (ids,) = tok.encode([text])
    if limit > 1:  # transformers cannot cut below its special tokens
        assert ids[kept(ids, limit, special)].tolist() == tok.hf(text, truncation=True, max_length=limit).input_ids
    limits = TextLimits(limit, limit, None, None)
    options = TokenizeOptions(TASKS["prompt"], 1, "truncate", texts=limits)
    found = tokenize_rows(fake(tok), {"x": [{"prompt": text, "completion": text}]}, options)
    assert found.ids.tolist() == [START, *found.encoder_ids.tolist()]
    assert found.encoder_ids.tolist() == ids[kept(ids, limit, special)].tolist()
    assert found.encoder_ids[-1] == EOS
    assert found.num_truncated == (limit < len(ids))


def test_a_cut_target_of_a_wrapping_base_starts_with_its_new_last_label():
    rows = [{"input_ids": [5, 6], "labels": [9, 8, 7, 6]}, {"input_ids": [5, 6], "labels": [-100, -100, 7, 6]}]
    model = fake(wraps=True)
    model.hf = SimpleNamespace(config=SimpleNamespace(eos_token_id=EOS))
    options = TokenizeOptions(Task("input_ids"), 1, "truncate", texts=TextLimits(10, 2, None, None))
    found = tokenize_rows(model, {"x": rows}, options)
    assert (found.ids.tolist(), found.num_skipped, found.num_truncated) == ([8, 9, 8], 1, 1)


@pytest.mark.parametrize(
    ("limits", "match"),
    [
        (TextLimits(4, 99, "raise max_source_length", None), "the source has 5 tokens, at most 4 .*max_source"),
        (TextLimits(99, 2, None, "raise max_target_length"), "target has 3 tokens, at most 2 .*max_target"),
    ],
)
def test_a_text_that_is_too_long_is_an_error_or_left_out(tok, limits, match):
    rows = [{"prompt": "abc", "completion": "d"}, {"prompt": "a", "completion": ""}]
    with pytest.raises(DataError, match=match):
        tokenize_rows(fake(tok), {"x": rows}, TokenizeOptions(TASKS["prompt"], 1, texts=limits))
    left = tokenize_rows(fake(tok), {"x": rows}, TokenizeOptions(TASKS["prompt"], 1, "skip", texts=limits))
    assert (left.num_skipped, len(left.num_targets)) == (1, 1)


# ---- micro-batches ----


@pytest.mark.parametrize("budget", [1, 23, 10**6])
def test_micro_batches_hold_the_encoder_texts_of_their_examples(budget):
    g = np.random.default_rng(0)
    rows = [
        {"input_ids": g.integers(3, 99, int(g.integers(1, 9))).tolist(), "labels": g.integers(3, 99, int(n)).tolist()}
        for n in g.integers(1, 7, 12)
    ]
    options = TokenizeOptions(Task("input_ids"), 1, texts=TextLimits(99, 99, None, None))
    parts = [tokenize_rows(fake(), {n: own}, options) for n, own in (("a", rows[:5]), ("b", rows[5:]))]
    examples = concat_examples(parts)
    chosen, prefix = np.arange(12)[::-1].copy(), np.zeros(12, np.int32)
    got, sizes = [], []
    for m in micro_batches(
        examples, chosen, prefix, token_budget=budget, sequence_sum=False, device=torch.device("cpu")
    ):
        sizes.append(m.num_tokens)
        texts = m.encoder_ids.split(m.encoder_lengths.tolist())
        inputs, start = m.ids.split(m.lengths.tolist()), 0
        for text, ids in zip(texts, inputs, strict=True):
            where = (m.logits_at >= start) & (m.logits_at < start + len(ids))
            got.append({"input_ids": text.tolist(), "labels": m.targets[where].tolist()})
            assert ids.tolist() == [START, *got[-1]["labels"][:-1]]
            start += len(ids)
    assert sorted(got, key=str) == sorted(rows, key=str)
    assert budget == 1 or max(sizes) <= budget
    assert len(sizes) == {1: 12, 10**6: 1}.get(budget, len(sizes))
    assert examples.sizes.sum() == sum(sizes) + 12


def test_the_digest_of_the_data_covers_the_encoder_texts():
    options = TokenizeOptions(Task("input_ids"), 1, texts=TextLimits(99, 99, None, None))
    digests = {
        _digest(tokenize_rows(fake(), {"x": [{"input_ids": ids, "labels": [4, 5]}]}, options))
        for ids in ([5, 6], [5, 7], [5, 6, 7])
    }
    assert len(digests) == 3
