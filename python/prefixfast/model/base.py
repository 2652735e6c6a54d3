"""`load`: a Hugging Face model, its tokenizer and the attachment, as one object that training and generation share."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from prefixfast.attention import ops
from prefixfast.attention.plan import Plan
from prefixfast.errors import ConfigError
from prefixfast.model.attach import Handle, LayerShape, attach, packed_forward
from prefixfast.model.fingerprint import fingerprint
from prefixfast.model.lm_head import Head, find_head, packed_hidden
from prefixfast.model.prepack import Packed, prepack
from prefixfast.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(eq=False)
class Model:
    """An attached base, made by `load`.

    Attributes:
        hf: The Hugging Face model, frozen.
        backend: Which kernels attention runs on.
        handle: The attachment.
        tokenizer: None if the base came as an object without one.
        head: Its output layer, None if it is no plain one.
        closed: Whether it was given back.
        packed: Weights laid out for this CPU; see `prepack`.
    """

    hf: PreTrainedModel
    backend: ops.Backend
    handle: Handle
    tokenizer: Tokenizer | None
    head: Head | None
    closed: bool = False
    packed: Packed | None = None

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.hf.dtype

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """Heads of every attention layer."""
        return self.handle.layers

    @property
    def max_positions(self) -> int:
        """Positions that the base was built for."""
        return int(self.hf.config.get_text_config().max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return int(self.hf.get_input_embeddings().weight.shape[0])

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """See `prefixfast.model.fingerprint`."""
        return fingerprint(self.hf, None if self.tokenizer is None else self.tokenizer.digest_text)

    def forward(self, plan: Plan, ids: Tensor) -> Tensor:
        """One packed forward.

        Args:
            plan: Which tokens belong together, and what they see.
            ids: Tokens int64 ``[N]``.

        Returns:
            Logits ``[n, V]`` in the compute dtype, at ``plan.logits_at``, or of all ``N``.
        """
        return packed_forward(self.hf, plan, ids)

    def losses(self, plan: Plan, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of targets, in nats, from one packed forward.

        Args:
            plan: As in `forward`, with ``logits_at`` ``[n]``.
            ids: Tokens int64 ``[N]``.
            targets: Int64 ``[n]``.

        Returns:
            Losses ``[n]`` in fp32 (fp64 for a base in fp64).
        """
        if self.head is not None:
            return self.head.losses(packed_hidden(self.hf, plan, ids), targets, self.backend.name)
        logits = self.forward(plan, ids)
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none")

    def prepack(self) -> Packed:
        """Lay the weights out for this CPU, once; they stay so until `close`. Returns what was done, or why not (`Packed`)."""
        if self.packed is None:
            self.packed = prepack(self.hf)
        return self.packed

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ConfigError: If there is none.
        """
        if self.tokenizer is None:
            msg = "this base has no tokenizer: give token ids, or load(model, tokenizer=...)"
            raise ConfigError(msg)
        return self.tokenizer

    def check_prefix(self, prefix: Any, what: str = "the prefix") -> None:
        """Call `prefixfast.check_fits`, which has replaced this method of version 0.1.0.

        Args:
            prefix: Prefix, or its entry in a store.
            what: Name of the prefix in the error's message.

        Raises:
            BaseMismatchError: If the prefix does not fit this base.
        """
        from prefixfast import check_fits

        warnings.warn("Model.check_prefix was renamed: use prefixfast.check_fits(model, prefix)", FutureWarning, stacklevel=2)
        check_fits(self, prefix, what)

    def close(self) -> None:
        """Give the Hugging Face model back as it was; a second call does nothing."""
        if not self.closed:
            self.closed = True
            if self.packed is not None:
                self.packed.undo()
                self.packed = None
            self.handle.detach()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(
    model: str | Path | PreTrainedModel | Model,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    backend: str = "auto",
    trust_remote_code: bool = False,
    local_files_only: bool = False,
) -> Model:
    """Load a base model and attach it.

    Args:
        model: Hub id, local folder, ``.gguf`` file (its numbers are dequantized to ``dtype``), a loaded Hugging Face model (attached in place until
            `Model.close`; also inside a PeftModel, whose LoRA layers are then part of the base), or a `Model` (returned as it is).
        tokenizer: Hugging Face tokenizer; by default the one beside the model.
        dtype: Compute dtype; ``"auto"``: bfloat16 on a GPU and on CPUs with AVX512-BF16 or AMX, else float32. A loaded model keeps its own.
        device: ``"auto"``: a GPU if there is one.
        revision: Of a hub id.
        backend: ``"auto"`` or one of `prefixfast.attention.ops.BACKENDS`.
        trust_remote_code: Run code from the model's repository.
        local_files_only: Do not ask the hub.

    Returns:
        The attached, frozen base: a `Model`, which is also a context manager.

    Raises:
        ConfigError: For a model that cannot work, or options that do not fit.

    Example:
        >>> with load("tiny-gpt2", dtype="float32") as model:
        ...     model.dtype, model.vocab_size, len(model.layers)
        (torch.float32, 101, 3)
    """
    if isinstance(model, Model):
        return _opened(model)
    if backend not in ("auto", *ops.BACKENDS):
        ops.choose_backend(backend, torch.device("cpu"), torch.float32, ())  # refuse before loading
    if not isinstance(model, str | Path):
        return _wrap(model, tokenizer, backend)
    where = _device(device)
    common = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    compute = _dtype(dtype, where)
    if Path(model).suffix.lower() == ".gguf":
        hf, own = _from_gguf(Path(model), compute, tokenizer)
        return _wrap(hf.to(where), own, backend)
    try:
        hf = AutoModelForCausalLM.from_pretrained(model, dtype=compute, **common).to(where)
        own = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(model, **common)
    except (OSError, ValueError) as e:
        msg = f"model: {str(model)!r} cannot be loaded: {e}"
        raise ConfigError(msg) from e
    return _wrap(hf, own, backend)


def _from_gguf(path: Path, compute: torch.dtype, tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a ``.gguf`` file; its numbers become ordinary ones, since packed weights serve neither training nor our products."""
    if not path.is_file():
        msg = f"model: {str(path)!r}: there is no such file"
        raise ConfigError(msg)
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        msg = f"model: {str(path)!r}: reading a .gguf file needs {' and '.join(missing)}: pip install 'prefixfast[gguf]'"
        raise ConfigError(msg)
    unpacked = {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    try:
        hf = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=compute, **unpacked)
        own = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as e:  # the reader of these files lets through whatever a damaged one makes it stumble over
        msg = f"model: {str(path)!r} cannot be loaded: {type(e).__name__}: {e}"
        raise ConfigError(msg) from e
    hf.name_or_path = hf.config._name_or_path = str(path)  # by which a prefix finds its base again
    return hf, own


def _inside_peft(model: Any) -> Any:
    """The transformers model inside a PeftModel, with whatever adapters PEFT has put into its layers; any other object as it is.

    Raises:
        ConfigError: For an adapter of virtual tokens, which lies beside the model and would be left out.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    beside = [name for name, config in model.peft_config.items() if getattr(config, "is_prompt_learning", False)]
    if beside:
        msg = f"model: the adapters {beside} of this PeftModel are virtual tokens: give its base model, and read their folders with Prefix.from_pretrained"
        raise ConfigError(msg)
    return model.get_base_model()


def _wrap(hf: PreTrainedModel, tokenizer: Any, backend: str) -> Model:
    hf = _inside_peft(hf)
    if not isinstance(hf, PreTrainedModel):
        msg = f"model: expected a hub id, a folder, a transformers model or a prefixfast Model, got {type(hf).__name__}"
        raise ConfigError(msg)
    if tokenizer is None and (name := str(getattr(hf, "name_or_path", "") or "")):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError) as e:
            logger.warning("no tokenizer found beside %s (%s): token ids only", name, e)
    ours = None if tokenizer is None else Tokenizer.from_hf(tokenizer)  # before attaching: it may raise
    handle = attach(hf)
    try:
        shapes = tuple((s.num_heads // s.num_kv_heads, s.head_dim) for s in handle.layers)
        chosen = ops.choose_backend(backend, hf.device, hf.dtype, shapes, max(s.num_kv_heads for s in handle.layers))
    except ConfigError:
        handle.detach()
        raise
    return Model(hf, chosen, handle, ours, find_head(hf))


def _opened(model: Model) -> Model:
    if model.closed:
        msg = "this base was closed: load it again"
        raise ConfigError(msg)
    return model


@dataclass
class _Cached:
    key: tuple[Any, ...]
    model: Model


_CACHE: list[_Cached] = []
_CACHE_LOCK = threading.Lock()


def check_base_fields(model: Model, *, dtype: str = "auto", device: str = "auto", revision: str | None = None, backend: str = "auto") -> None:
    """Raise `ConfigError` if a base that is loaded already is not as an engine's options want it."""
    name = next((n for n, d in DTYPES.items() if d == model.dtype), str(model.dtype))
    have = {"dtype": (dtype, name), "device": (device, model.device.type), "backend": (backend, model.backend.name)}
    for option, (wanted, got) in have.items():
        if wanted not in ("auto", got) and not (option == "device" and torch.device(wanted) == model.device):
            msg = f"{option}: this base was loaded with {got!r}, got {wanted!r}; load it again with {option}={wanted!r}"
            raise ConfigError(msg)


@contextlib.contextmanager
def borrowed(model: str | Path | PreTrainedModel | Model, **how: Any) -> Iterator[Model]:
    """A base for the time of one call: a name is loaded once per process and kept, an object is attached and given back, a `Model` is used as it is.

    Args:
        model: The base.
        how: ``dtype``, ``device``, ``revision`` and ``backend`` of `load`; the kept base is another one where they differ.
    """
    if isinstance(model, Model):
        yield _opened(model)
    elif isinstance(model, str | Path):
        with _CACHE_LOCK:
            key = (str(model), *sorted((name, value) for name, value in how.items() if value not in ("auto", None)))
            if not _CACHE or _CACHE[0].key != key:
                _drop()
                _CACHE.append(_Cached(key, load(model, **how)))
            kept = _CACHE[0].model
        yield kept
    else:
        loaded = load(model)
        try:
            yield loaded
        finally:
            loaded.close()


def unload() -> None:
    """Free the base that this process keeps for calls by name; the next such call loads it again.

    Example:
        >>> unload()
    """
    with _CACHE_LOCK:
        _drop()


def _drop() -> None:
    while _CACHE:
        _CACHE.pop().model.close()


def _device(name: str | torch.device) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as e:
        msg = f"device: expected 'auto' or a device of this machine, got {name!r}: {str(e).splitlines()[0]}"
        raise ConfigError(msg) from e
    return device


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    slow = device.type == "cpu" and not has_fast_bf16()
    if dtype == "auto":
        if slow:
            logger.info("dtype auto: float32, since this CPU has neither AVX512-BF16 nor AMX")
        return torch.float32 if slow else torch.bfloat16
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        msg = f"dtype: expected 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}"
        raise ConfigError(msg)
    if device.type == "cpu" and chosen == torch.float16:
        msg = "dtype float16 is for GPUs; use float32 or bfloat16 on a CPU"
        raise ConfigError(msg)
    if slow and chosen == torch.bfloat16:
        logger.warning("bfloat16 without AVX512-BF16 or AMX: matrix products are about 4 times slower than in float32")
    return chosen
