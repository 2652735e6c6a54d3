"""`METHODS`, what each method of adaptation reads and makes. This module imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefixfast.config import MethodConfig, PrefixConfig, TrainConfig
from prefixfast.errors import ConfigError

PREFIX_OPTIONS = frozenset((*PrefixConfig.names(), "init", "init_text", "on_top_of", "store"))
EMBEDDING_OPTIONS = frozenset(("prefix_length", "init", "init_text", "store"))
TRAIN_OPTIONS = frozenset(TrainConfig.names())
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
        makes_prefix: Whether the result is a `Prefix`, many of which are trained in one batch. Other results are
            weights, which are trained one after the other.
        is_trained: Whether the method takes optimizer steps.
        learning_rate: Default of the peak learning rate, None for that of prefixes.
        position: Place of the prefixes, None for the one of the options.
    """

    module: str
    reads: frozenset[str]
    makes_prefix: bool = True
    is_trained: bool = True
    learning_rate: float | None = None
    position: Literal["infix"] | None = None

    @property
    def is_alone(self) -> bool:
        """Whether each name is a group of its own."""
        return not (self.makes_prefix and self.is_trained)

    @property
    def shorten(self) -> str | None:
        """Advice that makes the result take fewer positions, with an option that the method reads; None of weights."""
        return next((advice for name, advice in SHORTEN.items() if name in self.reads), None)


METHODS: dict[str, Method] = {
    "prefix": Method("prefix", PREFIX_OPTIONS | TRAIN_OPTIONS),
    "infix": Method("prefix", PREFIX_OPTIONS - {"position"} | TRAIN_OPTIONS, position="infix"),
    "prompt": Method("text", UNTRAINED_OPTIONS | {"init_text", "store"}, is_trained=False),
    "icl": Method("text", UNTRAINED_OPTIONS | {"num_examples", "store"}, is_trained=False),
    "embedding": Method("embedding", EMBEDDING_OPTIONS | TRAIN_OPTIONS, learning_rate=0.03),
    "full": Method("full", TRAIN_OPTIONS, makes_prefix=False, learning_rate=1e-4),
    "top2": Method("full", TRAIN_OPTIONS, makes_prefix=False, learning_rate=1e-3),
    "adapter": Method("adapter", TRAIN_OPTIONS | {"adapter_size"}, makes_prefix=False, learning_rate=3e-3),
    "lora": Method("lora", TRAIN_OPTIONS | {"lora_rank", "lora_alpha"}, makes_prefix=False, learning_rate=5e-3),
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
    known = PREFIX_OPTIONS | TRAIN_OPTIONS | {*MethodConfig.names()} - {"method"}
    for name in sorted(known.difference(METHODS[method].reads).intersection(given)):
        readers = [other for other, m in METHODS.items() if name in m.reads]
        where = f"{what}: " if what else ""
        several = f"{'methods' if len(readers) > 1 else 'method'} {', '.join(readers)}"
        advice = f"it is an option of the {several}" if readers else "leave it out"
        if not METHODS[method].makes_prefix:
            advice = WEIGHTS_ADVICE.get(name, advice)
        msg = f"{where}{name}: method {method!r} does not read it; {advice}"
        raise ConfigError(msg)


def read_preset(method: str, preset: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a recipe that the method reads."""
    return {name: value for name, value in preset.items() if name in METHODS[method].reads}
