"""Methods on the command line: train, generate and score with weights, and what a run says that it costs."""

import json

import pytest

from prefixfast import TunedWeights

ROWS = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(6)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return path


def test_weights_are_trained_used_and_evaluated(cli, folder, data, tmp_path):
    out, how = tmp_path / "w", ("--dtype", "float32")
    code, text, err = cli("train", folder, data, "-o", out, "--method", "top2", "--max-steps", 3, "--json", *how)
    assert code == 0, err
    weights, told = TunedWeights.from_pretrained(out), json.loads(text)["prefixes"]["prefix"]
    assert told["sizes"] == {n: getattr(weights, n) for n in ("num_stored", "num_trained", "nbytes")}
    assert told["cost"]["seconds_per_step"] > 0
    assert told["cost"]["peak_bytes"] > weights.nbytes
    for command in ("generate", "score"):
        with_weights, without = (
            cli(command, data, "-o", "-", "--model", folder, *more, *how) for more in (("--prefix", out), ())
        )
        assert with_weights.code == without.code == 0, with_weights.err
        assert len(with_weights.out.splitlines()) == len(ROWS)
        assert command == "generate" or with_weights.out != without.out
    code, _, err = cli("generate", data, "--prefix", out, "--prefix", out, "--model", folder, *how)
    assert code == 1
    assert "change the base for all requests" in err


@pytest.mark.parametrize("method", ["prefix", "full", "top2", "prompt", "icl"])
def test_a_dry_run_shows_sizes_time_and_memory_of_each_method(cli, folder, data, method):
    steps = () if method in ("prompt", "icl") else ("--max-steps", 5)
    code, out, err = cli("train", folder, data, "--method", method, "--dry-run", "--dtype", "float32", *steps)
    assert code == 0, err
    told = json.loads(out)
    assert told["stored_bytes"] == 4 * told["stored_numbers"] > 0
    assert (told["trained_numbers"] > 0) == bool(steps) == (told["seconds_per_step"] > 0)
    assert told["peak_bytes"] > 0
    assert (told["trained_numbers"] == told["base_bytes"] // 4) == (method == "full")


def test_a_file_with_options_of_a_method_is_printed_and_read(cli, folder, data, tmp_path):
    code, out, err = cli("train", folder, data, "--method", "icl", "--num-examples", 2, "--print-config")
    assert code == 0, err
    assert "learning_rate" not in out
    (tmp_path / "own.yaml").write_text(out)
    assert cli("train", folder, data, "-o", tmp_path / "p", "--config", tmp_path / "own.yaml").code == 0


@pytest.mark.parametrize("method", ["prompt", "icl"])
def test_a_method_without_steps_has_no_speed_plot_or_loss_after_training(cli, folder, data, tmp_path, method):
    code, out, err = cli("train", folder, data, "-o", tmp_path / "p", "--method", method, "--dtype", "float32")
    assert code == 0, err
    assert [word for word in ("speed", "plot", "after training", "at the end") if word in out] == []
    assert "on training rows" in out
    assert not (tmp_path / "p" / "loss.png").exists()
    held = ("--eval-data", data, "--overwrite")
    code, out, err = cli("train", folder, data, "-o", tmp_path / "p", "--method", method, "--dtype", "float32", *held)
    assert (code, "on held-out rows" in out, "before" in out) == (0, True, False), err


def test_weights_of_names_in_the_rows_have_no_next_command(cli, folder, tmp_path):
    data, how = tmp_path / "rows.jsonl", ("--max-steps", 1, "--dtype", "float32")
    data.write_text("".join(json.dumps(r | {"prefix": "ab"[i % 2]}) + "\n" for i, r in enumerate(ROWS)))
    for method, has_next in (("prefix", True), ("top2", False)):
        column = ("--prefix-column", "prefix", "--method", method, "-o", tmp_path / method, "--json")
        code, out, err = cli("train", folder, data, *column, *how)
        assert code == 0, err
        assert (json.loads(out)["next"] is not None) == has_next


def test_an_option_that_the_method_does_not_read_is_refused(cli, folder, data, tmp_path):
    code, _, err = cli("train", folder, data, "-o", tmp_path / "p", "--method", "full", "--prefix-length", 3)
    assert code == 1
    assert "prefix_length: method 'full' does not read it" in err
