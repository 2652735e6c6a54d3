"""Attachment of encoder-decoder models: what it changes and gives back, what it follows, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from prefixfast import ConfigError
from prefixfast.attention.plan import plain_plan
from prefixfast.attention.seq2seq_plan import plain_seq2seq_plan
from prefixfast.model.attach import attach
from prefixfast.model.load import load
from prefixfast.model.seq2seq import families
from seq2seq import BART, DISTANCES, FAST, POSITIONS, attention_modules, logits_of, make_seq2seq, random_texts

ENCODER, DECODER = random_texts([9, 6])
LONG = random_texts([POSITIONS - 4] * 2)


def state(hf: PreTrainedModel) -> list[Any]:
    """Everything that attaching may touch, by identity."""
    found: list[Any] = []
    for name, module in hf.named_modules():
        own = {key: value for key, value in vars(module).items() if not key.startswith("_") or "prefixfast" in key}
        found.append(
            (name, type(module), [(k, id(v) if callable(v) else v) for k, v in sorted(own.items()) if k != "config"])
        )
    found += [(n, id(p), p.data_ptr(), p.requires_grad, p._version) for n, p in hf.named_parameters()]
    configs = [m.config for m in hf.modules() if isinstance(m, PreTrainedModel)]
    return [*found, [c._attn_implementation for c in configs], hf.training]


def packed(model: Any, encoder: list[torch.Tensor], decoder: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of packed requests without prefixes."""
    lengths = [[len(t) for t in texts] for texts in (decoder, encoder)]
    plan = plain_seq2seq_plan(*lengths, backend=model.backend)
    return list(model.forward(plan, torch.cat(decoder), torch.cat(encoder)).split(lengths[0]))


@pytest.mark.parametrize("name", FAST)
def test_a_closed_model_is_as_it_was(name):
    hf = make_seq2seq(name)
    hf.train()
    before = state(hf)
    with load(hf):
        assert state(hf) != before
    assert state(hf) == before


@pytest.mark.parametrize("name", FAST)
def test_a_refused_model_is_as_it_was(name, monkeypatch):
    hf = make_seq2seq(name)
    before = state(hf)
    hook = attention_modules(hf)["cross"][1]
    monkeypatch.setattr(type(hook), "forward", lambda *_, **__: 1 / 0)
    with pytest.raises((ConfigError, ZeroDivisionError)):
        load(hf)
    monkeypatch.undo()
    assert state(hf) == before


@pytest.mark.parametrize("name", FAST)
def test_a_family_whose_hook_fails_leaves_nothing_behind(name, monkeypatch):
    hf = make_seq2seq(name)
    before, family = state(hf), families.FAMILIES[hf.config.model_type]

    def hook(model: Any, modules: Any, undo: Any) -> Any:
        family.hook(model, modules, undo)
        raise KeyError

    monkeypatch.setattr("prefixfast.model.attach.FAMILIES", {hf.config.model_type: type(family)(hook, lambda _: 1)})
    with pytest.raises(ConfigError, match="its positions are not those of the type"):
        attach(hf)
    assert state(hf) == before


@pytest.mark.parametrize("name", FAST)
@torch.no_grad()
def test_packed_texts_may_be_longer_together_than_the_positions(name):
    own = make_seq2seq(name)
    with load(make_seq2seq(name)) as model:
        tables = [len(e.weights) for e in model.hf.modules() if hasattr(e, "make_weights")]
        got = packed(model, [*LONG, ENCODER], [*LONG, DECODER])
        assert [len(e.weights) for e in model.hf.modules() if hasattr(e, "make_weights")] == tables
        for part, e, d in zip(got, [*LONG, ENCODER], [*LONG, DECODER], strict=True):
            torch.testing.assert_close(part, logits_of(own, e, d, {}, 0), atol=1e-4, rtol=1e-4)
        unbounded = name in DISTANCES
        assert (model.max_positions == 2**31 - 1) is unbounded
        assert unbounded or model.max_positions == model.seq2seq.encoder_positions == POSITIONS


def change_bias(hf: Any) -> None:
    attention_modules(hf)["enc"][0].relative_attention_bias.weight.data.add_(torch.linspace(0, 2, 8)[:, None])


def change_decoder_bias(hf: Any) -> None:
    """A new parameter in the place of the old one."""
    embedding = attention_modules(hf)["self"][0].relative_attention_bias
    embedding.weight = nn.Parameter(embedding.weight.detach().flip(0), requires_grad=False)


def change_logits_bias(hf: Any) -> None:
    hf.final_logits_bias.add_(torch.linspace(0, 3, 99))


def replace_logits_bias(hf: Any) -> None:
    hf.final_logits_bias = torch.linspace(0, 3, 99)[None]


def change_positions(hf: Any) -> None:
    hf.get_decoder().embed_positions.weight.data.mul_(-1)


CHANGES = [
    *(("t5", change) for change in (change_bias, change_decoder_bias)),
    *(("umt5", change) for change in (change_bias, change_decoder_bias)),
    *(("bart", change) for change in (change_logits_bias, replace_logits_bias, change_positions)),
]


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=lambda x: getattr(x, "__name__", x))
@torch.no_grad()
def test_weights_that_change_between_calls_are_followed(name, change):
    hf, own = make_seq2seq(name), make_seq2seq(name)
    with load(hf) as model:
        [before] = packed(model, [ENCODER], [DECODER])
        for each in (hf, own):
            change(each)
        with model.run():
            [after] = packed(model, [ENCODER], [DECODER])
        expected = logits_of(own, ENCODER, DECODER, {}, 0)
        torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)
        assert (before - expected).abs().max() > 1e-2


def test_tokens_that_change_after_load_are_followed():
    hf = make_seq2seq("bart")
    with load(hf) as model:
        hf.resize_token_embeddings(50, mean_resizing=False)
        hf.generation_config.decoder_start_token_id = 7
        with model.run():
            assert (model.seq2seq.vocab_size, model.seq2seq.start) == (50, 7)


@torch.no_grad()
def test_two_models_with_one_config_are_attached_at_once():
    first = make_seq2seq("t5")
    second = type(first)(first.config).eval()
    second.load_state_dict(first.state_dict())
    expected = logits_of(make_seq2seq("t5"), ENCODER, DECODER, {}, 0)
    with load(first) as a, load(second) as b:
        for model in (a, b):
            torch.testing.assert_close(packed(model, [ENCODER], [DECODER])[0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of(second, ENCODER, DECODER, {}, 0), expected, atol=1e-4, rtol=1e-4)


# ---- refused ----


def without_start() -> Any:
    return make_seq2seq("bart", decoder_start_token_id=None)


def without_head() -> Any:
    return transformers.BartModel(transformers.BartConfig(**BART)).eval()


def with_a_hook_on_the_head() -> Any:
    hf = make_seq2seq("bart")
    hf.lm_head.register_forward_hook(lambda _, __, out: out * 2)
    return hf


def with_other_rows() -> Any:
    """Its encoder has rows of 32 numbers, and its decoder of 16."""
    hf = make_seq2seq("bart")
    for module in attention_modules(hf)["self"]:
        module.num_heads = 2
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(module, name, nn.Linear(32, 16))
        module.out_proj = nn.Linear(16, 32)
    return hf


def with_a_further_attention() -> Any:
    hf = make_seq2seq("bart")
    hf.model.decoder.layers[1].third = attention_modules(make_seq2seq("bart"))["cross"][0]
    return hf


def named(own: str, kind: str) -> Any:
    hf = make_seq2seq(own)
    hf.config.model_type = kind
    return hf


REASONS = [
    (lambda: make_seq2seq("bart").get_encoder(), "it has no output layer; give the whole model"),
    (lambda: make_seq2seq("t5").get_decoder(), "it has no output layer; give the whole model"),
    (lambda: named("bart", "t5"), "its positions are not those of the type t5"),
    (lambda: named("t5", "bart"), "its positions are not those of the type bart"),
    (lambda: make_seq2seq("t5", relative_attention_num_buckets=2), "its positions are not those of the type t5"),
    (lambda: make_seq2seq("bart", decoder_start_token_id=99), "decoder_start_token_id: expected a token id below 99"),
    (without_start, "expected decoder_start_token_id in its generation config or its config"),
    (without_head, "it has no output layer"),
    (with_a_hook_on_the_head, "its output layer is Linear, or has hooks"),
    (with_other_rows, "the rows of its keys differ between encoder, decoder and cross-attention"),
    (with_a_further_attention, "in layer 1 of BartDecoder, got 1 of site self, 2 of site cross"),
]


@pytest.mark.parametrize(("make", "reason"), REASONS, ids=lambda x: getattr(x, "__name__", ""))
def test_an_unsupported_model_is_refused_with_the_reason(make, reason):
    hf = make()
    before = state(hf)
    with pytest.raises(ConfigError, match="cannot attach") as caught:
        load(hf)
    assert reason in str(caught.value)
    assert state(hf) == before


def test_a_wrapping_model_needs_no_start():
    with load(make_seq2seq("mbart", decoder_start_token_id=None)) as model:
        assert model.seq2seq.start is None
        assert model.seq2seq.decoder_ids([7, 8, 4]).tolist() == [4, 7, 8, 4]


def test_vocabularies_of_encoder_and_decoder_may_differ():
    sizes = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 70}
    own = make_seq2seq("marian", **sizes)
    with load(make_seq2seq("marian", **sizes)) as model, torch.no_grad():
        assert (model.vocab_size, model.seq2seq.vocab_size) == (99, 70)
        [got] = packed(model, [ENCODER], [DECODER % 70])
        torch.testing.assert_close(got, logits_of(own, ENCODER, DECODER % 70, {}, 0), atol=1e-4, rtol=1e-4)


def test_attention_of_another_program_is_refused(monkeypatch):
    hf = make_seq2seq("t5")
    file = "transformers.models.t5.modeling_t5.create_bidirectional_mask"
    monkeypatch.setattr(file, lambda **_: None)
    with pytest.raises(ConfigError, match=r"has replaced .*create_bidirectional_mask"):
        load(hf)


def test_a_plan_of_a_decoder_only_base_is_refused():
    with load(make_seq2seq("bart")) as model, pytest.raises(RuntimeError):
        model.forward(plain_plan([3], backend=model.backend), torch.tensor([5, 6, 7]))


def test_a_saved_model_is_loaded_by_its_kind(tmp_path):
    make_seq2seq("t5").save_pretrained(tmp_path)
    with load(tmp_path, dtype="float32") as model:
        assert type(model.hf) is transformers.T5ForConditionalGeneration
        assert set(model.sites) == {"enc", "self", "cross"}
        assert [len(model.sites[site]) for site in model.sites] == [3, 2, 2]
        assert model.fingerprint["config"]["num_decoder_layers"] == 2
