"""`PrefixTrainer`, which trains one prefix with transformers' `Trainer`: its loop, callbacks, reports and checkpoints.

The model of the `Trainer` is a module of the prefix's parameters alone, whose forward pass is the packed forward pass
of the base model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn, Self, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from prefixfast.config import PrefixConfig
from prefixfast.config.fields import PrefixConfigFields
from prefixfast.config.json_types import JSON
from prefixfast.data.rows import Rows
from prefixfast.data.task import Task
from prefixfast.errors import ConfigError, shown
from prefixfast.integrations.hf_module import Collator, EpochSampler, ExampleNumbers, PrefixModule
from prefixfast.model.base import Model
from prefixfast.model.load import load
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.arguments import BaseModel
from prefixfast.training.artifact import ArtifactBuilder
from prefixfast.training.defaults import default_learning_rate
from prefixfast.training.examples import concat_examples
from prefixfast.training.group_data import GroupData, depth, tokenize_group
from prefixfast.training.groups import Init
from prefixfast.training.job import JobArguments, TrainJob, prepare
from prefixfast.training.methods.state import make

logger = logging.getLogger(__name__)
DEFAULT_RATE = 5e-5  # of TrainingArguments, for the weights of a whole model
# Arguments that have no right effect here, with the values that they may have and the reason.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(
        ("fp16", "bf16", "fp16_full_eval", "bf16_full_eval"),
        ((False, None), "the base computes in its own dtype; load it with dtype='bfloat16'"),
    ),
    **dict.fromkeys(
        ("gradient_checkpointing", "activation_checkpointing"),
        ((False, None), "the base is no module of the Trainer; train(..., gradient_checkpointing=True) has it"),
    ),
    "torch_compile": ((False, None), "the packed forward pass is not compiled"),
    "label_smoothing_factor": ((0, 0.0), "the loss is the cross-entropy of the targets"),
    "neftune_noise_alpha": ((None,), "it changes embeddings of the base"),
    "auto_find_batch_size": ((False,), "it changes the batches of a step"),
    "use_liger_kernel": ((False,), "it changes layers of the base"),
    "push_to_hub": ((False,), "trainer.prefix.push_to_hub uploads the prefix with its model card"),
    "deepspeed": ((None,), "train(...) has several processes"),
    "fsdp": ((None, "", []), "train(...) has several processes"),
    "world_size": ((1,), "train(...) has several processes"),
    "n_gpu": ((0, 1), "it copies the module to each GPU; make one visible (CUDA_VISIBLE_DEVICES)"),
    "train_sampling_strategy": (("random", "sequential"), "the order of the rows is that of train(...)"),
}


class PrefixTrainerFields(PrefixConfigFields, total=False):
    """Fields of `PrefixConfig`, and those of `TrainConfig` that say how rows are read."""

    max_length: int | None
    max_source_length: int | None
    max_target_length: int | None
    overflow: Literal["error", "truncate", "skip"]


class PrefixTrainer(Trainer):
    """transformers' `Trainer` for one prefix on a frozen base model.

    The `TrainingArguments` say how the prefix is trained, and the other arguments what is learned of which rows, as for
    `train`. Callbacks, ``report_to``, checkpoints, ``resume_from_checkpoint`` and ``load_best_model_at_end`` are those
    of the `Trainer`. The prefix is up to rounding the one that `train` gives for the same rows and options.

    Every folder that the trainer saves holds the prefix, which `Prefix.from_pretrained` reads. The base model is
    attached until `close`.

    Args:
        model: Base model: hub id, folder, Hugging Face model or `Model`.
        args: Options of training. ``learning_rate`` is for keys and values, where 5e-5, the default of
            `TrainingArguments`, is far too low and a warning names that of prefixes.
        train_dataset: Training rows of one prefix, as `train` takes them.
        eval_dataset: Held-out rows, as `train` takes them.
        task: Task that turns rows into prompts and targets; None chooses it by the keys of the rows.
        prompt: Template of the prompt for rows with columns of your own.
        target: Column of the target, or a template of columns.
        table: Columns that are written as a table, in the place of ``prompt``.
        init: Initial values, as for `train`.
        init_text: Text of ``init="text"``, None for the task's.
        on_top_of: Frozen prefix that comes before the trained one.
        callbacks: Callbacks of the `Trainer`.
        prefix_config: Options of what is learned, a `PrefixConfig` or a mapping.
        fields: Fields of `PrefixConfig`, ``max_length``, ``max_source_length``, ``max_target_length`` and
            ``overflow``.

    Raises:
        ConfigError: If an argument has no right effect here, or options do not fit each other or the base model.
        DataError: If rows are malformed.
        BaseMismatchError: If a given prefix was made for another base model.

    Example:
        >>> from transformers import TrainingArguments
        >>> rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "3+4=", "completion": "7"}]
        >>> args = TrainingArguments("run", max_steps=2, learning_rate=0.05, report_to="none", use_cpu=True)
        >>> with PrefixTrainer(base, args, rows, prefix_length=4) as trainer:
        ...     steps = trainer.train().global_step
        {'train_runtime': ...}
        >>> steps, trainer.prefix.length
        (2, 4)
    """

    def __init__(
        self,
        model: BaseModel,
        args: TrainingArguments,
        train_dataset: Rows,
        eval_dataset: Rows | None = None,
        *,
        task: str | Task | Mapping[str, JSON] | None = None,
        prompt: str | None = None,
        target: str | None = None,
        table: Sequence[str] | None = None,
        init: Init | None = None,
        init_text: str | None = None,
        on_top_of: Prefix | None = None,
        callbacks: list[TrainerCallback | type[TrainerCallback]] | None = None,
        prefix_config: PrefixConfig | Mapping[str, JSON] | None = None,
        **fields: Unpack[PrefixTrainerFields],
    ) -> None:
        check_arguments(args)
        given = JobArguments(
            train_dataset,
            task=task,
            prompt=prompt,
            target=target,
            table=table,
            eval_data=eval_dataset,
            init=init,
            init_text=init_text,
            on_top_of=on_top_of,
            prefix_config=prefix_config,
            fields={**fields, **_train_fields(args)},
        )
        job = prepare(given)
        if not job.rows.is_single:
            msg = "train_dataset: expected the rows of one prefix, got rows by name; train(...) trains many prefixes"
            raise ConfigError(msg)
        self._owns_base = not isinstance(model, Model)
        self.base = load(model)
        try:
            self._begin(job, args, callbacks)
        except BaseException:
            self.close()
            raise

    def _begin(
        self, job: TrainJob, args: TrainingArguments, callbacks: list[TrainerCallback | type[TrainerCallback]] | None
    ) -> None:
        """Make the initial prefix, and the `Trainer` with it."""
        if self.base.device.type != args.device.type:
            msg = (
                f"args: the Trainer uses {args.device} and the base is on {self.base.device}; load the base there, or "
                "give TrainingArguments(use_cpu=True)"
            )
            raise ConfigError(msg)
        data = tokenize_group(self.base, job.for_model(self.base), 0)
        _warn_of_rate(data)
        state, count = make(data), len(data.dataset.examples.num_targets)
        self._builder, self._is_first = ArtifactBuilder.make(data, state), True
        examples, held_out = data.dataset.examples, None
        if data.eval_dataset is not None:
            examples = concat_examples([examples, data.eval_dataset.examples])
            held_out = ExampleNumbers(range(count, len(examples.num_targets)))
        super().__init__(
            model=PrefixModule(self.base, state, examples),
            args=args,
            data_collator=Collator(examples),
            train_dataset=ExampleNumbers(range(count)),
            eval_dataset=held_out,
            callbacks=callbacks,
        )

    @property
    def prefix(self) -> Prefix:
        """The prefix as it is now, after ``load_best_model_at_end`` that of the best checkpoint."""
        module = self._module
        tensors = module.state.split(module.state.current(), 0)
        found = self._builder.build(0, tensors, _metrics(self.state), {})
        assert isinstance(found, Prefix)
        return found

    @property
    def _module(self) -> PrefixModule:
        module: Any = self.model
        found: PrefixModule = module
        return found

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train from the start or from a checkpoint, as the `Trainer` does, also after a run that was interrupted."""
        self._is_first = True
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Take the forward and backward pass of a batch; the first one of a step computes the keys and values."""
        module = self._module
        with module.state.applied():
            if self._is_first:
                module.state.refresh(np.full(1, self.state.global_step))
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._is_first = bool(self.accelerator.sync_gradients)
            if self._is_first:
                module.collect_gradients()
        return loss

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader[int],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean cross-entropy of the target tokens of all held-out rows."""
        module, total, count, number = self._module, 0.0, 0, 0
        self.callback_handler.eval_dataloader = dataloader
        with module.state.applied():
            module.state.refresh(np.zeros(1, np.int64), dropout=False)
            for inputs in dataloader:
                targets = len(inputs["labels"])
                total += float(module(**inputs)["loss"]) * targets
                count, number = count + targets, number + len(inputs["examples"])
                self.control: TrainerControl = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        metrics = {f"{metric_key_prefix}_loss": total / count}
        return EvalLoopOutput(predictions=(), label_ids=None, metrics=metrics, num_samples=number)

    def evaluate(
        self, eval_dataset: None = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate the prefix on the held-out rows.

        Args:
            eval_dataset: None, for the rows that the trainer was made with.
            ignore_keys: Argument of the `Trainer` without effect.
            metric_key_prefix: Start of the names of the metrics.

        Raises:
            ConfigError: If other rows are given, or there are none.
        """
        if eval_dataset is not None or self.eval_dataset is None:
            got = "other rows" if eval_dataset is not None else "a trainer without held-out rows"
            msg = f"evaluate: expected the eval_dataset of PrefixTrainer, got {got}; score takes any rows with a prefix"
            raise ConfigError(msg)
        found: dict[str, float] = super().evaluate(None, ignore_keys, metric_key_prefix)
        return found

    def predict(self, *args: object, **fields: object) -> NoReturn:
        """Refuse the call, since a prefix makes texts with `generate`.

        Raises:
            ConfigError: Always.
        """
        msg = "predict: PrefixTrainer has no predictions; use generate(rows, trainer.prefix) or score"
        raise ConfigError(msg)

    def close(self) -> None:
        """Restore a Hugging Face model; the prefix stays."""
        if self._owns_base:
            self.base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _get_train_sampler(self, train_dataset: object = None) -> EpochSampler:
        config = self._builder.data.group.jobs[0].config
        assert self.train_dataset is not None
        return EpochSampler(len(self.train_dataset), config.seed, shuffle=config.shuffle)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.prefix.save_pretrained(output_dir or str(self.args.output_dir), overwrite=True)


def check_arguments(args: TrainingArguments) -> None:
    """Raise `ConfigError` for arguments of the `Trainer` that have no right effect on a prefix."""
    if not isinstance(args, TrainingArguments):
        msg = f"args: expected TrainingArguments of transformers, got {shown(args)}"
        raise ConfigError(msg)
    for name, (allowed, reason) in REFUSED.items():
        if (value := getattr(args, name, allowed[0])) not in allowed:
            expected = " or ".join(map(repr, allowed))
            msg = f"args: {name}: expected {expected}, got {shown(value)}: {reason}"
            raise ConfigError(msg)


def _train_fields(args: TrainingArguments) -> dict[str, Any]:
    """Fields of `TrainConfig` with the values of the `Trainer`'s arguments."""
    steps = {"max_steps": args.max_steps} if args.max_steps > 0 else {"num_train_epochs": args.num_train_epochs}
    return {
        "batch_size": args.per_device_train_batch_size * args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "seed": args.seed if args.data_seed is None else args.data_seed,
        "shuffle": args.train_sampling_strategy == "random",
        **steps,
    }


def _warn_of_rate(data: GroupData) -> None:
    """Warn of a learning rate that is the default of `TrainingArguments`, with that of prefixes."""
    (job,) = data.group.jobs
    if job.learning_rate == DEFAULT_RATE:
        own = default_learning_rate(job.init, depth(data.model, job.prefix_config), uses_mlp=job.uses_mlp)
        logger.warning(
            "learning_rate is %g, the default of TrainingArguments; that of this prefix would be %g", DEFAULT_RATE, own
        )


def _metrics(state: TrainerState) -> dict[str, float]:
    """Number of steps and last losses of a run."""
    found = {"steps": float(state.global_step)}
    for line in state.log_history:
        found |= {name: float(line[name]) for name in ("loss", "eval_loss") if name in line}
    return found
