"""Study of summaries: rows, choice of the references, parts that a later call carries out."""

import gzip
import json

import pytest

import prefixfast
from prefixfast.demo import SEQ2SEQ_BASE
from prefixfast.errors import ConfigError
from prefixfast.metrics.rouge import rouge
from prefixfast.studies.scitldr import RESULTS, Part, Settings, Study, best_references, read_rows
from shared import folder

LONG = "a sentence that has more than sixty characters, so that no two abstracts share it"
ROWS = {
    "train": [
        {"document": f"{LONG}. Then more.", "summary": "a version of a test document"},
        {"document": "We train it. It works.", "summary": "it works"},
    ],
    "dev": [{"document": "Other.", "summary": "other"}],
    "test": [
        {"document": f"{LONG}. Then less.", "summary": "then less", "summaries": ["then less", f"{LONG}."]},
        {"document": "We test it. It fails.", "summary": "it fails", "summaries": ["we test it", "it fails"]},
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    (path / "scitldr").mkdir()
    for split, rows in ROWS.items():
        with gzip.open(path / "scitldr" / f"scitldr_{split}.jsonl.gz", "wt") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def settings(**fields):
    shown = {"base": "", "train_rows": 9, "test_rows": 9, "epochs": 1, "max_source_length": 30, "prefix_length": 2}
    return Settings(**shown | {"prefix_rate": 0.1, "full_rate": 0.1, "dtype": "float32"} | fields)


def results(path):
    return [json.loads(line) for line in (path / RESULTS).read_text().splitlines()]


def test_training_rows_that_are_versions_of_test_documents_are_left_out(data):
    assert read_rows(data, "train") == ROWS["train"][1:]
    assert read_rows(data, "test") == ROWS["test"]


def test_the_official_rows_are_counted():
    path = folder()
    counts = {split: len(read_rows(path, split)) for split in ("train", "dev", "test")}
    assert counts["dev"] == 619
    assert counts["test"] == 618
    assert 1970 < counts["train"] < 1992
    assert all(len(row["summaries"]) >= 2 for row in read_rows(path, "test"))


def test_the_reference_with_the_best_rouge_1_counts_for_all_scores():
    """The official scorer's choice; the best of each score would be 100 for ROUGE-2 and ROUGE-L too."""
    text, references = "a b c d", ["d c b a", "a b x y z"]
    assert best_references([text], [references]) == [["d c b a"]]
    assert best_references(["a"], [["a", "A!"]]) == [["a"]]
    scores = rouge([text], best_references([text], [references]))
    assert (scores["ROUGE-1"].value, scores["ROUGE-2"].value) == (100, 0)
    assert rouge([text], [references])["ROUGE-2"].value > 0


def test_parts_without_a_base_are_written_at_once_and_once(data, tmp_path, monkeypatch):
    parts = [Part("lead-1"), Part("copy")]
    Study(tmp_path, data, settings()).run(parts[:1])
    head, lead = results(tmp_path)
    assert head["settings"]["max_source_length"] == 30
    assert lead["rouge"] == {"ROUGE-1": 100.0, "ROUGE-2": 100.0, "ROUGE-L": 100.0}
    assert lead["rows"] == {"train": 0, "test": 2}
    again = Study(tmp_path, data, settings())
    monkeypatch.setattr("prefixfast.studies.scitldr.sentences", lambda text: pytest.fail("lead-1 again"))
    again.run(parts)
    assert results(tmp_path)[:2] == [head, lead]
    assert results(tmp_path)[2]["rouge"]["ROUGE-1"] < 100
    with pytest.raises(ConfigError, match="another folder"):
        Study(tmp_path, data, settings(epochs=2))


def test_each_seed_has_its_own_parts():
    parts = settings().parts([4, 5])
    assert [p.key for p in parts[:3]] == ["lead-1", "copy", "no prefix"]
    assert len(parts) == len({p.key for p in parts}) == 3 + 2 * 4
    assert parts[3].seed == 4
    assert [p.options.get("sites") for p in parts[3:7]] == [None, ("self",), ("enc",), None]
    assert parts[6].options["method"] == "full"


def test_parts_with_a_base_train_and_generate(data, tmp_path):
    study = Study(tmp_path, data, settings(base=str(SEQ2SEQ_BASE)))
    chosen = {p.name: p for p in study.settings.parts([1])}
    names = ("no prefix", "prefix, encoder only", "full fine-tuning")
    found = study.run([chosen[name] for name in names])
    assert [found[chosen[name].key]["rows"]["train"] for name in names] == [0, 1, 1]
    assert all(len(part["texts"]) == 2 and part["seed"] in (None, 1) for part in found.values())
    prefix = prefixfast.Prefix.from_pretrained(tmp_path / "prefix-encoder-only-seed-1")
    assert (prefix.sites, prefix.length_at("enc")) == (("enc",), 2)
    assert found[chosen["prefix, encoder only"].key]["num_trained"] == prefix.num_trained
