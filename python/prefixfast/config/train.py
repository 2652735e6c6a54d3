"""`TrainConfig`, the options that say how a prefix is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self, Unpack

from prefixfast.config.fields import TrainConfigFields
from prefixfast.config.json_types import JSON
from prefixfast.config.options import COUNT, COUNT_OR_ZERO, FP32_MAX, INT32_MAX, SEED, Options, Range, option
from prefixfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """Options that say how a prefix is trained.

    ``recipe``, ``dtype``, ``token_budget``, ``gradient_checkpointing``, ``shard_base``, ``eval_fraction``,
    ``save_steps``, ``logging_steps`` and ``report_to`` are options of the whole run. Every other option means the same
    for a prefix that is trained alone and for one that is trained among others: with ``batch_size=10`` each prefix
    takes 10 examples in a step.

    Example:
        >>> TrainConfig.make({"batch_size": 4}, max_steps=10).batch_size
        4
        >>> TrainConfig.make(lr=1e-3)
        Traceback (most recent call last):
        prefixfast.errors.ConfigError: TrainConfig: unknown option 'lr'; did you mean learning_rate?
    """

    recipe: str = option(
        "default",
        "preset of options: default, paper, low-data or a YAML file; explicit options take precedence over it",
    )
    loss: Literal["token_mean", "sequence_sum"] = option(
        "token_mean",
        "reduction of the loss over a batch: 'token_mean' the mean over target tokens, 'sequence_sum' the sum "
        "over the tokens of an example and mean over examples, as Li & Liang",
    )
    num_train_epochs: float | None = option(
        None,
        "number of passes over the rows, ignored if max_steps is set; None is 10 passes, but at least 80 and at most "
        "400 steps, or 3 passes if these are more than 400 steps",
        Range(0, 1e7, above=True),
    )
    max_steps: int | None = option(
        None,
        "number of optimizer steps of each prefix; None is that of num_train_epochs",
        Range(1, 10**7),
    )
    batch_size: int = option(
        10,
        "number of examples of each prefix in one optimizer step, independent of how many prefixes are trained; a row "
        "is one example, or one for each of its refs",
        COUNT,
    )
    token_budget: int | Literal["auto"] = option(
        "auto",
        "largest number of tokens of a forward pass, which changes memory use, and results by rounding only; 'auto' "
        "starts at 4096, on CPUs with wide bases at 1024, and halves the budget and repeats the step when memory runs "
        "out",
        COUNT,
    )
    learning_rate: float | None = option(
        None,
        "peak learning rate; None is the default of the method, for keys and values 1.5 divided by the number of "
        "layers of the base to the power 1.3, at most 0.15, a tenth of that for a prefix as init, and a sixtieth for "
        "reparameterization 'mlp'; --dry-run prints it",
        Range(0, 1e6, above=True),
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option(
        "linear",
        "schedule of the learning rate after warm-up: 'linear' or 'cosine' decay that reaches zero after the last "
        "step, or constant",
    )
    warmup_steps: int = option(
        0, "number of first steps in which the learning rate rises linearly from zero", COUNT_OR_ZERO
    )
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW", Range(0, 1e6))
    max_grad_norm: float = option(
        1.0, "largest gradient norm of each prefix; larger gradients are clipped; 0 turns it off", Range(0, FP32_MAX)
    )
    max_length: int | None = option(
        None,
        "largest number of tokens of an example; None is the number of positions that the base model has for text",
        Range(2, INT32_MAX),
    )
    max_source_length: int | None = option(
        None,
        "largest number of tokens of the text that an encoder-decoder base model reads, special tokens included; None "
        "is the number of its encoder's positions",
        Range(1, INT32_MAX),
    )
    max_target_length: int | None = option(
        None,
        "largest number of tokens of the target of an encoder-decoder base model, end token included; None is the "
        "number of positions that its decoder has for text",
        Range(1, INT32_MAX),
    )
    overflow: Literal["error", "truncate", "skip"] = option(
        "error",
        "treatment of examples longer than max_length: 'error' raises, 'truncate' cuts the start of the prompt, 'skip' "
        "leaves the example out and counts it; for an encoder-decoder base model, of texts longer than "
        "max_source_length or max_target_length, whose end 'truncate' cuts before the end token",
    )
    gradient_checkpointing: bool = option(
        False,
        "whether to store each layer's input only and to recompute the rest in the backward pass, which takes less "
        "memory and about a third more time",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = option(
        "auto",
        "compute dtype of a base model that is given by name; 'auto' is bfloat16 on a GPU and on CPUs with AMX or "
        "AMD's AVX512-BF16, else float32; trained parameters are fp32, or fp64 for a base model in fp64",
    )
    shard_base: bool = option(
        False,
        "whether the processes that torchrun has started hold the layers of the base model together (FSDP2), for one "
        "that does not fit on a device",
    )
    shuffle: bool = option(True, "whether to draw a new order of the rows in every epoch")
    seed: int = option(0, "random seed of initialization, row order and dropout", SEED)
    eval_fraction: float = option(
        0.0,
        "fraction of each prefix's rows that is held out of training for evaluation, in place of eval_data; 0 holds "
        "out none",
        Range(0, 1, below=True),
    )
    eval_steps: int | None = option(
        None,
        "number of steps between evaluations on held-out rows; None evaluates before the first and after the last step "
        "of each prefix only",
        COUNT,
    )
    metric_for_best_model: Literal["auto", "eval_loss", "last"] = option(
        "auto",
        "state of a prefix that training returns: 'eval_loss' the one of the lowest loss on held-out rows, 'last' the "
        "one of the last step; 'auto' is eval_loss if there are held-out rows, else last",
    )
    early_stopping_patience: int | None = option(
        None,
        "number of consecutive evaluations without a new lowest eval_loss after which a prefix ends; None never ends "
        "early",
        COUNT,
    )
    save_steps: int | None = option(
        500,
        "number of steps between checkpoints in output_dir, from which resume goes on; None writes one only when "
        "training is interrupted",
        COUNT,
    )
    logging_steps: int = option(10, "number of steps between lines of log.jsonl", COUNT)
    report_to: Literal["none", "tensorboard", "wandb"] = option(
        "none", "service that also gets the lines of log.jsonl; 'none' is the file alone"
    )

    @classmethod
    def make(cls, config: Self | Mapping[str, JSON] | None = None, **fields: Unpack[TrainConfigFields]) -> Self:
        """Make a `TrainConfig` from another one or from a mapping, with some fields replaced.

        Args:
            config: `TrainConfig` or mapping of field names to values. None takes the defaults.
            fields: Fields of `TrainConfig`, which take precedence over ``config``.

        Returns:
            A new `TrainConfig`.

        Raises:
            ConfigError: If a name is unknown or a value is wrong.
        """
        return cls._replaced(config, fields)

    def validate(self) -> None:
        """Raise `ConfigError` for values out of range, and for values that exclude each other."""
        if self.early_stopping_patience and (self.eval_steps is None or self.metric_for_best_model == "last"):
            needs = "eval_steps beside it, and a metric_for_best_model other than 'last'"
            msg = f"TrainConfig.early_stopping_patience: expected {needs}"
            raise ConfigError(msg)
