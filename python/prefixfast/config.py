"""Every option of prefixfast: four frozen dataclasses. Command-line flags, documentation and error messages come from their fields.

A field's meaning stands once, in its metadata; unknown names are errors with a hint for the names other libraries use.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from prefixfast.errors import ConfigError

HINTS = {
    "num_virtual_tokens": "prefix_length",
    "prefix_projection": "reparameterization='mlp'",
    "per_device_train_batch_size": "batch_size (examples of each prefix in one optimizer step)",
    "gradient_accumulation_steps": "token_budget (a batch that exceeds it is accumulated)",
    "epochs": "num_train_epochs",
    "eval_strategy": "eval_steps",
    "load_best_model_at_end": "metric_for_best_model",
    "lr": "learning_rate",
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens",
    "beam_size": "num_beams",
    "attn_implementation": "backend",
}


_HINTS: dict[str, dict[str, Any]] = {}  # by class: resolving them costs more than all the checks


def option(default: Any, help: str) -> Any:
    """A dataclass field with its one description."""
    return dataclasses.field(default=default, metadata={"help": help})


class Options:
    """What the four dataclasses share: checked construction and updates."""

    def __post_init__(self) -> None:
        owner = type(self).__name__
        hints = _HINTS.get(owner) or _HINTS.setdefault(owner, get_type_hints(type(self)))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            _check_type(owner, field.name, getattr(self, field.name), hints[field.name])
        self.validate()

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work."""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The field names."""
        return tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def make(cls, config: Self | Mapping[str, Any] | None = None, **fields: Any) -> Self:
        """A config from another one (or a mapping) with some fields replaced.

        Args:
            config: Where to start; None: the defaults.
            fields: What to replace.

        Returns:
            A new, checked one.

        Raises:
            ConfigError: For an unknown name or a wrong value.
        """
        if isinstance(config, cls):
            base: dict[str, Any] = {n: getattr(config, n) for n in cls.names()}
        elif config is None or isinstance(config, Mapping):
            base = dict(config or {})
        else:
            msg = f"config: expected a {cls.__name__} or a mapping, got {type(config).__name__}"
            raise ConfigError(msg)
        merged = base | fields
        for name in merged:
            if name not in cls.names():
                raise ConfigError(unknown_option(str(name), cls.names(), cls.__name__))
        return cls(**merged)


def unknown_option(name: str, known: tuple[str, ...], what: str) -> str:
    """The message for an option that does not exist, with the likeliest one that does."""
    hint = HINTS.get(name)
    if hint is None or hint.split("=")[0].split(" ")[0] not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = close[0] if close else None
    return f"{what}: unknown option {name!r}; " + (f"did you mean {hint}?" if hint else f"known are {', '.join(known)}")


def _check_type(owner: str, name: str, value: Any, hint: Any) -> None:
    options = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    for kind in options or (hint,):
        if get_origin(kind) is Literal:
            if value in get_args(kind) and not (
                isinstance(value, bool) ^ any(isinstance(a, bool) for a in get_args(kind) if a == value)
            ):
                return
        elif kind is type(None):
            if value is None:
                return
        elif kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                return
        elif get_origin(kind) is tuple:
            if isinstance(value, tuple):
                return
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return
    shown = " | ".join(
        repr(a) if get_origin(k) is Literal else getattr(k, "__name__", str(k))
        for k in options or (hint,)
        for a in (get_args(k) or (k,))
    )
    msg = f"{owner}.{name}: expected {shown}, got {value!r}"
    raise ConfigError(msg)


def at_least(owner: Options, **limits: float) -> None:
    """Raise `ConfigError` for a number under its limit; None passes."""
    for name, limit in limits.items():
        value = getattr(owner, name)
        if not isinstance(value, str | None) and value < limit:
            msg = f"{type(owner).__name__}.{name}: expected at least {limit:g}, got {value!r}"
            raise ConfigError(msg)


def _site(name: str, given: Any) -> str:
    """The one site of the bases that there are, from a sequence of it or a mapping by it."""
    if not isinstance(given, list | tuple | Mapping) or list(given) != ["self"]:
        msg = f"PrefixConfig.{name}: expected the site 'self' alone (there are decoder-only bases only), got {given!r:.80}"
        raise ConfigError(msg)
    return "self"


def _layers(given: Any) -> tuple[int, ...]:
    """Numbers of layers in order, from any sequence of them (a list, a tuple, a range, an array)."""
    try:
        if isinstance(given, str) or any(isinstance(i, bool) for i in given):
            raise TypeError
        numbers = sorted(operator.index(i) for i in given)
    except TypeError:
        numbers = []
    if not numbers or numbers[0] < 0 or len(set(numbers)) != len(numbers):
        msg = f"PrefixConfig.layers: expected numbers of layers from 0, each once, at least one, got {given!r:.80}"
        raise ConfigError(msg)
    return tuple(numbers)


@dataclass(frozen=True, kw_only=True)
class PrefixConfig(Options):
    """What is learned. ``prefix_length`` may also be a mapping of the site to it, ``{"self": 10}``.

    Example:
        >>> PrefixConfig(prefix_length=5, reparameterization="mlp").encoder_hidden_size
        512
        >>> PrefixConfig(layers=[2, 1]).layers
        (1, 2)
    """

    prefix_length: int | Literal["text"] = option(
        10, "rows of keys and values learned for each of the layers (P); 'text': as many as the init text has tokens"
    )
    reparameterization: Literal["auto", "none", "mlp"] = option(
        "auto",
        "'none' trains the keys and values themselves, 'mlp' the network that makes them; 'auto': mlp for init random or zero, else none",
    )
    sites: tuple[str, ...] | None = option(
        None, "kinds of attention that get a prefix; a decoder-only base has one, 'self'. By default all of the base's"
    )
    layers: tuple[int, ...] | None = option(
        None, "layers that get a prefix, numbered from 0; the others see their own tokens only. By default all of them"
    )
    encoder_hidden_size: int = option(512, "width of the reparameterization MLP")
    embedding_dim: int | None = option(None, "width of the MLP's input; by default that of a layer's keys")
    prefix_dropout: float = option(0.0, "share of the prefix's keys and values dropped in training")
    frozen_rows: int = option(0, "first rows of the prefix that keep the values they start with")
    fit_steps: int = option(
        0,
        "steps of Adam that fit the MLP to the init's keys and values, as the paper does; 0: it starts as exactly these",
    )
    pos_start: Literal["after", "zero"] = option(
        "after", "position of the first token: after the prefix (P, as PEFT) or zero"
    )

    def __post_init__(self) -> None:
        length: Any = self.prefix_length
        if isinstance(length, Mapping):
            object.__setattr__(self, "prefix_length", length[_site("prefix_length", length)])
        if self.sites is not None:
            object.__setattr__(self, "sites", (_site("sites", self.sites),))
        if self.layers is not None:
            object.__setattr__(self, "layers", _layers(self.layers))
        super().__post_init__()

    @property
    def length(self) -> int:
        """``prefix_length`` once it is a number."""
        assert isinstance(self.prefix_length, int)
        return self.prefix_length

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work."""
        at_least(
            self, prefix_length=1, encoder_hidden_size=1, embedding_dim=1, prefix_dropout=0, frozen_rows=0, fit_steps=0
        )
        if self.prefix_dropout >= 1:
            msg = f"PrefixConfig.prefix_dropout: expected less than 1, got {self.prefix_dropout!r}"
            raise ConfigError(msg)
        if isinstance(self.prefix_length, int) and self.frozen_rows >= self.prefix_length:
            msg = f"PrefixConfig.frozen_rows: expected fewer than prefix_length {self.prefix_length}, got {self.frozen_rows!r}"
            raise ConfigError(msg)
        if self.fit_steps and self.reparameterization != "mlp":
            msg = (
                f"PrefixConfig.fit_steps: expected reparameterization='mlp' beside it, got {self.reparameterization!r}"
            )
            raise ConfigError(msg)


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


@dataclass(frozen=True, kw_only=True)
class GenerationParams(Options):
    """How text is chosen; None inherits: call > request > prefix > the base's generation_config > greedy, 256 new tokens.

    Example:
        >>> GenerationParams(num_beams=3).over(GenerationParams(max_new_tokens=9, num_beams=2)).num_beams
        3
        >>> GenerationParams.make(max_tokens=9)
        Traceback (most recent call last):
        prefixfast.errors.ConfigError: GenerationParams: unknown option 'max_tokens'; did you mean max_new_tokens?
    """

    max_new_tokens: int | None = option(None, "most tokens to generate")
    min_new_tokens: int | None = option(None, "no end token before this many")
    num_beams: int | None = option(None, "beams; 1 is greedy or sampling")
    do_sample: bool | None = option(None, "draw tokens instead of taking the likeliest")
    temperature: float | None = option(None, "divides the logits before a token is drawn")
    top_k: int | None = option(
        None, "draw among the k likeliest tokens; 0: among all. transformers' default, 50, is ours"
    )
    top_p: float | None = option(None, "draw among the likeliest tokens that together have this probability")
    min_p: float | None = option(None, "draw among tokens at least this share as likely as the likeliest")
    repetition_penalty: float | None = option(
        None, "divides positive and multiplies negative logits of tokens that the prompt or the text has"
    )
    no_repeat_ngram_size: int | None = option(
        None, "no n tokens in a row may come twice, the prompt included; 0: they may"
    )
    bad_words_ids: tuple[tuple[int, ...], ...] | None = option(None, "sequences of token ids that may not come")
    stop_strings: tuple[str, ...] | None = option(
        None, "the text ends with the first of these that comes, which stays in it"
    )
    length_penalty: float | None = option(None, "exponent of the length that divides a beam's score")
    early_stopping: Literal[True, False, "never"] | None = option(
        None, "when a beam search may stop, as transformers defines it"
    )
    num_return_sequences: int | None = option(None, "texts of a request: the best beams, or several samples")
    seed: int | None = option(None, "of the drawn tokens: with it a request's text is the same alone and in any batch")
    logprobs: int | None = option(
        None, "report the log-probability of each token and of this many likeliest ones (before any rule)"
    )

    def __post_init__(self) -> None:
        for name, inner in (("bad_words_ids", True), ("stop_strings", False)):  # lists come from JSON and from users
            value: Any = getattr(self, name)
            if isinstance(value, str) and not inner:
                value = (value,)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, tuple(tuple(v) if inner and isinstance(v, list) else v for v in value))
        super().__post_init__()

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work."""
        at_least(
            self,
            max_new_tokens=1,
            min_new_tokens=0,
            num_beams=1,
            top_k=0,
            no_repeat_ngram_size=0,
            num_return_sequences=1,
            seed=0,
            logprobs=0,
        )
        for name, fits, expected in (
            ("temperature", lambda x: x >= 1e-6, "at least 1e-6 (for the likeliest token say do_sample=False)"),
            ("seed", lambda x: x < 2**62, "less than 2**62"),
            ("top_k", lambda x: x < 2**31, "less than 2**31"),
            ("repetition_penalty", lambda x: x > 0, "more than 0"),
            ("top_p", lambda x: 0 < x <= 1, "more than 0 and at most 1"),
            ("min_p", lambda x: 0 <= x <= 1, "0 to 1"),
            (
                "bad_words_ids",
                lambda x: all(isinstance(w, tuple) and w and all(type(i) is int and i >= 0 for i in w) for w in x),
                "lists of token ids",
            ),
            ("stop_strings", lambda x: all(isinstance(s, str) and s for s in x), "strings that are not empty"),
        ):
            value = getattr(self, name)
            if value is not None and not fits(value):
                msg = f"GenerationParams.{name}: expected {expected}, got {value!r}"
                raise ConfigError(msg)

    def over(self, fallback: GenerationParams) -> GenerationParams:
        """`GenerationParams` with these values where given, those of ``fallback`` elsewhere.

        Beams and sampling exclude each other, so what is given here ends the other one there.
        """
        few = all(
            len(p.bad_words_ids or ()) + len(p.stop_strings or ()) < FEW for p in (self, fallback)
        )  # big ones are not kept
        return _over(self, fallback) if few else _over.__wrapped__(self, fallback)


FEW = 64


@functools.lru_cache(512)
def _over(mine: GenerationParams, fallback: GenerationParams) -> GenerationParams:
    values = {n: getattr(mine, n) if getattr(mine, n) is not None else getattr(fallback, n) for n in mine.names()}
    if mine.do_sample and (values["num_beams"] or 1) > 1 and mine.num_beams is None:
        values["num_beams"] = 1
    elif (mine.num_beams or 1) > 1 and values["do_sample"] and mine.do_sample is None:
        values["do_sample"] = False
    return GenerationParams(**values)


@dataclass(frozen=True, kw_only=True)
class EngineConfig(Options):
    """Memory and batching of an engine.

    Example:
        >>> EngineConfig.make({"max_num_seqs": 8}, kv_cache_memory=2**20).max_num_seqs
        8
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = option(
        "auto", "compute dtype of a base that is loaded here; see load"
    )
    device: str = option("auto", "where a base that is loaded here runs; see load")
    revision: str | None = option(None, "of a hub id")
    backend: str = option("auto", "kernels of a base that is loaded here; see load")
    max_model_len: int | None = option(
        None,
        "longest prompt and generation in tokens, prefix not counted; by default what the model allows, at most 4096",
    )
    max_num_seqs: int = option(64, "rows decoded together (a request takes one a beam)")
    max_num_batched_tokens: int = option(
        4096, "tokens of one step, decoded rows included; longer prompts are filled over several steps"
    )
    kv_cache_memory: int | None = option(
        None, "bytes of keys and values, prefixes included; by default a share of free memory, on a CPU at most 8 GiB"
    )
    gpu_memory_utilization: float = option(
        0.25, "the share of free memory that keys and values take where kv_cache_memory does not say"
    )
    prefix_memory: int | None = option(
        None, "bytes of keys and values that prefixes may hold; by default all that running requests leave"
    )
    host_prefix_memory: int = option(2**31, "bytes of prefixes from a store that are kept beside the arena once read")
    prefix_dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "in which stored prefixes are kept on the host; auto: the compute dtype"
    )
    max_waiting: int = option(10_000, "requests that may wait; one more is refused with a CapacityError")
    share_prompts: int = option(
        0,
        "leading tokens that requests of a batch must have in common to be computed once and kept as a prefix; 0: never",
    )
    num_threads: int | None = option(None, "CPU threads; by default torch's setting")
    enforce_eager: bool = option(
        False, "on a GPU call decode steps instead of replaying captured CUDA graphs started one step ahead"
    )
    compile_decode: bool = option(
        False,
        "compile what the graphs hold with torch.compile: minutes at the start, fewer launches (not measured yet)",
    )
    prepack: bool = option(True, "on a CPU keep a second copy of the weights, laid out for its matrix products")
    seed: int | None = option(None, "of requests without a seed of their own; by default drawn when the engine is made")

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work."""
        at_least(
            self,
            max_model_len=2,
            max_num_seqs=1,
            max_num_batched_tokens=1,
            kv_cache_memory=1,
            num_threads=1,
            host_prefix_memory=0,
            max_waiting=1,
            share_prompts=0,
            prefix_memory=1,
            seed=0,
        )
        if not 0 < self.gpu_memory_utilization <= 1:
            msg = f"EngineConfig.gpu_memory_utilization: expected more than 0 and at most 1, got {self.gpu_memory_utilization!r}"
            raise ConfigError(msg)
