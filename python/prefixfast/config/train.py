"""`TrainConfig`: how a prefix is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from prefixfast.config.options import Options, at_least, option
from prefixfast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Options):
    """How a prefix is trained. Everything but ``token_budget`` is per prefix: a prefix comes out the same alone or among thousands.

    Example:
        >>> TrainConfig.make({"batch_size": 4}, max_steps=10).batch_size
        4
        >>> TrainConfig.make(lr=1e-3)
        Traceback (most recent call last):
        prefixfast.errors.ConfigError: TrainConfig: unknown option 'lr'; did you mean learning_rate?
    """

    recipe: str = option(
        "default", "preset of fields, of which given ones win: default, paper, low-data, or a YAML file"
    )
    loss: Literal["token_mean", "sequence_sum"] = option(
        "token_mean", "mean over the batch's target tokens, or the paper's sum over tokens and mean over rows"
    )
    num_train_epochs: float = option(3.0, "passes over the rows; ignored when max_steps is given")
    max_steps: int | None = option(None, "optimizer steps of each prefix")
    batch_size: int = option(10, "examples of EACH prefix in one optimizer step (changes results)")
    token_budget: int | Literal["auto"] = option(
        "auto",
        "tokens in one forward pass (memory only, does not change results); 'auto': 4096, halved when memory runs out, and the step is made again",
    )
    learning_rate: float | None = option(
        None, "peak rate; by default 5e-2 for reparameterization 'none', 1e-3 for 'mlp'"
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option(
        "linear", "after warm-up, decay to zero at the last step, linearly or as a cosine, or stay"
    )
    warmup_steps: int = option(0, "steps in which the rate rises linearly from zero")
    weight_decay: float = option(0.0, "AdamW's decoupled decay")
    max_grad_norm: float = option(1.0, "clip each prefix's gradient to this norm; 0 turns it off")
    max_length: int | None = option(None, "longest row in tokens; by default what the model allows")
    overflow: Literal["error", "truncate", "skip"] = option(
        "error", "a row over max_length: raise, cut the start of its prompt, or leave it out (counted)"
    )
    gradient_checkpointing: bool = option(
        False,
        "keep only each layer's input for the backward pass and compute the rest again: less memory, about a third slower",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = option(
        "auto",
        "compute dtype of a base given by name; 'auto': as load chooses. What is trained is fp32 (fp64 with fp64)",
    )
    shuffle: bool = option(True, "draw a new order of the rows in every epoch; false keeps theirs")
    seed: int = option(0, "initialization, order of rows, dropout")
    eval_steps: int | None = option(
        None, "evaluate every so many steps; by default at each prefix's last step, when eval_data is given"
    )
    metric_for_best_model: Literal["auto", "eval_loss", "last"] = option(
        "auto",
        "which state of a prefix is kept: that of its lowest eval_loss, or the last one; 'auto': eval_loss when eval_data is given",
    )
    early_stopping_patience: int | None = option(
        None, "a prefix ends after so many evaluations in a row that were no better than its best one"
    )
    save_steps: int | None = option(
        500, "with output_dir a checkpoint every so many steps, to resume from; none: only when interrupted"
    )
    logging_steps: int = option(10, "a line of log.jsonl every so many steps")
    report_to: Literal["none", "tensorboard", "wandb"] = option("none", "also send the lines of the log there")

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work."""
        at_least(
            self,
            max_steps=1,
            batch_size=1,
            token_budget=1,
            warmup_steps=0,
            weight_decay=0,
            max_grad_norm=0,
            max_length=2,
            eval_steps=1,
        )
        at_least(self, logging_steps=1, save_steps=1, early_stopping_patience=1)
        if not self.num_train_epochs > 0:
            msg = f"TrainConfig.num_train_epochs: expected more than 0, got {self.num_train_epochs!r}"
            raise ConfigError(msg)
        if self.learning_rate is not None and not self.learning_rate > 0:
            msg = f"TrainConfig.learning_rate: expected more than 0, got {self.learning_rate!r}"
            raise ConfigError(msg)
        if self.early_stopping_patience and (self.eval_steps is None or self.metric_for_best_model == "last"):
            msg = "TrainConfig.early_stopping_patience: expected eval_steps beside it, and a metric_for_best_model other than 'last'"
            raise ConfigError(msg)
