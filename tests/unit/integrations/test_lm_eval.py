"""`PrefixLM` against lm-eval's own transformers model for the base model alone, and with a prefix."""

import json
import math

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import tiny
from prefixfast import Prefix, load
from prefixfast.errors import ConfigError
from prefixfast.integrations.lm_eval import PrefixLM

pytestmark = pytest.mark.filterwarnings("ignore")


def instances(kind, *args):
    return [Instance(kind, {}, a, i) for i, a in enumerate(args)]


PAIRS = [
    ("The fox", " jumps"),
    ("", "Over it"),
    ("A b ", "c"),
    ("x" * 300, " tail"),
    ("a", "b" * 40),
    ("mill and", " rain, again"),
]
TEXTS = [("short",), ("a longer text that goes on " * 12,), ("x",)]
GENERATIONS = [
    ("The fox", {"until": ["z"], "max_gen_toks": 12}),
    ("A b", {"until": [], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}),
    ("x" * 300, {"until": ["\n\n", "~"], "max_gen_toks": 7}),
]


@pytest.fixture(scope="module")
def models(tokenizer):
    torch.manual_seed(0)
    theirs = HFLM(pretrained=tiny.make("llama"), tokenizer=tokenizer, batch_size=1, device="cpu", max_length=150)
    ours = PrefixLM(load(tiny.make("llama"), tokenizer=tokenizer), max_length=150)
    yield ours, theirs
    ours.close()


def test_likelihoods_are_those_of_lm_evals_transformers_model(models):
    ours, theirs = (m.loglikelihood(instances("loglikelihood", *PAIRS)) for m in models)
    for (a, greedy), (b, expected) in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
        assert greedy == expected


def test_rolling_likelihoods_are_those_of_lm_evals_transformers_model(models):
    ours, theirs = (m.loglikelihood_rolling(instances("loglikelihood_rolling", *TEXTS)) for m in models)
    assert ours == pytest.approx(theirs, abs=2e-3)


def test_texts_are_those_of_lm_evals_transformers_model(models):
    ours, theirs = (m.generate_until(instances("generate_until", *GENERATIONS)) for m in models)
    assert ours == theirs
    whole = models[0].generate_until(instances("generate_until", ("The fox", {"max_gen_toks": 12})))[0]
    assert (
        models[0].generate_until(instances("generate_until", ("The fox", {"max_gen_toks": 12, "until": whole[4]})))[0]
        == whole[: whole.index(whole[4])]
    )


def test_a_prefix_changes_the_scores(models, tokenizer):
    g = torch.Generator().manual_seed(1)
    kv = {f"self.{i}.{x}": torch.randn(5, 2, 8, generator=g) for i in range(3) for x in "kv"}
    prefix = Prefix(kv, 5)
    with load(tiny.make("llama"), tokenizer=tokenizer) as base:
        tuned = PrefixLM(base, prefix)
        got = tuned.loglikelihood(instances("loglikelihood", *PAIRS[:2]))
        (score,) = tuned.engine.score(["The fox"], prefix, targets=[" jumps"])
        tuned.close()
    assert got[0][0] == pytest.approx(score.logprob)
    assert got[0][0] != pytest.approx(models[0].loglikelihood(instances("loglikelihood", PAIRS[0]))[0][0], abs=0.1)


@pytest.mark.long
def test_a_whole_evaluation_runs(models, tmp_path):
    rows = [{"q": "a", "choices": [" b", " c"], "gold": 0}, {"q": "x", "choices": [" y", " z"], "gold": 1}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    task = {
        "task": "two",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
    }
    results = [simple_evaluate(model=m, tasks=[task], log_samples=True, bootstrap_iters=0) for m in models]
    accuracy = [r["results"]["two"]["acc,none"] for r in results]
    assert accuracy[0] == accuracy[1]
    assert not math.isnan(accuracy[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_lm_evals_default_device_means_auto_without_a_gpu(folder):
    model = PrefixLM(folder, device="cuda:0", batch_size=1)
    assert model.engine.model.device.type == "cpu"
    model.close()


def test_wrong_arguments_are_refused(folder):
    with pytest.raises(ConfigError, match="unknown options"):
        PrefixLM(folder, flavour="sweet")
    with pytest.raises(ConfigError, match="no/such-model-here"):
        PrefixLM("no/such-model-here")
