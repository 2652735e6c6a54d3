"""`PrefixData`: the tensors of a learned prefix and the conventions that say how they are used; no method needs a model.

Shape letters: P prefix rows, H kv heads, D head dim.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from prefixfast.errors import DataError
from prefixfast.model.fingerprint import num_layers
from prefixfast.prefix import folder, peft_format

SINCE = ">=0.1.0"  # the first release that reads what this one writes
C = TypeVar("C", bound=type)


def renamed(old: str, new: str) -> None:
    """Warn about a name of version 0.1.0."""
    warnings.warn(f"{old} was renamed: use {new}", FutureWarning, stacklevel=3)


def accept_linearizer(cls: C) -> C:
    """Let the constructor take ``linearizer``, the name of ``task`` in version 0.1.0, with a warning."""
    init: Callable[..., None] = vars(cls)["__init__"]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **fields: Any) -> None:
        if "linearizer" in fields:
            renamed("Prefix(linearizer=...)", "Prefix(task=...)")
            fields["task"] = fields.pop("linearizer")
        init(self, *args, **fields)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@accept_linearizer
@dataclass(frozen=True, eq=False, repr=False)
class PrefixData:
    """Tensors and conventions of a learned prefix. Immutable; compare prefixes by their `digest`.

    Attributes:
        kv: ``{site}.{layer}.k`` and ``.v`` of ``[P, H, D]`` each; keys are stored after RoPE. Layers may differ in P, H and D or be absent.
        pos_start: Position of the first token after the prefix: P as PEFT has it, or 0.
        window: ``"slide"``: sliding windows hide old prefix rows, as in PEFT; ``"always"``: they never do.
        base: Fingerprint of the base model, None if unknown (an imported PEFT adapter).
        task: How rows become prompts: the task's ``name`` and its settings; None for plain prompts.
        decoding: Default `GenerationParams` of this prefix.
        training: How it came about: settings, steps, final losses.
    """

    kv: Mapping[str, Tensor]
    pos_start: int
    window: Literal["slide", "always"] = "slide"
    base: Mapping[str, Any] | None = None
    task: Mapping[str, Any] | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        folder.check(self.kv, self.pos_start, self.window)
        frozen = self.training.get("num_frozen_tokens", 0)
        if type(frozen) is not int or not 0 <= frozen <= self.length:
            msg = f"training: num_frozen_tokens: expected a number from 0 to the {self.length} rows, got {frozen!r:.80}"
            raise DataError(msg)

    def __repr__(self) -> str:
        """One line: shape, base, task and digest."""
        about = {
            "length": self.length,
            "layers": len(self.layers),
            "base": (self.base or {}).get("name"),
            "task": (self.task or {}).get("name"),
        }
        shown = ", ".join(f"{name}={value!r}" for name, value in about.items() if value is not None)
        return f"{type(self).__name__}({shown}, digest={self.digest[:12]!r})"

    @property
    def length(self) -> int:
        """P, of the longest layer."""
        return max(len(t) for t in self.kv.values())

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Of each tensor: P, H, D."""
        return {name: (len(t), t.shape[1], t.shape[2]) for name, t in self.kv.items()}

    @property
    def num_stored(self) -> int:
        """Numbers stored (the paper's 0.1 %; training with an MLP has many more, see ``training["num_trained"]``)."""
        return sum(t.numel() for t in self.kv.values())

    @property
    def num_trained(self) -> int:
        """Numbers that training adjusted."""
        return int(self.training.get("num_trained", self.num_stored))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.kv.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of site ``self`` that have rows, ascending; in the others text sees its own tokens only."""
        return folder.layers_of(self.kv)

    @property
    def peft_incompatibility(self) -> str | None:
        """Why PEFT cannot hold the prefix exactly, None if it can."""
        return peft_format.reason_against(self.kv, self.pos_start, self.window, num_layers(self.base))

    @property
    def requires(self) -> dict[str, Any]:
        """What using the prefix takes.

        ``base``: name of the base model, None if unknown; ``dtype``: of the stored numbers (a base of any dtype reads them); ``positions``: least number
        of positions that the base must have for one prompt token; ``prefixfast``: releases that read it.
        """
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in self.kv.values()})
        name = (self.base or {}).get("name") or None
        return {"base": name, "dtype": ", ".join(dtypes), "positions": self.pos_start + 1, "prefixfast": SINCE}

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of tensors and conventions: with equal digests, equal prompts and equal parameters give equal text."""
        sha = hashlib.sha256(json.dumps([self.pos_start, self.window]).encode())
        for name, t in sorted(self.kv.items()):
            sha.update(json.dumps([name, list(t.shape), str(t.dtype)]).encode())
            sha.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    @property
    def fields(self) -> dict[str, Any]:
        """Everything but the tensors, by attribute name."""
        return {name: getattr(self, name) for name in folder.FIELDS}

    @property
    def linearizer(self) -> Mapping[str, Any] | None:
        """``task``, by the name that it has in version 0.1.0."""
        renamed("Prefix.linearizer", "Prefix.task")
        return self.task

    @property
    def not_peft_because(self) -> str | None:
        """``peft_incompatibility``, by the name that it has in version 0.1.0."""
        renamed("Prefix.not_peft_because", "Prefix.peft_incompatibility")
        return self.peft_incompatibility
