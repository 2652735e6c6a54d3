"""Training of prefixes of encoder-decoder bases, against brute-force prefixes inside the base's own attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

import tiny
from cut_runs import Cut, CutAt
from prefixfast import ConfigError, DataError, Prefix, PrefixConfig, generate, load
from prefixfast.data import TASKS
from prefixfast.training.estimate import estimate
from prefixfast.training.group_data import tokenize_group
from prefixfast.training.job import JobArguments, prepare
from prefixfast.training.loop import GroupTrainer
from prefixfast.training.output_dir import OutputDir
from prefixfast.training.trainer import train
from seq2seq import FAST, LENGTHS, NAMES, SITES, SUBSETS, attention_modules, brute_force, make_seq2seq, rows

WRAPS = ("mbart", "plbart")
FAMILIES = [name if name in FAST else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
FLAT = {"init": "random", "reparameterization": "none", "learning_rate": 1e-2}
STILL = {**FLAT, "learning_rate": 1e-15, "max_steps": 1}
TEXT = {"reparameterization": "none", "learning_rate": 1e-15, "max_steps": 1}
XSUM = [{"document": "the mill", "summary": "a mill"}]


def lengths_of(sites) -> dict[str, int]:
    return {site: LENGTHS[site] for site in sites}


@pytest.fixture(scope="module")
def bases():
    """Function that loads a base once; its second value is the same model without prefixfast."""
    made = {}

    def get(name, dtype=torch.float32):
        if (name, dtype) not in made:
            made[name, dtype] = load(make_seq2seq(name).to(dtype)), make_seq2seq(name).to(dtype)
        return made[name, dtype]

    yield get
    for model, _ in made.values():
        model.close()


def oracle_losses(hf, row, kv, pos_start):
    """Losses of the labels of a row that are not -100, from the base's own ``labels=`` path."""
    labels = torch.tensor([row["labels"]])
    with brute_force(hf, kv, pos_start):
        logits = hf(input_ids=torch.tensor([row["input_ids"]]), labels=labels, use_cache=False).logits
    return cross_entropy(logits[0], labels[0], reduction="none")[labels[0] != -100]


LONG = [(name, sites) for name in NAMES for sites in SUBSETS if name != "bart" and (name not in FAST or len(sites) < 3)]
SHAPES = [(n, s) if (n, s) not in LONG else pytest.param(n, s, marks=pytest.mark.long) for n in NAMES for s in SUBSETS]


@pytest.mark.parametrize(("name", "sites"), SHAPES)
def test_the_loss_is_that_of_labels_in_hugging_face(bases, name, sites):
    model, hf = bases(name)
    data = rows(0)
    if name not in (*WRAPS, "m2m_100"):  # whose start token and positions count padding
        data[0]["labels"] = [-100, 7, -100, 8]
    got = train(model, data, prefix_length=lengths_of(sites), eval_data=data, **STILL)
    with torch.no_grad():
        losses = torch.cat([oracle_losses(hf, row, got.kv, got.pos_start) for row in data])
    assert got.sites == sites
    assert got.training["metrics"]["eval_loss"] == pytest.approx(losses.double().mean().item(), rel=1e-5)


def gradients(model, data, **how):
    """Gradients of the first step by name of prefix and tensor, and the parameters."""
    job = prepare(JobArguments(data, fields=how, init=how.pop("init"))).for_model(model)
    trainer = GroupTrainer(tokenize_group(model, job, 0), 0, OutputDir(None, None, is_single=False))
    state = trainer.runner.params
    with state.applied():
        trainer.runner._compute_gradients(0, trainer.progress.active)
    grads = [p._replace(tensor=p.tensor.grad) for p in state.params]
    return [(state.split(state.current(), i), state.split(grads, i)) for i in range(len(trainer.names))]


def oracle_gradients(hf, own, kv):
    """Gradients of the tensors of a prefix by name, for the mean loss of rows."""
    leaves = {n: t.clone().to(hf.dtype).requires_grad_() for n, t in kv.items()}
    torch.cat([oracle_losses(hf, row, leaves, LENGTHS["self"]) for row in own]).mean().backward()
    return {n: t.grad for n, t in leaves.items()}


def largest(these, those):
    """Largest difference of two sets of gradients by name, by the largest gradient of the tensor or 1."""
    return max((((t - those[n]).abs().max()) / max(1, those[n].abs().max())).item() for n, t in these.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_oracle(bases, name, dtype):
    model, hf = bases(name, dtype)
    _, exact = bases(name, torch.float64)
    data = {"a": rows(0, 4), "b": rows(1, 3)}
    found = gradients(model, data, prefix_length=LENGTHS, batch_size=9, token_budget=50, **STILL)
    for own, (kv, grads) in zip(data.values(), found, strict=True):
        expected, truth = oracle_gradients(hf, own, kv), oracle_gradients(exact, own, kv)
        rounding = largest(expected, truth)  # of transformers, 2e-5 in fp32 for PLBart, whose random layers amplify it
        assert set(grads) == {f"{site}.{i}.{x}" for site in SITES for i in range(2 + (site == "enc")) for x in "kv"}
        assert largest(grads, expected) <= (1e-11 if dtype == torch.float64 else 1e-5 + 5 * rounding)
        assert all(t.abs().max() > 1e-4 for t in expected.values())
    leaves = {n.replace("cross", "x"): t for n, t in found[0][0].items()}  # a planted swap of two sites
    swapped = {n.replace("self", "cross").replace("x.", "self."): t.clone().requires_grad_() for n, t in leaves.items()}
    torch.cat([oracle_losses(hf, row, swapped, LENGTHS["self"]) for row in data["a"]]).mean().backward()
    assert (found[0][1]["self.0.k"][:2] - swapped["cross.0.k"].grad[:2]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["none", "mlp"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_prefix_alone_equals_the_prefix_among_others(name, kind):
    hf = make_seq2seq(name).double()
    data = {n: rows(i, 3 + i) for i, n in enumerate("abc")}
    how = {**FLAT, "reparameterization": kind, "encoder_hidden_size": 8, "prefix_length": LENGTHS, "batch_size": 2}
    how |= {"max_steps": 3, "prefix_dropout": 0.2, "frozen_rows": 1, "weight_decay": 0.01}
    with load(hf) as model:
        together = train(model, data, **how)
        for n, own in data.items():
            alone = train(model, {n: own}, **how)[n]
            worst = max(float((alone.kv[t] - together[n].kv[t]).abs().max()) for t in alone.kv)
            assert worst < 1e-9
        for p in together.values():
            assert p.training["num_frozen_tokens"] == 1
        assert not torch.equal(together["a"].kv["enc.0.k"], together["b"].kv["enc.0.k"])


def test_sites_are_drawn_apart_and_decoder_self_attention_as_ever(bases):
    model, _ = bases("bart")
    prefix = train(model, rows(0), prefix_length=4, seed=7, **STILL)
    again = train(model, rows(0), prefix_length=4, seed=7, sites=["enc", "cross"], **STILL)
    g = torch.Generator().manual_seed(7)
    assert torch.allclose(prefix.kv["self.0.k"], torch.randn(4, 4, 8, generator=g), atol=1e-6)
    assert torch.equal(prefix.kv["enc.0.k"], again.kv["enc.0.k"])
    first = [prefix.kv[f"{site}.0.k"] for site in SITES]
    assert all((a - b).abs().max() > 0.1 for a, b in zip(first, first[1:] + first[:1], strict=True))


@pytest.mark.parametrize("kind", ["none", "mlp"])
def test_a_resumed_run_equals_an_uninterrupted_one(bases, tmp_path, kind):
    model, _ = bases("t5")
    data = {n: rows(i) for i, n in enumerate("ab")}
    how = {**FLAT, "reparameterization": kind, "encoder_hidden_size": 8, "prefix_length": LENGTHS, "batch_size": 2}
    how |= {
        "max_steps": 6,
        "prefix_dropout": 0.2,
        "eval_data": data,
        "eval_steps": 2,
        "save_steps": 1,
        "frozen_rows": 1,
    }
    whole = train(model, data, **how)
    for cut in (2, 5):
        out = tmp_path / str(cut)
        with pytest.raises(Cut):
            train(model, data, output_dir=out, callbacks=[CutAt(cut)], **how)
        resumed = train(model, data, output_dir=out, resume=True, **how)
        assert {n: p.digest for n, p in resumed.items()} == {n: p.digest for n, p in whole.items()}
    with pytest.raises(ConfigError, match="prefix_length"):
        train(model, data, output_dir=out, resume=True, **{**how, "prefix_length": {**LENGTHS, "enc": 4}})


@pytest.mark.parametrize(
    ("below", "own"), [(("enc", "self"), ("self", "cross")), (("cross",), ("enc",)), (SITES, SITES)]
)
def test_a_frozen_prefix_stands_before_the_trained_one_at_each_site(bases, below, own):
    model, hf = bases("bart")
    frozen = train(model, rows(0), prefix_length=lengths_of(below), seed=1, **STILL)
    got = train(model, rows(0), prefix_length=lengths_of(own), on_top_of=frozen, eval_data=rows(0), seed=2, **STILL)
    kv = {n: torch.cat([p.kv[n] for p in (frozen, got) if n in p.kv]) for n in {**frozen.kv, **got.kv}}
    with torch.no_grad():
        losses = [oracle_losses(hf, row, kv, max(frozen.pos_start, got.pos_start)) for row in rows(0)]
    assert got.training["metrics"]["eval_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert got.sites == own


def test_a_prefix_as_init_gives_its_sites_lengths_and_positions(bases):
    model, _ = bases("bart")
    first = train(model, rows(0), prefix_length={"enc": 3, "cross": 2}, layers={"enc": [1], "cross": [0, 1]}, **STILL)
    assert (first.pos_start, first.layers_at("enc")) == (0, (1,))
    how = {**STILL, "init": first}
    again = train(model, rows(0), **how)
    assert (again.sites, again.length, again.pos_start) == (first.sites, first.length, first.pos_start)
    assert all(torch.allclose(again.kv[n], t, atol=1e-9) for n, t in first.kv.items())
    for wrong in ({"sites": ["self"]}, {"prefix_length": 4}, {"layers": {"enc": [0], "cross": [0, 1]}}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            train(model, rows(0), **how, **wrong)


def test_zero_and_flat_start_values(bases):
    model, _ = bases("t5")
    got = train(model, rows(0), prefix_length=LENGTHS, **{**STILL, "init": "zero"})
    assert all(float(t.abs().max()) < 1e-9 for t in got.kv.values())


@pytest.fixture(scope="module")
def worded(tokenizer):
    """BART-shaped base with a tokenizer, and the same model without prefixfast."""
    with load(make_seq2seq("bart", vocab_size=tiny.VOCAB), tokenizer=tokenizer) as model:
        yield model, make_seq2seq("bart", vocab_size=tiny.VOCAB)


def projections(hf, encoder, decoder, site, frozen=None):
    """Keys and values that a base computes of two texts at a site, by the names of a prefix's tensors."""
    kept, kv = {}, {} if frozen is None else dict(frozen.kv)
    hooks = [
        getattr(m, f"{x}_proj").register_forward_hook(
            lambda _, __, out, n=f"{site}.{i}.{x}": kept.update({n: out[0].unflatten(-1, (4, -1))})
        )
        for i, m in enumerate(attention_modules(hf)[site])
        for x in "kv"
    ]
    with torch.no_grad(), brute_force(hf, kv, 0 if frozen is None else frozen.pos_start):
        hf(input_ids=torch.tensor([encoder]), decoder_input_ids=torch.tensor([decoder]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return kept


def test_init_text_is_read_by_encoder_and_decoder(worded):
    model, hf = worded
    ids = model.tokenizer.hf("mill").input_ids
    lengths = {"enc": 6, "self": 3, "cross": 2}
    frozen = train(model, rows(0), prefix_length=LENGTHS, seed=1, **STILL)
    found = []
    for below in (None, frozen):
        got = train(model, XSUM, init_text="mill", prefix_length=lengths, on_top_of=below, **TEXT)
        expected = projections(hf, ids + ids[:2], [2], "enc", below)
        expected |= projections(hf, ids, [2, *ids[:2]], "self", below)
        expected |= projections(hf, ids[:2], [2], "cross", below)
        assert got.kv.keys() == expected.keys()
        for name, t in expected.items():
            assert torch.allclose(got.kv[name], t, atol=1e-5), (name, below)
        found.append(got)
    alone, behind = found
    for name in ("enc.1.k", "self.0.k", "self.1.v", "cross.0.v"):  # layer 0 of the encoder reads the text alone
        assert (alone.kv[name] - behind.kv[name]).abs().max() > 1e-2, name


def test_init_text_needs_room(worded):
    model, _ = worded
    by_text = train(model, XSUM, init_text="mill", prefix_length="text", **TEXT)
    assert (by_text.length, by_text.sites, by_text.pos_start) == (4, SITES, 4)
    with pytest.raises(ConfigError, match="at most 64 rows of site 'enc' beside init='text'"):
        train(model, XSUM, init_text="mill", prefix_length={"enc": 65, "self": 3}, **TEXT)
    frozen = train(model, rows(0), prefix_length=LENGTHS, **STILL)
    short = [{"document": "a", "summary": "b"}]
    with pytest.raises(ConfigError, match="at most 59 rows of site 'self' beside init='text'"):
        train(model, short, init_text="mill", prefix_length={"enc": 1, "self": 60}, on_top_of=frozen, **TEXT)


def test_rows_of_texts_give_the_losses_of_the_tokenizers_labels(worded):
    model, hf = worded
    data = [*XSUM, {"document": "an inn by the river ", "refs": ["inn", " the river\n"]}]
    got = train(model, data, eval_data=data, prefix_length=LENGTHS, task="xsum", **STILL)
    eos = model.tokenizer.hf.eos_token_id
    texts = [(row["document"].strip(), t.strip()) for row in data for t in row.get("refs", [row.get("summary")])]
    encoded = [
        {k: model.tokenizer.hf(t).input_ids for k, t in zip(("input_ids", "labels"), x, strict=True)} for x in texts
    ]
    with torch.no_grad():
        losses = [oracle_losses(hf, r | {"labels": [*r["labels"], eos]}, got.kv, got.pos_start) for r in encoded]
    assert got.training["metrics"]["eval_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
    assert got.decoding["max_new_tokens"] == 61


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss_and_gives_the_base_back(dtype):
    hf = make_seq2seq("bart").to(dtype)
    before = {n: t.clone() for n, t in hf.state_dict().items()}
    with load(hf) as model:
        how = {**FLAT, "learning_rate": 0.05, "max_steps": 8, "gradient_checkpointing": True}
        got = train(model, rows(0), prefix_length=LENGTHS, **how)
    assert got.training["metrics"]["loss"] < 0.8 * got.training["metrics"]["first_loss"]
    assert all(torch.equal(t, before[n]) for n, t in hf.state_dict().items())


# ---- options and refusals ----


@pytest.mark.parametrize("method", ["infix", "embedding", "prompt", "icl", "top2", "adapter"])
def test_methods_for_decoder_only_bases_are_refused_before_the_base_computes(bases, method, monkeypatch):
    model, _ = bases("bart")
    monkeypatch.setattr(type(model), "losses", None)
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(ConfigError, match=f"method: '{method}' does not work with an encoder-decoder base"):
        train(model, rows(0), method=method)


@pytest.mark.parametrize(
    ("name", "how", "match"),
    [
        ("bart", {"position": "infix"}, "infix"),
        ("bart", {"max_length": 20}, "max_length.*max_source_length and max_target_length"),
        ("bart", {"layers": [2]}, "site 'self' of this base has 2 layers"),
        ("bart", {"layers": {"enc": [3]}}, "site 'enc' of this base has 3 layers"),
        ("t5", {"pos_start": "zero"}, "pos_start.*distances"),
    ],
)
def test_options_that_do_not_fit_are_refused(bases, name, how, match):
    with pytest.raises(ConfigError, match=match):
        train(bases(name)[0], rows(0), **STILL, **how)


@pytest.mark.parametrize("how", [{"max_source_length": 9}, {"max_target_length": 9}, {"sites": ["enc"]}])
def test_options_of_encoder_decoder_bases_are_refused_on_decoder_only_ones(base, how):
    with pytest.raises(ConfigError, match=next(iter(how))):
        train(base, [{"input_ids": [5, 6], "labels": [-100, 6]}], **STILL, **how)


def test_texts_longer_than_the_positions_are_refused_and_truncation_fits_them(bases):
    model, hf = bases("bart")
    long = [{"input_ids": [5] * 65, "labels": [6] * 4}, {"input_ids": [5] * 64, "labels": [6] * 60}]
    with pytest.raises(DataError, match="the source has 65 tokens, at most 64 fit; shorten it, or"):
        train(model, long[:1], prefix_length=5, **STILL)
    with pytest.raises(DataError, match=r"target has 60 tokens, at most 59 fit; .*prefix_length"):
        train(model, long[1:], prefix_length=5, **STILL)
    got = train(model, long, prefix_length=5, overflow="truncate", eval_data=long, **STILL)
    cut = [{"input_ids": [5] * 64, "labels": [6] * 4}, {"input_ids": [5] * 64, "labels": [6] * 59}]
    with torch.no_grad():
        losses = torch.cat([oracle_losses(hf, row, got.kv, 5) for row in cut])
    assert got.training["metrics"]["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert got.training["metrics"]["truncated_rows"] == 2
    assert "max_source_length" not in got.decoding
    kept = train(model, long, overflow="truncate", max_source_length=7, max_target_length=3, **STILL)
    assert kept.decoding["max_source_length"] == 7


def test_a_wrapping_base_keeps_the_language_of_its_targets(bases):
    model, _ = bases("mbart")
    one = [{"input_ids": [5, 6], "labels": [7, 2, 90]}, {"input_ids": [5], "labels": [8, 9, 2, 90]}]
    got = train(model, {"one": one, "two": [*one, {"input_ids": [5], "labels": [8, 2, 91]}]}, **STILL)
    assert got["one"].decoding["decoder_start_token_id"] == 90
    assert "decoder_start_token_id" not in got["two"].decoding


def test_the_start_line_has_the_rows_of_each_site(bases, caplog):
    caplog.set_level("INFO")
    for how, found in (({"sites": "self"}, "3 prefix rows (self 3)"), ({}, "9 prefix rows (enc 3, self 3, cross 3)")):
        train(bases("bart")[0], rows(0), prefix_length=3, **how, **STILL)
        assert found in caplog.text


def test_users_of_one_batch_write_in_the_languages_of_their_targets(bases):
    model, hf = bases("mbart")
    languages = {"ann": 90, "bob": 91, "eve": 90}
    data = {name: [{"input_ids": [5, 6], "labels": [7, 8, 2, end]}] for name, end in languages.items()}
    run = train(model, data, **STILL)
    assert {name: run[name].decoding["decoder_start_token_id"] for name in run} == languages
    requests = [{"input_ids": [5, 6, 7], "prefix": name} for name in languages]
    results = generate(requests, run, model=model, max_new_tokens=1)
    for got, (name, start) in zip(results, languages.items(), strict=True):
        own = run[name]
        with brute_force(hf, own.kv, own.pos_start), torch.no_grad():
            logits = hf(input_ids=torch.tensor([[5, 6, 7]]), decoder_input_ids=torch.tensor([[start]]), use_cache=False)
        assert got.token_ids == [int(logits.logits[0, 0].argmax())]
    forced = {"forced_bos_token_id": 92}
    (own,) = generate([{**requests[0], "params": forced}], run, model=model, max_new_tokens=2)
    assert own.token_ids[0] == 92


# ---- recipe and estimate ----


def resolved(model, **how):
    job = prepare(JobArguments(XSUM, task="xsum", fields=how)).for_model(model)
    return job.groups[0].config, job.groups[0].jobs[0].prefix_config


def test_the_paper_recipe_on_both_kinds_of_base(bases, base):
    config, prefix = resolved(bases("bart")[0], recipe="paper")
    texts = (config.max_length, config.max_source_length, config.max_target_length, config.overflow)
    assert texts == (None, 512, 60, "truncate")
    assert (config.learning_rate, config.batch_size, config.num_train_epochs, config.seed) == (5e-5, 14, 30, 101)
    assert (config.warmup_steps, config.weight_decay, config.max_grad_norm, config.loss) == (0, 0.0, 1.0, "token_mean")
    assert (prefix.prefix_length, prefix.encoder_hidden_size, prefix.pos_start) == (100, 800, "zero")
    assert (prefix.sites_of(SITES), prefix.reparameterization) == (SITES, "mlp")
    assert resolved(bases("t5")[0], recipe="paper")[1].pos_start == "after"
    config, prefix = resolved(base, recipe="paper")
    assert (config.max_length, config.max_source_length, config.max_target_length) == (572, None, None)
    assert prefix.pos_start == "after"


def test_options_of_the_caller_precede_the_recipe(bases):
    model, _ = bases("bart")
    config, prefix = resolved(
        model, recipe="paper", max_source_length=20, pos_start="after", prefix_length={"enc": 4, "self": 9}
    )
    assert (config.max_source_length, config.max_target_length, prefix.pos_start) == (20, 60, "after")
    assert prefix.lengths(SITES) == {"enc": 4, "self": 9}
    assert resolved(model)[0].max_source_length is None


def test_a_prefix_of_the_paper_has_its_decoding(bases, tokenizer):
    model, _ = bases("bart")
    how = {"task": "xsum", "recipe": "paper", "prefix_length": 2, "max_steps": 1, "encoder_hidden_size": 4}
    model.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        train(model, XSUM, **how)
    ids = [{"input_ids": [5, 6], "labels": [7, 2]}]
    got = train(model, ids, **how)
    assert (got.pos_start, got.length, got.sites) == (0, 2, SITES)
    decoding = {"num_beams": 6, "max_new_tokens": 61, "min_new_tokens": 10, "length_penalty": 0.8}
    assert got.decoding == decoding | {"max_source_length": 512}
    assert "encoder_decoding" not in got.task


# transformers' `min_length` and `max_length` of BART on these summaries. Both count the start token.
PUBLISHED = {"xsum": (11, 62), "cnn_dailymail": (56, 142), "dialogsum": (0, 128)}


@pytest.mark.parametrize("task", [name for name, own in TASKS.items() if own.encoder_decoding is not None])
def test_texts_of_a_summary_prefix_have_the_lengths_of_transformers(task):
    shortest, longest = PUBLISHED[task]
    ids, counts, sizes = [[5, 6]], [], {"max_position_embeddings": 160, "d_model": 16}
    how = {**STILL, "prefix_length": 2, "progress": False, "task": task}
    for ends in (50.0, -50.0):  # texts that end as soon as they can, and texts that never end
        hf, plain = make_seq2seq("bart", **sizes), make_seq2seq("bart", **sizes)
        for each in (hf, plain):
            each.final_logits_bias[:, 2] = ends
        with load(hf) as model:
            prefix = train(model, [{"input_ids": [5, 6], "labels": [7, 2]}], **how)
            (got,) = generate(ids, prefix, model=model, num_beams=1, progress=False)
        out = plain.generate(input_ids=torch.tensor(ids), min_length=shortest, max_length=longest, num_beams=1)
        assert len(got.token_ids) == out.shape[1] - 1, "the start token is not generated"
        counts.append(len(got.token_ids))
    assert counts == [max(shortest, 1), longest - 1]


@pytest.mark.parametrize("task", [name for name, own in TASKS.items() if own.encoder_decoding is not None])
def test_texts_of_a_decoder_only_base_have_the_same_lengths_without_the_begin_token(task):
    own, names = TASKS[task], ("min_new_tokens", "max_new_tokens")
    plain, seq2seq = ([decoding.get(name, 1) for name in names] for decoding in (own.decoding, own.encoder_decoding))
    assert plain == [max(1, length - 1) for length in seq2seq]


def test_the_estimate_counts_each_site(bases):
    model, _ = bases("bart")
    found = estimate(model, rows(0), prefix_length=LENGTHS, **FLAT)
    assert {site: own["rows"] for site, own in found.sites.items()} == LENGTHS
    assert [own["stored_numbers"] for own in found.sites.values()] == [3 * 3 * 64, 5 * 2 * 64, 2 * 2 * 64]
    assert sum(own["stored_numbers"] for own in found.sites.values()) == found.stored_numbers == found.trained_numbers
    assert sum(own["training_bytes"] for own in found.sites.values()) == found.training_bytes
    assert found.tokens == sum(len(r["input_ids"]) + len(r["labels"]) + 1 for r in rows(0))


def test_a_saved_prefix_holds_its_options_by_site(bases, tmp_path):
    model, _ = bases("bart")
    train(model, rows(0), prefix_length={"enc": 3, "self": 2}, output_dir=tmp_path / "p", **STILL)
    got = Prefix.from_pretrained(tmp_path / "p")
    config = PrefixConfig.make(got.training["prefix_config"])
    assert (config.prefix_length, config.sites) == ({"enc": 3, "self": 2}, ("enc", "self"))
    assert got.length == {"enc": 3, "self": 2}
