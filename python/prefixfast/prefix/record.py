"""`PrefixData`: the tensors of a prefix, and the conventions that say how they are used. No method needs a model.

Shape letters: P prefix rows, H key-value heads, D head dimension.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from prefixfast.config.json_types import JSON
from prefixfast.config.sites import BySite
from prefixfast.errors import DataError, shown, warn_renamed
from prefixfast.prefix import peft_format
from prefixfast.prefix.names import UNWRITTEN, Position, PrefixFields, Window
from prefixfast.prefix.site_rows import SiteRows
from prefixfast.prefix.stored_tensors import StoredTensors
from prefixfast.prefix.tensors import PrefixTensors, shared_tensors
from prefixfast.prefix.validate import check_prefix

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.model.fingerprint import Fingerprint

READABLE = (">=0.1.0", ">0.1.0")  # releases that read the folders of this one: of prefixes of 0.1.0, of others
C = TypeVar("C", bound=type)


class Requirements(TypedDict):
    """Requirements for the use of a prefix.

    Attributes:
        base: Name of the base model, None if unknown.
        dtype: dtype of the stored numbers; a base model of any dtype reads them.
        positions: Smallest number of positions of the base model, with room for one prompt token.
        prefixfast: Releases of prefixfast that read the prefix.
    """

    base: str | None
    dtype: str
    positions: int
    prefixfast: str


def _accept_linearizer(cls: C) -> C:
    """Let the constructor take ``linearizer``, the name of ``task`` in version 0.1.0, with a warning."""
    init: Callable[..., None] = vars(cls)["__init__"]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **fields: Any) -> None:
        if "linearizer" in fields:
            warn_renamed("Prefix(linearizer=...)", "Prefix(task=...)")
            fields["task"] = fields.pop("linearizer")
        init(self, *args, **fields)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@_accept_linearizer
@dataclass(frozen=True, eq=False, repr=False)
class PrefixData(SiteRows, StoredTensors):
    """Tensors and conventions of a prefix. Immutable; two prefixes are compared by their `digest`.

    The prefix holds copies of the given tensors and mappings, and every access to a tensor of ``kv`` returns a copy.

    Attributes:
        kv: Tensors ``{site}.{layer}.k`` and ``{site}.{layer}.v`` by name, shape ``[P, H, D]``. Keys are stored after
            RoPE. Layers may differ in P, H and D, and may be absent.
        pos_start: Position of the first token after the prefix: P as in PEFT, or 0.
        window: Treatment of the prefix by sliding windows. ``"slide"``: the window hides old prefix rows, as in PEFT.
            ``"always"``: prefix rows stay visible.
        base: Fingerprint of the base model, None if unknown (an imported PEFT adapter).
        task: Task that turns rows into prompts, as `Task.spec` gives it; None for plain prompts.
        decoding: Default `GenerationParams` of the prefix.
        training: Settings, number of steps and final losses of the training, or another origin.
        position: Place of the prefix in a sequence. ``"prefix"``: before the first token. ``"infix"``: before the last
            prompt token, so that earlier tokens do not see it.
    """

    kv: Mapping[str, Tensor]
    pos_start: int
    window: Window = "slide"
    base: Fingerprint | None = None
    task: Mapping[str, JSON] | None = None
    decoding: Mapping[str, JSON] = field(default_factory=dict)
    training: Mapping[str, JSON] = field(default_factory=dict)
    position: Position = "prefix"

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv", PrefixTensors(self.kv))
        self._copy_mappings(("base", "task", "decoding", "training"))
        check_prefix(shared_tensors(self.kv), self.pos_start, self.window, self.position)
        frozen, rows = self.training.get("num_frozen_tokens", 0), min(map(self.length_at, self.sites))
        if type(frozen) is not int or not 0 <= frozen <= rows:
            expected = f"a number from 0 to the {rows} rows"
            msg = f"training: num_frozen_tokens: expected {expected}, got {shown(frozen)}"
            raise DataError(msg)

    def __repr__(self) -> str:
        """One line with length, number of layers, base model, task and digest."""
        position = None if self.position == UNWRITTEN["position"] else self.position
        length = dict(self.length) if isinstance(self.length, BySite) else self.length
        layers = {site: len(self.layers_at(site)) for site in self.sites}
        own = layers["self"] if self.sites == ("self",) else layers
        return self._described(length=length, position=position, layers=own)

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shape ``(P, H, D)`` of each tensor."""
        return {name: (len(t), t.shape[1], t.shape[2]) for name, t in shared_tensors(self.kv).items()}

    @property
    def _stored(self) -> Mapping[str, Tensor]:
        return shared_tensors(self.kv)

    @property
    def peft_incompatibility(self) -> str | None:
        """Reason why PEFT cannot hold the prefix exactly, None if it can."""
        if self.position == "infix":
            return peft_format.NO_INFIX
        return peft_format.peft_incompatibility(shared_tensors(self.kv), self.pos_start, self.window, self.base)

    @property
    def requires(self) -> Requirements:
        """Requirements for the use of the prefix.

        Returns:
            ``base`` (name of the base model, None if unknown), ``dtype`` (of the stored numbers; a base model of any
            dtype reads them), ``positions`` (smallest number of positions of the base model, with room for one prompt
            token) and ``prefixfast`` (releases that read the prefix).
        """
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in shared_tensors(self.kv).values()})
        return {
            "base": (self.base.get("name") if self.base else None) or None,
            "dtype": ", ".join(dtypes),
            "positions": self.pos_start + 1,
            "prefixfast": READABLE[self.position == "infix" or is_seq2seq(self)],
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of tensors and conventions, in hex digits.

        The conventions are ``pos_start``, ``window`` and, of an infix, ``position``. The task and the decoding defaults
        are not part of it.
        """
        import torch

        conventions = [self.pos_start, self.window] + ([self.position] if self.position == "infix" else [])
        sha = hashlib.sha256(json.dumps(conventions).encode())
        for name, t in sorted(shared_tensors(self.kv).items()):
            sha.update(json.dumps([name, list(t.shape), str(t.dtype)]).encode())
            sha.update(t.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    @property
    def fields(self) -> PrefixFields:
        """Attributes other than the tensors, as arguments of the constructor."""
        return {
            "pos_start": self.pos_start,
            "window": self.window,
            "base": self.base,
            "task": self.task,
            "decoding": self.decoding,
            "training": self.training,
            "position": self.position,
        }

    @property
    def linearizer(self) -> Mapping[str, JSON] | None:
        """Name of `task` in version 0.1.0; deprecated."""
        warn_renamed("Prefix.linearizer", "Prefix.task")
        return self.task

    @property
    def not_peft_because(self) -> str | None:
        """Name of `peft_incompatibility` in version 0.1.0; deprecated."""
        warn_renamed("Prefix.not_peft_because", "Prefix.peft_incompatibility")
        return self.peft_incompatibility


def is_seq2seq(prefix: PrefixData) -> bool:
    """Whether a prefix is known to be one of an encoder-decoder base."""
    return prefix.sites != ("self",) or peft_format.is_seq2seq(prefix.base, prefix.training)
