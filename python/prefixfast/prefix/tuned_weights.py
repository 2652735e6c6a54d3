"""`TunedWeights`, trained weights of a base model or of small networks in its layers: saving and loading."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.config.json_types import JSON
from prefixfast.errors import DataError, check_flag, shown
from prefixfast.io.atomic import read_stable
from prefixfast.io.paths import as_path
from prefixfast.prefix import tuned_folder as files
from prefixfast.prefix.folder import META, OWNED
from prefixfast.prefix.hub import find_folder
from prefixfast.prefix.lora_format import check_options
from prefixfast.prefix.prefix import Prefix
from prefixfast.prefix.stored_tensors import StoredTensors
from prefixfast.prefix.tensors import PrefixTensors, shared_tensors
from prefixfast.prefix.validate import DTYPES

if TYPE_CHECKING:
    from torch import Tensor

    from prefixfast.model.fingerprint import Fingerprint


@dataclass(frozen=True, eq=False, repr=False)
class TunedWeights(StoredTensors):
    """Weights that ``train(method="full")``, ``"top2"``, ``"adapter"``, ``"lora"`` or ``"prefix+lora"`` has trained.

    `generate` and `score` take them in the place of the one prefix of all requests. They act in the base model for the
    time of the call, which then has its own weights again. LoRA that was trained with a prefix holds this prefix, which
    all requests of the call see.

    Weights are immutable, as a `Prefix` is, and compared by their `digest`.

    Attributes:
        tensors: Tensors ``[...]`` by name, in the shapes of the method. Every access returns a copy.
        method: Method that trained them.
        options: Options that they were made with.
        base: Fingerprint of the base model.
        task: Task that turns rows into prompts, as `Task.spec` gives it; None for plain prompts.
        decoding: Default `GenerationParams`.
        training: Settings, number of steps, final losses and cost of the training.
        prefix: Prefix that was trained with LoRA. Its base is the base model with the LoRA layers, so that alone it
            fits a PeftModel with them. None for other weights.

    Raises:
        DataError: If a tensor or attribute is not one that such weights can have.

    Example:
        >>> weights = train(base, rows, method="top2", max_steps=1)
        >>> weights.method, weights.num_stored == weights.num_trained
        ('top2', True)
        >>> weights.save_pretrained("top2")
        >>> TunedWeights.from_pretrained("top2").digest == weights.digest
        True
    """

    tensors: Mapping[str, Tensor]
    method: str
    options: Mapping[str, JSON] = field(default_factory=dict)
    base: Fingerprint | None = None
    task: Mapping[str, JSON] | None = None
    decoding: Mapping[str, JSON] = field(default_factory=dict)
    training: Mapping[str, JSON] = field(default_factory=dict)
    prefix: Prefix | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", PrefixTensors(self.tensors))
        if self.method not in files.METHODS:
            msg = f"method: expected one of {', '.join(files.METHODS)}, got {shown(self.method)}"
            raise DataError(msg)
        self._copy_mappings(("options", "base", "task", "decoding", "training"))
        if self.method == "lora":
            check_options(self.options)
        if self.prefix is not None and (self.method != "lora" or not isinstance(self.prefix, Prefix)):
            got = f"{shown(self.prefix)} and method {shown(self.method)}"
            msg = f"prefix: expected a Prefix with weights of method 'lora', or None, got {got}"
            raise DataError(msg)
        if not self.tensors:
            msg = "tensors: expected at least one, got none"
            raise DataError(msg)
        for name, t in shared_tensors(self.tensors).items():
            if str(t.dtype) not in DTYPES:
                msg = f"{name:.200}: expected a floating-point tensor, got {t.dtype}"
                raise DataError(msg)
            if not bool(t.isfinite().all()):
                msg = f"{name:.200}: expected finite numbers, got NaN or infinity"
                raise DataError(msg)

    def __repr__(self) -> str:
        """One line with method, length of the prefix, number of numbers, base model, task and digest."""
        length = None if self.prefix is None else self.prefix.length
        return self._described(method=self.method, prefix_length=length, num_stored=self.num_stored)

    @property
    def _stored(self) -> Mapping[str, Tensor]:
        rows = {} if self.prefix is None else shared_tensors(self.prefix.kv)
        return {**shared_tensors(self.tensors), **{f"prefix.{name}": t for name, t in rows.items()}}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of method, options, tensors and prefix, in hex digits."""
        import torch

        own = [self.method, self.options, *([] if self.prefix is None else [self.prefix.digest])]
        sha = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
        for name, t in sorted(shared_tensors(self.tensors).items()):
            sha.update(json.dumps([name, list(t.shape), str(t.dtype)]).encode())
            sha.update(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    @property
    def fields(self) -> dict[str, Any]:
        """Attributes other than the tensors and the prefix, as arguments of the constructor."""
        return {name: getattr(self, name) for name in files.FIELD_NAMES}

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Save the weights to a folder as safetensors, beside ``prefixfast.json``.

        LoRA is saved as an adapter that ``PeftModel.from_pretrained`` reads. Its prefix is saved beside it in
        ``prefix.safetensors``.

        Args:
            folder: Path of the folder, which is created with its parents. Weights in the folder are replaced
                atomically; other files stay.
            overwrite: Whether a prefix in the folder is replaced too.

        Raises:
            ConfigError: If the folder holds a prefix, or a PEFT adapter of another program, which would be lost.
            OSError: If the files cannot be written. The old content of the folder is intact then.
        """
        check_flag("overwrite", overwrite)
        path = as_path("folder", folder)
        tensors = shared_tensors(self.tensors)
        files.write_tuned(path, tensors, self.digest, self.fields, prefix=self.prefix, overwrite=overwrite)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
    ) -> TunedWeights:
        """Load weights from a local folder or from the Hugging Face hub, also LoRA that PEFT has trained.

        Args:
            path: Path of a folder, or a hub id ``"name/repository"``.
            revision: Branch, tag or commit of a hub id.
            local_files_only: Whether a hub id is read from the local cache only.

        Raises:
            DataError: If the folder is missing or damaged, or holds something else.
            ConfigError: If a revision is given for a local folder, or the hub cannot be reached.
        """
        return read_stable(find_folder(path, revision, local_files_only=local_files_only, files=OWNED), cls._read)

    @classmethod
    def _read(cls, path: Path) -> TunedWeights:
        read = files.read_tuned(path)
        digest = read.digest
        try:
            prefix = None if read.prefix is None else Prefix(read.prefix.kv, **read.prefix.fields)
            found = cls(read.tensors, prefix=prefix, **read.fields)
        except DataError as e:
            msg = f"{path.name}: {e}"
            raise DataError(msg, path=str(path)) from e
        if digest not in (None, found.digest):
            msg = f"{path}: the tensors are not those that {META} describes: another program changed the folder"
            raise DataError(msg, path=str(path))
        return found
