"""`METHODS`, what each method of adaptation reads and makes. This module imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefixfast.config import MethodConfig, PrefixConfig, TrainConfig
from prefixfast.errors import ConfigError

OF_PREFIXES = frozenset((*PrefixConfig.names(), "init", "init_text"))
PREFIX_OPTIONS = OF_PREFIXES | {"on_top_of", "store"}
LORA_OPTIONS = frozenset(("lora", "lora_rank", "lora_alpha"))
EMBEDDING_OPTIONS = frozenset(("prefix_length", "init", "init_text", "store"))
TRAIN_OPTIONS = frozenset(TrainConfig.names())
WHOLE_BASE_OPTIONS = TRAIN_OPTIONS - {"shard_base"}  # of methods that reach into the base model's layers
# Options of a method without steps: how rows are read and evaluated.
UNTRAINED_OPTIONS = frozenset(
    (
        "recipe",
        "dtype",
        "token_budget",
        "max_length",
        "overflow",
        "eval_fraction",
        "seed",
        "logging_steps",
        "save_steps",
    )
)

# Reasons why weights have no such option, with advice.
WEIGHTS_ADVICE = {
    "store": "a store holds prefixes, and weights act for all requests; save them to output_dir instead",
    "on_top_of": "weights act in the base for all requests, and stand behind no prefix; train a prefix instead",
}
# Advice by the option that decides how many positions a prefix takes.
SHORTEN = {
    "prefix_length": "use a shorter prefix (prefix_length)",
    "init_text": "give a shorter init_text",
    "num_examples": "lower num_examples",
}


@dataclass(frozen=True)
class Method:
    """A method of adaptation.

    Attributes:
        module: Module of ``prefixfast.training.methods`` with the function ``make``.
        reads: Names of the options that the method reads, beside ``method`` itself.
        makes_prefix: Whether the method makes keys and values, those of many names in one batch.
        makes_weights: Whether the method makes weights that act in the base, of one name after the other. The result is
            `TunedWeights` then, else a `Prefix`.
        is_trained: Whether the method takes optimizer steps.
        learning_rate: Default of the peak learning rate, None for that of prefixes.
        position: Place of the prefixes, None for the one of the options.
    """

    module: str
    reads: frozenset[str]
    makes_prefix: bool = True
    makes_weights: bool = False
    is_trained: bool = True
    learning_rate: float | None = None
    position: Literal["infix"] | None = None

    @property
    def is_alone(self) -> bool:
        """Whether each name is a group of its own."""
        return self.makes_weights or not self.is_trained

    @property
    def shorten(self) -> str | None:
        """Advice that makes the result take fewer positions, with an option that the method reads; None of weights."""
        return next((advice for name, advice in SHORTEN.items() if name in self.reads), None)


def _weights(module: str, learning_rate: float, reads: frozenset[str] = frozenset()) -> Method:
    """A method that makes weights alone."""
    return Method(
        module, WHOLE_BASE_OPTIONS | reads, makes_prefix=False, makes_weights=True, learning_rate=learning_rate
    )


METHODS: dict[str, Method] = {
    "prefix": Method("prefix", PREFIX_OPTIONS | TRAIN_OPTIONS),
    "infix": Method("prefix", PREFIX_OPTIONS - {"position"} | TRAIN_OPTIONS, position="infix"),
    "prompt": Method("text", UNTRAINED_OPTIONS | {"init_text", "store"}, is_trained=False),
    "icl": Method("text", UNTRAINED_OPTIONS | {"num_examples", "store"}, is_trained=False),
    "embedding": Method("embedding", EMBEDDING_OPTIONS | WHOLE_BASE_OPTIONS, learning_rate=0.03),
    "full": _weights("full", 1e-4),
    "top2": _weights("full", 1e-3),
    "adapter": _weights("adapter", 3e-3, frozenset(("adapter_size",))),
    "lora": _weights("lora", 5e-3, LORA_OPTIONS),
    "prefix+lora": Method(
        "prefix_lora", OF_PREFIXES | WHOLE_BASE_OPTIONS | LORA_OPTIONS | {"lora_learning_rate"}, makes_weights=True
    ),
}

# Reasons why a method does not train an encoder-decoder base model.
SEQ2SEQ_REFUSALS = {
    "infix": "an infix stands before the last prompt token, and its encoder reads the whole prompt",
    "embedding": "virtual tokens of an encoder attend to its text, so that their keys differ from text to text",
    "prompt": "a text before the source attends to it, so that its keys and values differ from text to text",
    "icl": "examples before the source attend to it, so that their keys and values differ from text to text",
    "top2": "it is a baseline for models of one stack, and an encoder-decoder base has two",
    "adapter": "its layers are placed in the blocks of decoder-only models",
}


def check_seq2seq_method(method: str) -> None:
    """Raise `ConfigError` for a method that does not train an encoder-decoder base model."""
    if reason := SEQ2SEQ_REFUSALS.get(method):
        left = ", ".join(m for m in METHODS if m not in SEQ2SEQ_REFUSALS)
        msg = f"method: {method!r} does not work with an encoder-decoder base: {reason}; choose one of {left}"
        raise ConfigError(msg)


def method_options(config: MethodConfig) -> dict[str, Any]:
    """The method and the options of it that the method reads."""
    reads = METHODS[config.method].reads
    return {n: getattr(config, n) for n in config.names() if n == "method" or n in reads}


def check_read(method: str, given: Iterable[str], what: str = "") -> None:
    """Raise `ConfigError` for an option that the method does not read.

    Args:
        method: Name of the method.
        given: Names of the options that the caller gave. Names that no method knows are left to other checks.
        what: Name of the argument that holds the options, empty for the arguments of `train`.
    """
    known = PREFIX_OPTIONS | TRAIN_OPTIONS | LORA_OPTIONS | {*MethodConfig.names()} - {"method"}
    for name in sorted(known.difference(METHODS[method].reads).intersection(given)):
        readers = [other for other, m in METHODS.items() if name in m.reads]
        where = f"{what}: " if what else ""
        several = f"{'methods' if len(readers) > 1 else 'method'} {', '.join(readers)}"
        advice = f"it is an option of the {several}" if readers else "leave it out"
        if METHODS[method].makes_weights:
            advice = WEIGHTS_ADVICE.get(name, advice)
        msg = f"{where}{name}: method {method!r} does not read it; {advice}"
        raise ConfigError(msg)


def read_preset(method: str, preset: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a recipe that the method reads."""
    return {name: value for name, value in preset.items() if name in METHODS[method].reads}
