"""Readers of PEFT adapter folders, which may come from anywhere.

An adapter of type PREFIX_TUNING or CARTRIDGE holds keys and values (`prefixfast.prefix.peft_format`). One of type
PROMPT_TUNING or P_TUNING holds a table ``prompt_embeddings`` of shape ``[P, E]``, the embeddings of virtual tokens
before the text. The table of P_TUNING is the output of its encoder, an MLP or LSTM that PEFT does not save.

Shape letters: P virtual tokens, E embedding dimension.

Source:
    PEFT 0.21.2, ``get_prompt_embedding_to_save`` in ``peft_model.py`` and ``BasePromptEncoder`` in
    ``tuners/tuners_utils.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.errors import DataError, shown
from prefixfast.io.untrusted import read_json, read_tensors
from prefixfast.prefix.names import WEIGHTS_USE
from prefixfast.prefix.peft_format import CONFIG, TABLE, TYPES, WEIGHTS, from_table

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING_TYPES = ("PROMPT_TUNING", "P_TUNING")
PICKLE = "adapter_model.bin"
SIZES = ("num_layers", "num_attention_heads", "num_virtual_tokens")
IN_THE_BASE = (
    "it is a part of the base and no prefix: load(PeftModel.from_pretrained(base, folder)) makes a base model with it"
)
# Reasons why other types are not read, with advice.
ADVICE = {
    "LORA": f"it holds weights, no prefix; {WEIGHTS_USE}",
    "IA3": IN_THE_BASE,
    "MULTITASK_PROMPT_TUNING": (
        "its virtual tokens depend on the task_ids of a request, which a prefix does not have; train one prefix for "
        "each task"
    ),
    "ADAPTION_PROMPT": (
        "its prompts act on the text through a gate of their own, which keys and values cannot hold; run it with PEFT"
    ),
    "CPT": (
        "its virtual tokens are read with PEFT only; Prefix.from_text makes a prefix of the same context, from which "
        "train(init=...) goes on"
    ),
}


@dataclass(frozen=True)
class VirtualTokens:
    """Embeddings of the virtual tokens of a PROMPT_TUNING or P_TUNING adapter.

    Attributes:
        table: Embeddings ``[P, E]``.
        peft_type: Type of the adapter.
        base_name: Name of the base model, None if the adapter does not say it.
        num_layers: Number of layers of the base model, None if the adapter does not say it.
        path: Path of the adapter's folder.
    """

    table: Tensor
    peft_type: str
    base_name: str | None
    num_layers: int | None
    path: Path


class BaseNeededError(DataError):
    """Virtual tokens are read without the base model that computes their keys and values.

    Attributes:
        base_name: Name of the base model, None if the adapter does not say it.
    """

    base_name: str | None = None


def base_needed(tokens: VirtualTokens) -> BaseNeededError:
    """Error of virtual tokens without a base model."""
    named = f", which it names {shown(tokens.base_name)}" if tokens.base_name else ""
    msg = (
        f"a {tokens.peft_type} adapter holds embeddings, and the base computes their keys and values: expected model=, "
        f"or --model of a command, the base that it was trained on{named}"
    )
    error = BaseNeededError(msg, path=str(tokens.path))
    error.base_name = tokens.base_name
    return error


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the configuration of an adapter folder with keys and values.

    Raises:
        DataError: If the folder is not a PREFIX_TUNING or CARTRIDGE adapter, or a file is damaged.
    """
    config = read_json(folder / CONFIG)
    layers, heads, length = _read_sizes(config, folder / CONFIG)
    table = _read_table(folder, length)
    try:
        return from_table(table, layers, heads, submodules_of(config) or 1), config
    except DataError as e:
        msg = f"{WEIGHTS}: {e}"
        raise DataError(msg, path=str(folder / WEIGHTS)) from e


def read_virtual_tokens(folder: Path) -> VirtualTokens | None:
    """Read the embeddings of an adapter folder, None if the adapter has another type.

    Raises:
        DataError: If the adapter is not for a decoder-only model, or a file is damaged.
    """
    config, path = read_json(folder / CONFIG), folder / CONFIG
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in EMBEDDING_TYPES:
        return None
    if _check_task(config, path):
        msg = (
            f"{peft_type} of an encoder-decoder model: the encoder reads its virtual tokens together with the text, so "
            "that their keys differ from text to text and no prefix holds them; run it with PEFT, or train a prefix"
        )
        raise DataError(msg, path=str(path))
    length, dim = _positive(config, ("num_virtual_tokens", "token_dim"), path)
    (layers,) = _positive(config, ("num_layers",), path) if config.get("num_layers") is not None else (None,)
    table = _read_table(folder, length)
    if table.shape != (length, dim) or not table.is_floating_point() or table.dtype.itemsize < 2:
        msg = f"{WEIGHTS}: {TABLE}: expected a float [{length}, {dim}], got {table.dtype} {list(table.shape)}"
        raise DataError(msg, path=str(folder / WEIGHTS))
    if not bool(table.isfinite().all()):
        msg = f"{WEIGHTS}: {TABLE}: expected finite numbers, got NaN or infinity"
        raise DataError(msg, path=str(folder / WEIGHTS))
    return VirtualTokens(table, peft_type, base_name(config, path), layers, folder)


def base_name(config: Mapping[str, Any], path: Path) -> str | None:
    """Name of the base model in an adapter's configuration, None if there is none.

    Raises:
        DataError: If it is no name.
    """
    name = config.get("base_model_name_or_path")
    if name is not None and not isinstance(name, str):
        msg = f"{path.name}: base_model_name_or_path: expected a name or null, got {shown(name)}"
        raise DataError(msg, path=str(path))
    return name or None


def _read_table(folder: Path, length: int) -> Tensor:
    """The table of an adapter folder, whose number of rows is checked."""
    if not (folder / WEIGHTS).exists() and (folder / PICKLE).exists():
        msg = (
            f"{PICKLE} is a pickle, which can run code when it is read; save the adapter again with PEFT's "
            "safe_serialization=True"
        )
        raise DataError(msg, path=str(folder))
    tensors = read_tensors(folder / WEIGHTS)
    if set(tensors) != {TABLE}:
        msg = f"expected the one tensor {shown(TABLE)}, got {sorted(tensors)}"
        raise DataError(msg, path=str(folder / WEIGHTS))
    table = tensors[TABLE]
    if not table.ndim or len(table) != length:
        got = list(table.shape)
        msg = f"{WEIGHTS}: {TABLE}: expected {length} rows (num_virtual_tokens), got {got}; see {CONFIG}"
        raise DataError(msg, path=str(folder / WEIGHTS))
    return table


def _read_sizes(config: Mapping[str, Any], path: Path) -> tuple[int, int, int]:
    """Numbers of layers, key-value heads and rows of a configuration, checked together with its type."""
    peft_type = config.get("peft_type")
    if peft_type not in TYPES:
        advice = ADVICE.get(peft_type) if isinstance(peft_type, str) else None
        known = " or ".join(TYPES if peft_type in EMBEDDING_TYPES else (*TYPES, *EMBEDDING_TYPES))
        msg = f"peft_type: expected {known}, got {shown(peft_type)}" + (f": {advice}" if advice else "")
        raise DataError(msg, path=str(path))
    _check_task(config, path)
    layers, heads, length = _positive(config, SIZES, path)
    frozen = config.get("num_frozen_tokens", 0)
    if type(frozen) is not int or not 0 <= frozen <= length:
        msg = f"num_frozen_tokens: expected a number from 0 to {length} (num_virtual_tokens), got {shown(frozen)}"
        raise DataError(msg, path=str(path))
    return layers, heads, length


def submodules_of(config: Mapping[str, Any]) -> int | None:
    """Number of submodules by which an encoder-decoder adapter lays out its table, None for a decoder-only adapter."""
    if config.get("task_type") != "SEQ_2_SEQ_LM":
        return None
    return 2 if config.get("num_transformer_submodules") is None else int(config["num_transformer_submodules"])


def _check_task(config: Mapping[str, Any], path: Path) -> bool:
    """Whether an adapter is for an encoder-decoder model; others than language models raise `DataError`."""
    submodules, task = config.get("num_transformer_submodules"), config.get("task_type")
    known = {"SEQ_2_SEQ_LM": (1, 2, None), "CAUSAL_LM": (1, None), None: (1, None)}
    allowed = known.get(task, ()) if isinstance(task, str | None) else ()
    if type(submodules) not in (int, type(None)) or submodules not in allowed:
        expected = "task_type CAUSAL_LM with num_transformer_submodules 1, or SEQ_2_SEQ_LM with 1 or 2"
        msg = f"expected {expected}, got {shown(task)} with {shown(submodules)}"
        raise DataError(msg, path=str(path))
    return task == "SEQ_2_SEQ_LM"


def _positive(config: Mapping[str, Any], names: tuple[str, ...], path: Path) -> list[int]:
    """Numbers of a configuration, which must be at least 1."""
    sizes = [config.get(name) for name in names]
    if not all(type(n) is int and n >= 1 for n in sizes):
        msg = f"{', '.join(names)}: expected numbers of at least 1, got {sizes}"
        raise DataError(msg, path=str(path))
    return [int(n) for n in sizes if n is not None]
