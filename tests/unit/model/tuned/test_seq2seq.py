"""Full fine-tuning and LoRA of encoder-decoder bases: logits and gradients of transformers and PEFT, the base after."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel

from prefixfast import ConfigError, TunedWeights, load, train
from prefixfast.attention.seq2seq_plan import plain_seq2seq_plan
from prefixfast.model.tuned.apply import applied
from prefixfast.model.tuned.blocks import decoder_blocks
from prefixfast.model.tuned.full import all_weights, applied_full
from seq2seq import NAMES, make_seq2seq, random_texts

ENCODER, DECODER = (7, 4, 1), (5, 6, 2)


def families(*few):
    """All families, of which the default run has a few."""
    return [pytest.param(n, marks=() if n in few else pytest.mark.long) for n in NAMES]


@pytest.fixture(scope="module")
def texts():
    return random_texts(ENCODER, seed=1), random_texts(DECODER, seed=2)


def packed(base, texts, call="forward", *more):
    encoder, decoder = texts
    plan = plain_seq2seq_plan(DECODER, ENCODER, backend=base.backend)
    return getattr(base, call)(plan, torch.cat(decoder), *more, encoder_ids=torch.cat(encoder))


def changed(weights):
    g = torch.Generator().manual_seed(3)
    return {n: p.detach() + 0.02 * torch.randn(p.shape, generator=g) for n, p in weights.items()}


@pytest.mark.parametrize("name", families("bart", "pegasus", "t5", "umt5"))
def test_other_weights_give_the_logits_and_gradients_of_transformers(name, texts):
    hf = make_seq2seq(name)
    plain = copy.deepcopy(hf).eval()
    targets = torch.cat(texts[1]).roll(1)
    with load(hf) as base:
        own = all_weights(base)
        values = changed(own)
        before = packed(base, texts)
        with applied_full(base, values, own):
            for p in own.values():
                p.requires_grad_(True)
            packed(base, texts, "losses", targets).sum().backward()
            grads = {n: p.grad.clone() for n, p in own.items()}
            logits = packed(base, texts).detach()
        assert torch.equal(packed(base, texts), before)
        assert not any(p.requires_grad or p.grad is not None for p in hf.parameters())
    theirs = dict(plain.named_parameters())
    with torch.no_grad():
        for n, t in values.items():
            theirs[n].copy_(t)
    plain.requires_grad_(True)
    pairs = zip(*texts, strict=True)
    own = [plain(input_ids=e[None], decoder_input_ids=d[None], use_cache=False).logits[0] for e, d in pairs]
    expected = torch.cat(own)
    torch.nn.functional.cross_entropy(expected, targets, reduction="sum").backward()
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-4, atol=1e-4)
    for n, p in theirs.items():
        if n in grads:
            scale = max(1.0, float(p.grad.abs().max()))
            assert float((grads[n] - p.grad).abs().max()) < 1e-4 * scale, n
    left_out = set(theirs) - set(grads)
    assert all("relative_attention_bias" in n or "embed_positions" in n for n in left_out)
    assert bool(left_out) == (name in ("pegasus", "marian", "t5", "flan-t5", "mt5", "umt5"))


ROWS = [{"input_ids": list(range(3, 3 + n)), "labels": [5, 6 + n, 7, 2]} for n in (4, 6, 3, 5)]


def losses_of(base):
    """Mean loss of each row."""
    found = []
    for row in ROWS:
        ids = torch.from_numpy(base.seq2seq.decoder_ids(row["labels"]).astype("int64"))
        plan = plain_seq2seq_plan([len(ids) - 1], [len(row["input_ids"])], backend=base.backend)
        losses = base.losses(plan, ids[:-1], ids[1:], encoder_ids=torch.tensor(row["input_ids"]))
        found.append(float(losses.mean()))
    return found


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", families("bart", "t5"))
def test_weights_are_trained_saved_and_used_and_the_base_is_given_back(name, method, tmp_path):
    hf = make_seq2seq(name)
    plain = copy.deepcopy(hf)
    with load(hf) as base:
        before = {n: p.clone() for n, p in hf.state_dict().items()}
        how = {"method": method, "learning_rate": 1e-2, "max_steps": 6, "batch_size": 4, "progress": False}
        weights = train(base, ROWS, output_dir=tmp_path / "out", **how)
        with torch.no_grad(), applied(base, method, weights.tensors, weights.options):
            losses = losses_of(base)
        with torch.no_grad():
            assert sum(losses) < sum(losses_of(base))
        assert list(before) == list(hf.state_dict())
        assert all(torch.equal(t, before[n]) for n, t in hf.state_dict().items())
    again = TunedWeights.from_pretrained(tmp_path / "out")
    assert again.digest == weights.digest
    if method == "full":
        plain.load_state_dict(dict(again.tensors), strict=False)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = PeftModel.from_pretrained(plain, tmp_path / "out")
        assert type(plain).__name__ == "PeftModelForSeq2SeqLM"
    plain.eval()
    with torch.no_grad():
        expected = [
            float(plain(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])).loss)
            for r in ROWS
        ]
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["top2", "adapter"])
def test_methods_that_change_decoder_blocks_are_refused_by_name(method, tmp_path):
    with load(make_seq2seq("bart")) as base:
        with pytest.raises(ConfigError, match=method):
            train(base, ROWS, method=method, max_steps=1, progress=False)
        with pytest.raises(ConfigError, match="full or lora"):
            decoder_blocks(base)
