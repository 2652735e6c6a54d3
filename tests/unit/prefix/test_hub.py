"""Download from and upload to a fake of the Hugging Face hub, and the model card."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import errors
from safetensors.torch import load_file

from prefixfast import ConfigError, DataError, Prefix, TunedWeights
from prefixfast.prefix.model_card import model_card

META, OWN, CONFIG, WEIGHTS = "prefixfast.json", "prefix.safetensors", "adapter_config.json", "adapter_model.safetensors"
TUNED = "tuned.safetensors"
SECRET = "the patient's name is Alice"
TRAINED: dict[str, Any] = {
    "base": {"name": "HuggingFaceTB/SmolLM2-135M", "config": {}, "tokenizer": None, "weights": None},
    "task": {"name": "prompt", "init_text": "Answer:"},
    "training": {
        "num_trained": 7,
        "config": {"max_steps": 300, "learning_rate": 0.05, "shuffle": True, "loss": "token_mean", "max_length": None},
        "prefix_config": {"prefix_length": 4, "pos_start": "after"},
        "metrics": {"loss": 1.296612, "steps": 300.0, SECRET: 1.0, "note": SECRET},
        "first_row": SECRET,
    },
}


@pytest.fixture
def hub(monkeypatch, make_prefix, tmp_path):
    """Fake hub with one repository, which records the calls."""
    calls: list[tuple[str, dict[str, Any]]] = []
    make_prefix(3).save_pretrained(tmp_path / "snapshot")

    def snapshot_download(repo_id: str, **how: Any) -> str:
        calls.append((repo_id, how))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_a_hub_id_is_downloaded(hub, make_prefix):
    prefix = Prefix.from_pretrained("ann/mill", revision="v2", local_files_only=True)
    assert prefix.digest == make_prefix(3).digest
    ((repo_id, how),) = hub
    assert (repo_id, how["revision"], how["local_files_only"]) == ("ann/mill", "v2", True)


def test_only_json_and_safetensors_files_are_downloaded(hub):
    Prefix.from_pretrained("ann/mill")
    assert sorted(hub[0][1]["allow_patterns"]) == sorted([META, OWN, CONFIG, WEIGHTS])


def test_trained_weights_are_downloaded_for_their_own_reader_only(hub):
    with pytest.raises(DataError):
        TunedWeights.from_pretrained("ann/mill")
    assert sorted(hub[0][1]["allow_patterns"]) == sorted([META, OWN, CONFIG, WEIGHTS, TUNED])


def test_a_local_folder_takes_precedence_over_a_hub_id(hub, make_prefix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_prefix(1).save_pretrained(Path("ann/mill"))
    assert Prefix.from_pretrained("ann/mill").digest == make_prefix(1).digest
    assert hub == []


@pytest.mark.parametrize(
    "path", [Path("ann/mill"), "mill", "/ann/mill", "./mill", "../x/y", "a/b/c", "", "~/mill", "C:\\mill"], ids=repr
)
def test_paths_are_not_hub_ids(hub, path, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(DataError, match=r"no such folder|no prefix here"):
        Prefix.from_pretrained(path)
    assert hub == []


def test_a_revision_of_a_folder_is_refused(hub, make_prefix, tmp_path):
    make_prefix().save_pretrained(tmp_path / "p")
    with pytest.raises(ConfigError, match="revision: expected only with a hub id"):
        Prefix.from_pretrained(tmp_path / "p", revision="main")


RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=404)
FAILURES = {
    "no repository": (
        errors.RepositoryNotFoundError("404\nsecond line", response=RESPONSE),
        DataError,
        "check the name, or log in",
    ),
    "gated": (errors.GatedRepoError("403", response=RESPONSE), DataError, "log in"),
    "no revision": (errors.RevisionNotFoundError("404", response=RESPONSE), DataError, "at revision 'v9'"),
    "not cached": (errors.LocalEntryNotFoundError("offline"), DataError, "fetch it once while online"),
    "bad id": (errors.HFValidationError("bad id"), DataError, "neither a folder here nor a repository"),
    "server": (errors.HfHubHTTPError("500", response=RESPONSE), ConfigError, "check the connection"),
    "offline": (errors.OfflineModeIsEnabled("offline"), ConfigError, "HF_HUB_OFFLINE"),
    "disk": (OSError(28, "No space left on device"), ConfigError, "No space left"),
    "network": (ConnectionError("no route"), ConfigError, "no route"),
}


@pytest.mark.parametrize(("failure", "kind", "message"), FAILURES.values(), ids=FAILURES)
def test_errors_of_the_hub(monkeypatch, failure, kind, message):
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(kind, match=message) as caught:
        Prefix.from_pretrained("ann/mill", revision="v9")
    assert "'ann/mill' at revision 'v9'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_snapshot_that_is_no_prefix_is_refused(hub, tmp_path):
    for file in (tmp_path / "snapshot").iterdir():
        file.unlink()
    (tmp_path / "snapshot" / "config.json").write_text("{}", encoding="utf8")
    with pytest.raises(DataError, match=r"looked for prefixfast\.json.*adapter_config\.json.*found config\.json"):
        Prefix.from_pretrained("ann/mill")


def test_an_unreachable_hub():
    """Uses the real client in offline mode."""
    with pytest.raises(DataError, match="nor in the local cache"):
        Prefix.from_pretrained("nobody-here/no-such-prefix-at-all")


# ---- upload ----


class Hub:
    """Fake of `HfApi` that keeps the uploaded files."""

    def __init__(self, token: str | None = None) -> None:
        Hub.calls = {"token": token}

    def create_repo(self, repo_id: str, **how: Any) -> None:
        Hub.calls["create"] = (repo_id, how)

    def upload_folder(self, *, folder_path: str, **how: Any) -> Any:
        Hub.calls["upload"] = how
        Hub.files = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url="https://example.com/commit")


@pytest.fixture
def pushed(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return Hub


def test_a_pushed_prefix_is_the_saved_folder_and_a_card(pushed, make_prefix, tmp_path):
    prefix = make_prefix(**TRAINED)
    assert (
        prefix.push_to_hub("ann/mill", private=True, token="t", commit_message="first") == "https://example.com/commit"
    )
    assert pushed.calls["token"] == "t"
    assert pushed.calls["create"] == ("ann/mill", {"private": True, "exist_ok": True})
    assert (pushed.calls["upload"]["repo_id"], pushed.calls["upload"]["commit_message"]) == ("ann/mill", "first")
    assert pushed.calls["upload"]["delete_patterns"] == [OWN, TUNED]
    card = pushed.files.pop("README.md")
    for name, data in pushed.files.items():
        (tmp_path / name).write_bytes(data)
    assert Prefix.from_pretrained(tmp_path).digest == prefix.digest
    assert card.decode() == model_card(prefix, "ann/mill")
    assert load_file(tmp_path / WEIGHTS)["prompt_embeddings"].shape == (4, 192)


def test_a_prefix_that_is_no_adapter_replaces_one(pushed, make_prefix):
    make_prefix(pos_start=0).push_to_hub("ann/mill")
    assert sorted(pushed.files) == ["README.md", OWN, META]
    assert pushed.calls["upload"]["delete_patterns"] == [CONFIG, WEIGHTS, TUNED]


@pytest.mark.parametrize("repo_id", ["mill", "", "a/b/c", "../x", "ann/", 5, None, "ann/mi ll"])
def test_a_wrong_repository_is_refused(pushed, make_prefix, repo_id):
    with pytest.raises(ConfigError, match="repo_id: expected 'name/repository'"):
        make_prefix().push_to_hub(repo_id)


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
@pytest.mark.parametrize(
    "failure",
    [errors.HfHubHTTPError("401 Unauthorized", response=RESPONSE), OSError("reset"), RuntimeError("x")],
    ids=["http", "os", "other"],
)
def test_errors_of_an_upload(pushed, monkeypatch, make_prefix, step, failure):
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(Hub, step, fail)
    with pytest.raises(ConfigError, match=r"'ann/mill' cannot be written on the hub.*logged in"):
        make_prefix().push_to_hub("ann/mill")


# ---- the card ----


def parts(card: str) -> tuple[dict[str, Any], str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_describes_the_prefix(make_prefix):
    prefix = make_prefix(**TRAINED)
    front, body = parts(model_card(prefix, "ann/mill"))
    assert front == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "library_name": "prefixfast",
        "pipeline_tag": "text-generation",
        "tags": ["peft", "prefix-tuning"],
    }
    assert 'Prefix.from_pretrained("ann/mill")' in body
    assert 'model="HuggingFaceTB/SmolLM2-135M"' in body
    for fact in (
        "| max_steps | 300 |",
        "| learning_rate | 0.05 |",
        "| metric: loss | 1.29661 |",
        "| numbers trained | 7 |",
        "| loss | token_mean |",
        prefix.digest,
    ):
        assert fact in body
    assert "max_length" not in body


def test_the_card_contains_no_text_of_the_training_data(make_prefix):
    assert "Alice" not in model_card(make_prefix(**TRAINED), "ann/mill")
    assert "Alice" in repr(TRAINED)


@pytest.mark.parametrize("name", ["/home/ann/models/llama", "C:\\models", "x: y\n- z", "", None])
def test_the_card_leaves_out_base_names_that_are_not_hub_ids(make_prefix, name):
    card = model_card(make_prefix(base={"name": name}), "ann/mill")
    assert "base_model" not in parts(card)[0]
    assert not name or name not in card


def test_the_card_of_a_prefix_that_peft_cannot_hold(make_prefix):
    front, body = parts(model_card(make_prefix(pos_start=0), "ann/mill"))
    assert front["tags"] == ["prefix-tuning"]
    assert "PEFT cannot hold it: text starts at another position" in body
    assert "PeftModel" not in body


def test_requires(make_prefix):
    prefix = make_prefix(**TRAINED)
    assert prefix.requires == {
        "base": "HuggingFaceTB/SmolLM2-135M",
        "dtype": "float32",
        "positions": 5,
        "prefixfast": ">=0.1.0",
    }
    assert make_prefix().requires["base"] is None
