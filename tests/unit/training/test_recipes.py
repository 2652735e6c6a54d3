"""Recipes, their precedence, and the fit of the MLP to initial values."""

from __future__ import annotations

import re

import pytest
import torch

import prefixfast
import tiny
from prefixfast import PrefixConfig, TrainConfig
from prefixfast.errors import ConfigError
from prefixfast.io.yaml import read_yaml
from prefixfast.model.text_kv import text_kv
from prefixfast.training import mlp
from prefixfast.training.job import JobArguments, prepare
from prefixfast.training.parameters import ParameterOptions, PrefixParameters
from prefixfast.training.recipes import read_recipe, recipe_names
from prefixfast.training.settings import GivenOptions, resolve_settings
from prefixfast.training.trainer import train
from token_rows import distance, rows

E2E_ROWS = [{"mr": "name[Alimentum], area[city centre]", "ref": "Alimentum is in the city centre."}] * 3
TEXT_ROWS = [{"prompt": f"{a}=", "completion": a * 3} for a in "abcd"]


def chosen(task="prompt", *, config=None, prefix_config=None, init=None, init_text=None, **fields):
    return resolve_settings(GivenOptions(config, prefix_config, fields, init, init_text), task)


def test_the_built_in_recipes():
    assert recipe_names() == ["default", "low-data", "paper"]
    plain = chosen()
    assert (plain.config, plain.prefix_config, plain.init, plain.init_text) == (
        TrainConfig(),
        PrefixConfig(),
        "text",
        None,
    )


def test_the_paper_recipes_of_summaries():
    got = chosen("xsum", recipe="paper")
    config, prefix = got.config, got.prefix_config
    assert (config.learning_rate, config.num_train_epochs, config.batch_size) == (5e-5, 30, 14)
    assert (config.loss, config.max_length, config.overflow) == ("token_mean", 572, "truncate")
    assert (prefix.prefix_length, prefix.encoder_hidden_size) == (100, 800)
    few = chosen("xsum", recipe="low-data")
    assert (few.init_text, few.config.warmup_steps, few.config.batch_size) == ("summarize", 100, 5)


def test_the_paper_recipe_beside_its_table():
    got = chosen("prompt", recipe="paper")
    config = got.config
    assert (config.learning_rate, config.num_train_epochs, config.batch_size) == (5e-5, 10, 5), "defaults of A.2"
    assert (config.loss, config.warmup_steps, config.weight_decay, config.max_grad_norm, config.lr_scheduler_type) == (
        "sequence_sum",
        0,
        0.0,
        1.0,
        "linear",
    )
    assert (got.init, got.prefix_config.reparameterization, got.prefix_config.encoder_hidden_size, config.seed) == (
        "random",
        "mlp",
        512,
        101,
    )
    assert got.prefix_config.prefix_length == 10


def test_the_low_data_recipe():
    got = chosen("e2e", recipe="low-data")
    assert (
        got.init,
        got.prefix_config.prefix_length,
        got.prefix_config.fit_steps,
        got.prefix_config.reparameterization,
    ) == ("text", "text", 500, "mlp")
    assert (got.config.batch_size, got.config.max_steps, got.config.eval_steps, got.config.learning_rate) == (
        10,
        200,
        50,
        5e-5,
    )


@pytest.mark.parametrize(
    "how",
    [
        {"learning_rate": 1e-3},
        {"config": {"learning_rate": 1e-3}},
        {"config": TrainConfig(learning_rate=1e-3, recipe="paper")},
    ],
)
def test_explicit_options_take_precedence(how):
    got = chosen(
        "e2e",
        **({"recipe": "paper"} if "recipe" not in str(how) else {}),
        prefix_config={"prefix_length": 7},
        init="zero",
        **how,
    )
    assert (got.config.learning_rate, got.config.batch_size, got.prefix_config.prefix_length, got.init) == (
        1e-3,
        10,
        7,
        "zero",
    )
    assert {"learning_rate", "prefix_length"} <= got.explicit
    assert "batch_size" not in got.explicit


def test_explicit_options_remove_options_that_overrule_them():
    assert chosen(recipe="low-data", num_train_epochs=3.0).config.max_steps is None
    assert chosen(recipe="low-data", reparameterization="none").prefix_config.fit_steps == 0
    assert chosen("summary", recipe="low-data").init_text == "summarize"
    assert chosen("summary", recipe="low-data", init="random").init_text is None


def test_a_recipe_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1e-4\nprefix_length: 3\ninit: zero\ntasks:\n  e2e: {max_steps: 5}\n")
    got = chosen("e2e", recipe=str(path), batch_size=2)
    assert (
        got.config.learning_rate,
        got.config.max_steps,
        got.config.batch_size,
        got.prefix_config.prefix_length,
        got.init,
    ) == (1e-4, 5, 2, 3, "zero")
    assert chosen("dart", recipe=str(path)).config.max_steps is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 1", "unknown option 'lr'; did you mean learning_rate"),
        ("recipe: paper", "unknown option 'recipe'"),
        ("tasks: {e2e: {lr: 1}}", "tasks.e2e: unknown option 'lr'"),
        ("tasks: [1]", "tasks: expected a mapping"),
        ("[1, 2]", "expected a mapping of options, got list"),
        ("a: [1", "cannot be read"),
        ("batch_size: 0", "expected at least 1"),
    ],
)
def test_wrong_recipe_files_are_refused(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        chosen(recipe=str(path))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("papers", "expected default, low-data, paper or a .yaml file, got 'papers'"), ("none.yaml", "cannot be read")],
)
def test_unknown_recipes_are_refused(recipe, message):
    with pytest.raises(ConfigError, match=message):
        read_recipe(recipe, "")
    with pytest.raises(ConfigError, match=message):
        train(tiny.make("gpt2"), rows(0, 2), recipe=recipe)


def test_yaml_1_2_numbers():
    assert read_yaml("[1e-3, 1E5, -2e+3, 1.5e-2, 12, 1e, e3, a1e3]") == [
        1e-3,
        1e5,
        -2e3,
        1.5e-2,
        12,
        "1e",
        "e3",
        "a1e3",
    ]


def test_training_with_the_low_data_recipe(base):
    """The init text gives the length, and the MLP is fitted to its keys and values before training."""
    prefix = train(
        base, TEXT_ROWS, recipe="low-data", init_text="abc de", max_steps=2, encoder_hidden_size=32, fit_steps=20
    )
    assert prefix.length == len("abc de")
    assert prefix.training["config"]["learning_rate"] == 5e-5
    words = train(base, TEXT_ROWS, init_text="abc de", prefix_length="text", max_steps=1, learning_rate=1e-12)
    assert words.length == 6
    near = train(
        base,
        TEXT_ROWS,
        recipe="low-data",
        init_text="abc de",
        max_steps=1,
        encoder_hidden_size=32,
        fit_steps=600,
        learning_rate=1e-12,
    )
    assert square_distance(near, words) < 0.7 * square_distance(prefix, words)


def square_distance(a, b) -> float:
    return sum((a.kv[n] - b.kv[n]).square().sum().item() for n in a.kv)


def reference_fit(goal: torch.Tensor, steps: int, seed: int, hidden: int) -> torch.Tensor:
    """Output ``[P, 2 * L * E]`` of one network after the paper's fit, in plain PyTorch."""
    torch.manual_seed(seed)
    width = 32
    embedding, first, second = (
        torch.nn.Embedding(len(goal), width),
        torch.nn.Linear(width, hidden),
        torch.nn.Linear(hidden, goal.shape[1]),
    )
    optimizer = torch.optim.Adam([*first.parameters(), *second.parameters()], lr=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(second(torch.tanh(first(embedding.weight))), goal).backward()
        optimizer.step()
    return second(torch.tanh(first(embedding.weight))).detach()


def test_stacked_fits_equal_single_fits():
    with prefixfast.load(tiny.make("gpt2")) as model:
        texts = [text_kv(model, ids, 3) for ids in ([5, 6, 7], [8, 9, 10])]
        init, seeds = [texts[0], texts[1], None, texts[0], texts[0]], [0, 0, 0, 4, 0]
        config = PrefixConfig(prefix_length=3, reparameterization="mlp", encoder_hidden_size=16, fit_steps=40)
        params = PrefixParameters.make(
            model.layers, init, ParameterOptions(config, True, seeds, torch.float32, model.device)
        )
        got = torch.stack(params.current(), 1).view(5, 3, -1)
        for i in (0, 1, 3, 4):
            goal = torch.stack([t for kv in init[i] for t in kv], 1).reshape(3, -1)
            assert (got[i] - reference_fit(goal, 40, seeds[i], 16)).abs().max() < 1e-5
        assert torch.equal(got[0], got[4])
        assert (got[2] - reference_fit(torch.zeros(3, got.shape[2]), 0, 0, 16)).abs().max() < 1e-6, (
            "a random one stays as drawn"
        )


def test_equal_initial_values_are_fitted_once(monkeypatch):
    fitted = []
    run = mlp._run_mlp
    monkeypatch.setattr(
        mlp, "_run_mlp", lambda embedding, *rest: (fitted.append(len(embedding)), run(embedding, *rest))[1]
    )
    with prefixfast.load(tiny.make("gpt2")) as model:
        text = text_kv(model, [5, 6, 7], 3)
        for layers in (None, (0, 2)):
            config = PrefixConfig(
                prefix_length=3, reparameterization="mlp", encoder_hidden_size=16, fit_steps=4, layers=layers
            )
            fitted.clear()
            PrefixParameters.make(
                model.layers,
                [text, None, text, text],
                ParameterOptions(config, True, 0, torch.float32, model.device),
            )
            assert fitted == [1, 1, 1, 1, 4], "four steps for all, then the four prefixes"


def test_embedding_dim_is_the_input_width_of_the_mlp():
    prefix = train(
        tiny.make("gpt2"),
        rows(0, 3),
        init="random",
        embedding_dim=7,
        encoder_hidden_size=5,
        prefix_length=4,
        max_steps=1,
    )
    assert prefix.num_trained == 4 * 7 + 7 * 5 + 5 + 5 * 192 + 192
    assert (
        distance(
            prefix,
            train(tiny.make("gpt2"), rows(0, 3), init="random", encoder_hidden_size=5, prefix_length=4, max_steps=1),
        )
        > 1e-3
    )


# Rows of table 6 of Li & Liang (ACL 2021, appendix A) in the order of the paper: learning rate, epochs, batch size,
# prefix length.
TABLE_6 = """
prefix         e2e    8e-05  5 10   5
prefix         webnlg 5e-05  5  5   5
prefix         dart   5e-05 10  5  10
prefix         xsum   5e-05 30 14 100
adapter(3%)    e2e    5e-05  5  5   -
adapter(0.1%)  e2e    8e-05 10  5   -
adapter(3%)    webnlg 5e-05  5  5   -
adapter(0.1%)  webnlg 5e-05 10  5   -
adapter(3%)    dart   5e-05  5  5   -
adapter(0.1%)  dart   8e-05  5  5   -
full           e2e    5e-05  5 10   -
full           webnlg 1e-05 10  6   -
full           dart   1e-05 10  6   -
top2           e2e    5e-05  5 10   -
top2           webnlg 5e-05 10  9   -
top2           dart   5e-05  5  5   -
"""


@pytest.mark.parametrize("row", TABLE_6.strip().splitlines(), ids=lambda row: "-".join(row.split()[:2]))
def test_the_paper_recipe_is_table_6(row):
    name, task, rate, epochs, batch, length = row.split()
    method, _, size = name.partition("(")
    own = {"method": method} | ({"adapter_size": float(size.rstrip("%)")) / 100} if size else {})
    got = chosen(task, recipe="paper", **own)
    config = got.config
    assert (config.learning_rate, config.num_train_epochs, config.batch_size) == (float(rate), int(epochs), int(batch))
    assert config.loss == ("sequence_sum" if method == "prefix" and task != "xsum" else "token_mean")
    if length != "-":
        assert got.prefix_config.prefix_length == int(length)
    if size:
        assert got.method_config.adapter_size == own["adapter_size"]


def test_adapters_of_the_paper_have_two_sizes():
    assert (
        chosen("e2e", recipe="paper", method="adapter").config
        == chosen("e2e", recipe="paper", method="adapter", adapter_size=0.03).config
    )
    with pytest.raises(ConfigError, match=re.escape("recipe paper has values for 0.03 and 0.001, got 0.01")):
        chosen("e2e", recipe="paper", method="adapter", adapter_size=0.01)
    assert chosen("e2e", recipe="low-data", method="adapter", adapter_size=0.01).method_config.adapter_size == 0.01


def test_lora_of_the_paper_recipe_is_that_of_hu_et_al():
    """The command for GPT-2 medium on E2E in the code of Hu et al. 2021 (examples/NLG of microsoft/LoRA)."""
    command = "--clip 0.0 --lr 0.0002 --weight_decay 0.01 --warmup_step 500 --max_epoch 5 --lora_dim 4 --lora_alpha 32"
    words = command.split()
    theirs = {k: float(v) for k, v in zip(words[::2], words[1::2], strict=True)}
    got = chosen("e2e", recipe="paper", method="lora")
    config, method = got.config, got.method_config
    assert theirs == {
        "--clip": config.max_grad_norm,
        "--lr": config.learning_rate,
        "--weight_decay": config.weight_decay,
        "--warmup_step": config.warmup_steps,
        "--max_epoch": config.num_train_epochs,
        "--lora_dim": method.lora_rank,
        "--lora_alpha": method.lora_alpha,
    }
    assert (config.batch_size, config.lr_scheduler_type) == (8, "linear")
    assert chosen("e2e", recipe="paper", method="lora", lora_rank=8).method_config.lora_rank == 8


@pytest.mark.parametrize("recipe", ["paper", "low-data"])
def test_rates_of_an_mlp_are_for_an_mlp_alone(recipe):
    """The rate of an MLP changes embeddings, or keys and values themselves, by too little to learn anything."""
    assert chosen("e2e", recipe=recipe).config.learning_rate < 1e-4
    assert chosen("e2e", recipe=recipe, reparameterization="mlp").config.learning_rate < 1e-4
    assert chosen("e2e", recipe=recipe, method="infix").config.learning_rate < 1e-4
    assert chosen("e2e", recipe=recipe, method="embedding").config.learning_rate is None
    assert chosen("e2e", recipe=recipe, reparameterization="none").config.learning_rate is None
    assert chosen("e2e", recipe=recipe, reparameterization="none", learning_rate=0.1).config.learning_rate == 0.1
    assert chosen("e2e", recipe="low-data", reparameterization="mlp").prefix_config.fit_steps == 500
    assert chosen("xsum", recipe="low-data", init="text").init_text == "summarize"


def test_the_low_data_recipe_of_full_fine_tuning():
    got = chosen("xsum", recipe="low-data", method="full").config
    assert (got.batch_size, got.num_train_epochs, got.max_steps, got.loss) == (6, 3, None, "token_mean")
    assert chosen("xsum", recipe="low-data").config.num_train_epochs == 20


def test_a_recipe_file_with_options_of_methods(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "num_examples: 2\nadapter_size: 0.5\nmethods:\n  adapter:\n    sizes:\n      0.5: {batch_size: 3}\n"
        "      0.25:\n        tasks: {dart: {batch_size: 4}}\n"
    )
    got = chosen("e2e", recipe=str(path), method="adapter")
    assert (got.method_config.adapter_size, got.config.batch_size) == (0.5, 3)
    assert chosen("dart", recipe=str(path), method="adapter", adapter_size=0.25).config.batch_size == 4
    path.write_text(path.read_text().replace("adapter_size: 0.5", "adapter_size: [1]"))
    with pytest.raises(ConfigError, match=r"adapter_size: expected float, got \[1\]"):
        chosen("e2e", recipe=str(path), method="adapter")
    assert chosen("e2e", recipe=str(path), method="icl").method_config.num_examples == 2
    assert chosen("e2e", recipe=str(path)).method_config.num_examples == 4, "prefix does not read it"


def test_a_sweep_has_the_values_of_each_variant():
    """Values of the recipe that depend on an option follow the variant of a sweep."""

    def variants(**sweep):
        fields = {"recipe": "paper", **({"method": "adapter"} if "adapter_size" in sweep else {})}
        job = prepare(JobArguments(E2E_ROWS, task="e2e", sweep=sweep, fields=fields))
        return [j.config for group in job.groups for j in group.jobs]

    assert [(c.learning_rate, c.num_train_epochs) for c in variants(adapter_size=[0.03, 0.001])] == [
        (5e-5, 5),
        (8e-5, 10),
    ]
    assert [c.learning_rate for c in variants(reparameterization=["none", "mlp"])] == [None, 8e-5]
    assert [c.learning_rate for c in variants(learning_rate=[1e-2, 1e-3])] == [1e-2, 1e-3]
    with pytest.raises(ConfigError, match="recipe paper has values for"):
        variants(adapter_size=[0.03, 0.02])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("methods: [full]", "methods: expected a mapping of methods, got list"),
        ("methods: {ful: {}}", "did you mean full"),
        ("methods: {full: {lr: 1}}", "methods.full: unknown option 'lr'"),
        ("methods: {full: {tasks: {e2e: {lr: 1}}}}", "methods.full: tasks.e2e: unknown option 'lr'"),
        ("methods: {full: {sizes: {}}}", "methods.full: unknown option 'sizes'"),
        ("methods: {adapter: {sizes: [1]}}", "methods.adapter.sizes: expected a mapping of values of adapter_size"),
        ("methods: {adapter: {sizes: {big: {}}}}", "methods.adapter.sizes: expected values of adapter_size, got 'big'"),
        ("methods: {adapter: {sizes: {0.1: {lr: 1}}}}", "methods.adapter.sizes.0.1: unknown option 'lr'"),
        ("method: full", "unknown option 'method'"),
        ("lora_rank: 0", "lora_rank: expected at least 1"),
    ],
)
def test_a_wrong_part_of_methods_is_refused(tmp_path, text, error):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(error)):
        chosen("e2e", recipe=str(tmp_path / "own.yaml"), method="lora")
