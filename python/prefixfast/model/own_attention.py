"""Checks that a model's attention before it is attached is transformers' own causal attention.

An attached model computes causal attention in prefixfast's code. Attention of another kind would be lost in silence.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import transformers
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefixfast.model.attention_switch import configs_of, own_implementation

FOLDER = str(Path(transformers.__file__).parent)
# Functions that a modeling file defines or imports, and that its attention modules look up in the file.
LOOKED_UP = (
    "eager_attention_forward",
    "create_causal_mask",
    "create_sliding_window_causal_mask",
    "create_bidirectional_mask",
)


def foreign_attention(model: PreTrainedModel) -> str | None:
    """Reason why a model's attention is not transformers' causal attention, None if it is."""
    configs = configs_of(model)
    if any(getattr(config, "is_causal", True) is False for config in configs):
        return "config.is_causal is False, and prefixfast computes causal attention only"
    files = [sys.modules[name] for name in {type(m).__module__ for m in model.modules()} if name in sys.modules]
    for name in {own_implementation(config) or "eager" for config in configs}:
        for interface, what in ((_interfaces(files), "attention"), ([ALL_MASK_ATTENTION_FUNCTIONS], "mask")):
            found = [functions.get(name.removeprefix("paged|")) for functions in interface]
            if what == "attention" and name == "eager":
                continue  # it is a function of each modeling file
            if not all(f is not None and _is_code_of(f, FOLDER) for f in found):
                return (
                    f"its {what} function {name!r} is not transformers' own, and prefixfast would not call it; load "
                    "it with attn_implementation='sdpa' if that computes the same"
                )
    for file in files:
        places = FOLDER, str(getattr(file, "__file__", FOLDER))
        if replaced := [n for n in LOOKED_UP if hasattr(file, n) and not _is_code_of(getattr(file, n), *places)]:
            return f"another program has replaced {file.__name__}.{replaced[0]}, which prefixfast would not call"
    return None


def _interfaces(files: list[ModuleType]) -> list[AttentionInterface]:
    """Tables in which the attention modules of modeling files look up their function by name."""
    found = [getattr(file, "ALL_ATTENTION_FUNCTIONS", None) for file in files]
    return [ALL_ATTENTION_FUNCTIONS, *(table for table in found if isinstance(table, AttentionInterface))]


def _is_code_of(function: Any, *places: str) -> bool:
    """Whether the code of a function lies in one of these files or folders. A wrapper's own code counts."""
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    return code is not None and code.co_filename.startswith(places)
