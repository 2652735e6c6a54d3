"""The summary of train: 80 columns, losses, places, a command that runs as it is printed, JSON, and advice."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from prefixfast import Prefix, TrainRun
from prefixfast.cli import train_summary
from prefixfast.cli.train_summary import NO_PLOT, Summary
from prefixfast.training.train_run import RunTotals

FAST = ("--batch-size", 4, "--prefix-length", 3, "--dtype", "float32")
METRICS = {
    "first_loss": 4.5,
    "loss": 0.25,
    "steps": 30.0,
    "skipped_steps": 0.0,
    "rows": 12.0,
    "examples": 15.0,
    "skipped_rows": 1.0,
    "truncated_rows": 2.0,
}
HELD_OUT = {"eval_loss_before": 4.0, "eval_loss": 1.5, "best_step": 20.0, "eval_rows": 3.0}
TOTALS = RunTotals("org/model", "float32", "cpu", 300, 6000, 12.5)


def run(make_prefix, **metrics) -> TrainRun:
    """Result of a run with one prefix for each keyword argument."""
    prefixes = {n: make_prefix(training={"config": {"learning_rate": 0.05}}) for n in metrics}
    return TrainRun(prefixes, dict(metrics), [], totals=TOTALS)


def summary(result: TrainRun, output: Path | None = Path("guests"), store: Path | None = None, **change) -> Summary:
    values = {"is_single": len(result) == 1, "data": {"": "guests.csv"}, "dtype": None, "encoding": None, **change}
    return Summary(result, output, store, **values)


def in_shell(command: str) -> list[str]:
    """Words of a command; `shlex` does not know that a shell drops a line break behind a backslash."""
    return shlex.split(command.replace("\\\n", ""))


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "my rows.jsonl"
    rows = [{"prompt": f"{a}=", "completion": a * 3} for a in "abcdefgh"]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf8")
    return path


def test_the_lines_say_what_a_first_user_asks(make_prefix, monkeypatch):
    lines = summary(run(make_prefix, prefix=METRICS | HELD_OUT)).lines(Path("guests/loss.png"))
    text = "\n".join(lines)
    for fact in (
        "1 prefix in 12 s",
        "org/model, float32 on cpu",
        "12, 15 examples, 1 skipped, 2 truncated; held out: 3",
        "30 steps, 480 tokens/s",
        "4 before and 1.5 after training, on held-out rows",
        "guests/loss.png",
        "prefixfast generate guests.csv -o texts.jsonl --prefix guests",
    ):
        assert fact in text
    monkeypatch.setattr(train_summary, "_has_matplotlib", lambda: False)
    without = "\n".join(summary(run(make_prefix, prefix=METRICS)).lines(None))
    assert "4.5 at the start, 0.25 at the end" in without
    assert " ".join(NO_PLOT.split()) in " ".join(without.split())
    assert "advice" not in without


@pytest.mark.parametrize("folder", ["guests", "a folder/of ours", "/home/somebody/" + "deep/" * 25 + "guests"])
def test_no_line_is_longer_than_80_columns_except_for_a_single_long_name(make_prefix, folder):
    found = summary(
        run(make_prefix, prefix=METRICS | {"loss": 5.0}),
        Path(folder),
        Path("stores") / folder,
        dtype="float32",
    )
    lines = found.lines(Path(folder) / "loss.png")
    too_long = [line for line in lines if len(line) > 80]
    assert [line for line in too_long if folder not in line] == []
    if len(folder) < 40:
        assert too_long == []


@pytest.mark.parametrize("folder", ["guests", "a folder", "it's; rm -rf $HOME", "/deep" * 30])
def test_the_command_is_quoted_for_the_shell_also_over_several_lines(make_prefix, folder):
    found = summary(
        run(make_prefix, prefix=METRICS), Path(folder), data={"": "my rows.csv"}, dtype="bfloat16", encoding="cp1252"
    )
    lines = found.lines(None)
    start = next(i for i, line in enumerate(lines) if line.startswith("  next"))
    words = in_shell("\n".join(lines[start:]))
    assert words[1:] == found.next_command()
    assert words[1:] == [
        *("prefixfast", "generate", "my rows.csv", "-o", "texts.jsonl", "--prefix", folder),
        *("--encoding", "cp1252", "--dtype", "bfloat16"),
    ]


def test_several_prefixes_have_their_own_losses_files_and_folders(make_prefix):
    result = run(make_prefix, ann=METRICS, bob=METRICS | {"loss": 6.0, "steps": 40.0})
    found = summary(result, Path("users"), data={"ann": "ann.csv", "bob": "bob.csv"})
    text = "\n".join(found.lines(None))
    assert "2 prefixes in" in text
    assert "24, 30 examples" in text
    assert "30 to 40 steps" in text
    assert "bob: the training loss rose" in " ".join(text.split())
    assert found.next_command()[2:] == ["ann.csv", "-o", "texts.jsonl", "--prefix", "users/ann"]
    in_store = summary(result, None, Path("shop"), data={"": "all.csv"})
    assert in_store.next_command()[2:] == ["all.csv", "-o", "texts.jsonl", "--store", "shop", "--prefix", "ann"]
    many = summary(run(make_prefix, **{f"user{i}": METRICS | {"loss": 6.0} for i in range(30)}), Path("users"))
    assert len(many.lines(None)) < 20
    assert "and 27 prefixes more" in "\n".join(many.lines(None))


def test_json_has_the_same_facts(make_prefix):
    values = summary(run(make_prefix, prefix=METRICS | {"loss": 5.0})).values(None)
    values = json.loads(json.dumps(values))
    assert (values["base"], values["tokens"], values["output"], values["plot"]) == ("org/model", 6000, "guests", None)
    assert values["prefixes"]["prefix"]["metrics"]["first_loss"] == 4.5
    assert "learning_rate (now 0.05)" in values["prefixes"]["prefix"]["advice"]
    assert values["next"].startswith("prefixfast generate guests.csv")


def test_the_printed_command_runs_and_the_plot_lies_beside_the_prefix(cli, folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("train", folder, data, "-o", "p", *FAST, "--max-steps", 2, "--eval-fraction", 0.25)
    assert code == 0, err
    assert (tmp_path / "p" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert Prefix.from_pretrained(tmp_path / "p").training["metrics"]["eval_rows"] == 2
    words = in_shell(out[out.index("prefixfast generate") :])
    code, _, err = cli(*words[1:], "--max-new-tokens", 2)
    assert code == 0, err
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 8


def test_json_alone_is_printed_on_request(cli, folder, data, tmp_path):
    code, out, err = cli("train", folder, data, "-o", tmp_path / "p", *FAST, "--max-steps", 2, "--json")
    assert code == 0, err
    assert json.loads(out)["prefixes"]["prefix"]["metrics"]["steps"] == 2


def test_without_matplotlib_a_line_names_the_extra(cli, folder, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = cli("train", folder, data, "-o", tmp_path / "p", *FAST, "--max-steps", 2)
    assert code == 0, err
    assert "prefixfast[train]" in out
    assert not (tmp_path / "p" / "loss.png").exists()


def test_a_loss_that_does_not_fall_is_said_once(cli, folder, data, tmp_path):
    how = (*FAST, "--batch-size", 8, "--max-steps", 3)
    code, out, err = cli("train", folder, data, "-o", tmp_path / "p", *how, "--learning-rate", "1e-9")
    assert code == 0, err
    assert "learning_rate (now 1e-09)" in " ".join(out.split())
    assert "learning_rate (now" not in err


def test_the_printed_config_and_the_log_show_values_in_place_of_automatic_ones(cli, folder, data, tmp_path, caplog):
    caplog.set_level("INFO")
    how = ("--prefix-length", 3, "--max-steps", 1)
    shown = {
        init: yaml.safe_load(
            cli("train", folder, data, "-o", tmp_path / "p", *how, "--init", init, "--print-config").out
        )
        for init in ("text", "random")
    }
    assert [v["reparameterization"] for v in shown.values()] == ["none", "mlp"]
    assert all(v["learning_rate"] is None for v in shown.values())  # it follows the base, which is not loaded
    assert shown["text"]["dtype"] in ("float32", "bfloat16")
    code, _, err = cli("train", folder, data, "-o", tmp_path / "p", *how)
    assert code == 0, err
    saved = Prefix.from_pretrained(tmp_path / "p").training["config"]
    assert saved["learning_rate"] > 0
    start = next(line for line in caplog.messages if line.startswith("training 1 prefix "))
    rate = f"learning_rate {saved['learning_rate']:g}"
    assert [w for w in (rate, "init text", "3 prefix rows", shown["text"]["dtype"]) if w not in start] == []


def test_a_sweep_names_its_best_prefix_and_generates_with_it(make_prefix):
    losses = {1: 1.5, 2: 0.5, 3: 0.9}
    swept = {f"learning_rate={r}": METRICS | HELD_OUT | {"eval_loss": loss} for r, loss in losses.items()}
    result = run(make_prefix, **swept)
    result.variants.update({n: {"of": "prefix", "learning_rate": i + 1.0} for i, n in enumerate(swept)})
    made = summary(result, Path("runs"), is_single=False)
    assert "runs/learning_rate=2" in made.next_command()
    assert any("best" in line and "learning_rate=2" in line and "0.5" in line for line in made.lines(None))


def test_counts_of_a_million_and_more_have_all_digits(make_prefix):
    many = METRICS | {"rows": 1234567.0, "examples": 1234568.0, "skipped_rows": 7654321.0, "steps": 1000001.0}
    text = "\n".join(summary(run(make_prefix, prefix=many)).lines(None))
    assert [n for n in ("1234567", "1234568 examples", "7654321 skipped", "1000001 steps") if n not in text] == []


def test_a_run_in_which_every_prefix_failed_names_no_next_command(make_prefix):
    failed = TrainRun({}, {}, [], failed={"ann": "no rows"}, totals=TOTALS)
    found = summary(failed, Path("users"), data={"ann": "ann.csv"})
    assert [line for line in found.lines(None) if "next" in line] == []
    assert found.values(None)["next"] is None


def test_rows_that_name_their_prefixes_are_given_back_with_all_of_these(make_prefix):
    result = run(make_prefix, ann=METRICS, bob=METRICS)
    how = {"data": {"": "all.csv"}, "rows_name_prefixes": True}
    assert summary(result, Path("users"), **how).next_command()[-2:] == ["--prefixes", "users"]
    assert summary(result, None, Path("shop"), **how).next_command()[-2:] == ["--store", "shop"]


def test_the_next_command_repeats_the_encoding_and_reads_the_rows(cli, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "prefix,prompt,completion\nann,M\u00fcg,a\nbob,C\u00fcp,b\n"
    Path("rows.csv").write_bytes(text.encode("cp1252"))
    how = ("--encoding", "cp1252", "--prefix-column", "prefix", "--json", "--max-steps", 1)
    done = cli("train", folder, "rows.csv", "-o", "p", *FAST, *how)
    assert done.code == 0, done.err
    words = shlex.split(json.loads(done.out)["next"])
    assert cli(*words[1:], "--max-new-tokens", 2, "--max-num-seqs", 2).code == 0
    records = map(json.loads, Path("texts.jsonl").read_text(encoding="utf8").splitlines())
    assert [record["prompt"] for record in records] == ["M\u00fcg", "C\u00fcp"]


@pytest.mark.parametrize("error", [ValueError("backend"), OSError(28, "No space left on device")])
def test_a_plot_that_cannot_be_drawn_loses_no_summary(cli, folder, data, tmp_path, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(TrainRun, "plot", fail)
    done = cli("train", folder, data, "-o", tmp_path / "p", *FAST, "--max-steps", 1, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["plot"] is None
    assert Prefix.from_pretrained(tmp_path / "p").length == 3
