"""`load`: a Hugging Face model from a hub id, a folder, a ``.gguf`` file or memory, attached and frozen."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from prefixfast.attention import ops
from prefixfast.errors import ConfigError
from prefixfast.model.attach import attach
from prefixfast.model.base import DTYPES, Model
from prefixfast.model.lm_head import find_head
from prefixfast.model.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


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
        return model.opened()
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
        msg = (
            f"model: {str(path)!r}: reading a .gguf file needs {' and '.join(missing)}: pip install 'prefixfast[gguf]'"
        )
        raise ConfigError(msg)
    unpacked = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
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
