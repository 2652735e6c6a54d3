"""`load`, which loads a base model from a hub id, a folder, a ``.gguf`` file or memory, and attaches it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as hf_logging

from prefixfast import _rust
from prefixfast.attention import ops
from prefixfast.config.engine import BaseMismatch
from prefixfast.errors import ConfigError, check_choice, check_flag, check_string, shown
from prefixfast.io.progress import Progress, draws_bars
from prefixfast.model.attach import attach
from prefixfast.model.base import DTYPES, Model
from prefixfast.model.base_name import check_base_name
from prefixfast.model.lm_head import find_head
from prefixfast.model.quantized_copy import gguf_quantization, quantization_of
from prefixfast.model.seq2seq.facts import seq2seq_facts
from prefixfast.model.seq2seq.head import find_seq2seq_head
from prefixfast.model.tokenizer import Tokenizer, read_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load(
    model: str | Path | PreTrainedModel | PeftModel | Model,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    backend: str = "auto",
    trust_remote_code: bool = False,
    local_files_only: bool = False,
    allow_base_mismatch: BaseMismatch | None = None,
) -> Model:
    """Load a base model and attach it.

    Args:
        model: Hub id, local folder, ``.gguf`` file, Hugging Face model, PeftModel or `Model`. The numbers of a
            ``.gguf`` file are dequantized to ``dtype``. A Hugging Face model is attached in place until `Model.close`.
            LoRA layers of a PeftModel become part of the base model. A `Model` is returned as it is.
        tokenizer: Hugging Face tokenizer. None takes the tokenizer beside the model.
        dtype: Compute dtype. ``"auto"`` is bfloat16 on a GPU and on CPUs with AMX or AMD's AVX512-BF16, else float32.
            A model in memory keeps its dtype.
        device: Device of the base model. ``"auto"`` is a GPU if there is one, else the CPU. A model in memory keeps its
            device.
        revision: Branch, tag or commit of a hub id.
        backend: Attention kernels, ``"triton"``, ``"torch"``, ``"reference"`` or ``"auto"``.
        trust_remote_code: Whether code from the model's repository may run.
        local_files_only: Whether to read a hub id from the local cache without asking the hub.
        allow_base_mismatch: Difference from the base model of a prefix that is a warning instead of an error.
            ``"quantized"`` accepts prefixes of a base model of which this one is a quantized copy. None accepts no
            difference.

    Returns:
        Attached and frozen base model, which is also a context manager.

    Raises:
        ConfigError: If the model is unsupported or cannot be loaded, or if an option is wrong.

    Example:
        >>> with load("tiny-gpt2", dtype="float32") as model:
        ...     model.dtype, model.vocab_size, len(model.layers)
        (torch.float32, 101, 3)
    """
    if allow_base_mismatch is not None:
        check_choice("allow_base_mismatch", allow_base_mismatch, get_args(BaseMismatch))
    if isinstance(model, Model):
        if allow_base_mismatch not in (None, model.allow_base_mismatch):
            msg = "allow_base_mismatch: this base was loaded without it; load it again with allow_base_mismatch"
            raise ConfigError(msg)
        return model.opened()
    check_flag("trust_remote_code", trust_remote_code)
    check_flag("local_files_only", local_files_only)
    check_string("revision", "main" if revision is None else revision, "a branch, tag or commit")
    if not isinstance(backend, str) or backend not in ("auto", *ops.BACKENDS):
        ops.choose_backend(backend, torch.device("cpu"), torch.float32, ())  # raises before the model is loaded
    if not isinstance(model, str | Path):
        return _wrap(model, tokenizer, backend, allow_base_mismatch)
    check_base_name(model, local_files_only=local_files_only)
    where = find_device(device)
    common = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": local_files_only}
    compute = _dtype(dtype, where)
    if Path(model).suffix.lower() == ".gguf":
        with _loading(str(model)):
            hf, own = _from_gguf(Path(model), compute, tokenizer)
        made = _wrap(hf.to(where), own, backend, allow_base_mismatch)
        made.quantization = gguf_quantization(Path(model))
        return made
    try:
        with _loading(str(model)):
            auto = AutoModelForSeq2SeqLM if is_seq2seq_base(model, **common) else AutoModelForCausalLM
            hf = auto.from_pretrained(model, dtype=compute, **common).to(where)
    except Exception as e:  # transformers and the libraries of quantized weights raise many kinds of errors
        hints = [f"pip install {e.name}"] if isinstance(e, ModuleNotFoundError) else []
        hints += [] if Path(model).exists() else [f"there is no folder {shown(str(model))} here"]
        why = "; ".join([f"{type(e).__name__}: {' '.join(str(e).split())}", *hints])
        msg = f"model: {shown(str(model))} cannot be loaded: {why}"
        raise ConfigError(msg) from e
    own = tokenizer if tokenizer is not None else read_tokenizer(model, **common)
    return _wrap(hf, own, backend, allow_base_mismatch)


def is_seq2seq_base(name: str | Path, **common: Any) -> bool:
    """Whether a base model is an encoder-decoder one by its configuration.

    Args:
        name: Hub id or local folder.
        common: Arguments of ``from_pretrained``.
    """
    try:
        config = AutoConfig.from_pretrained(name, **common)
    except Exception:  # an adapter's folder has none; the errors of others come again with the weights
        return False
    return bool(getattr(config, "is_encoder_decoder", False))


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Report that a base model is loaded; transformers draws its bars only where prefixfast draws its own."""
    hidden = hf_logging.is_progress_bar_enabled() and not draws_bars()
    if hidden:
        hf_logging.disable_progress_bar()
    try:
        with Progress(f"load {name}"):
            yield
    finally:
        if hidden:
            hf_logging.enable_progress_bar()


def _from_gguf(path: Path, compute: torch.dtype, tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a ``.gguf`` file, with dequantized weights; quantized ones cannot backpropagate."""
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        msg = (
            f"model: {shown(str(path))}: reading a .gguf file needs {' and '.join(missing)}: "
            "pip install 'prefixfast[gguf]'"
        )
        raise ConfigError(msg)
    unpacked = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    try:
        hf = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=compute, **unpacked)
        own = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as e:  # transformers raises many kinds of errors for damaged files
        reason = f"{type(e).__name__}: {e}"
        if is_seq2seq_base(path.parent, gguf_file=path.name):
            reason = "it is an encoder-decoder model, which is loaded from a folder of transformers or a hub id only"
        msg = f"model: {shown(str(path))} cannot be loaded: {reason}"
        raise ConfigError(msg) from e
    hf.name_or_path = hf.config._name_or_path = str(path)  # the name under which a prefix finds its base
    return hf, own


def _inside_peft(model: Any) -> Any:
    """The transformers model inside a PeftModel, with the adapters in its layers; other objects unchanged.

    Raises:
        ConfigError: If an adapter is virtual tokens, which are not part of the inner model and would be lost.
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    beside = [name for name, config in model.peft_config.items() if getattr(config, "is_prompt_learning", False)]
    if beside:
        msg = (
            f"model: the adapters {beside} of this PeftModel are virtual tokens: give its base model, and read their "
            "folders with Prefix.from_pretrained"
        )
        raise ConfigError(msg)
    return model.get_base_model()


def _wrap(hf: PreTrainedModel, tokenizer: Any, backend: str, allow_base_mismatch: BaseMismatch | None) -> Model:
    """Attach a transformers model and make it a `Model`."""
    hf = _inside_peft(hf)
    if not isinstance(hf, PreTrainedModel):
        msg = f"model: expected a hub id, a folder, a transformers model or a prefixfast Model, got {type(hf).__name__}"
        raise ConfigError(msg)
    if tokenizer is None and (name := str(getattr(hf, "name_or_path", "") or "")):
        try:
            tokenizer = read_tokenizer(name, local_files_only=True)
        except ConfigError as e:
            logger.warning("%s; prompts must be token ids", e)
    ours = None if tokenizer is None else Tokenizer.from_hf(tokenizer)  # raises before the model is attached
    with Progress(f"compare {type(hf).__name__} with its own forward"):
        handle = attach(hf)
    try:
        layers = [s for of_site in handle.sites.values() for s in of_site]
        shapes = tuple((s.num_heads // s.num_kv_heads, s.attention_dim) for s in layers)
        chosen = ops.choose_backend(backend, hf.device, hf.dtype, shapes, max(s.num_kv_heads for s in layers))
        with handle.guard.running():
            facts = seq2seq_facts(hf) if hf.config.is_encoder_decoder else None
            head = find_head(hf) if facts is None else find_seq2seq_head(hf)
    except BaseException:
        handle.detach()
        raise
    made = Model(hf, chosen, handle, ours, head, seq2seq=facts)
    made.quantization, made.allow_base_mismatch = quantization_of(hf), allow_base_mismatch
    return made


def find_device(name: str | torch.device) -> torch.device:
    """The device of a name; ``"auto"`` is a GPU if there is one, else the CPU.

    Raises:
        ConfigError: If this machine has no such device.
    """
    if isinstance(name, str) and name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as e:
        msg = f"device: expected 'auto' or a device of this machine, got {shown(name)}: {str(e).splitlines()[0]}"
        raise ConfigError(msg) from e
    return device


def has_fast_bf16() -> bool:
    """Whether this CPU multiplies matrices faster in bfloat16 than in float32: with AMX, or with AMD's AVX512-BF16.

    AVX512-BF16 of Intel has about half the rate of float32 (docs/decisions.md).
    """
    return torch.cpu._is_amx_tile_supported() or _rust.attend_paths()[0] == "avx512_bf16"


def compute_dtype(name: str) -> str:
    """Name of the compute dtype that `load` chooses for an option ``dtype`` on this machine."""
    return str(_dtype(name, find_device("auto"))).removeprefix("torch.")


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    slow = device.type == "cpu" and not has_fast_bf16()
    if isinstance(dtype, str) and dtype == "auto":
        if slow:
            logger.debug("dtype 'auto' is float32: this CPU has neither AMX nor AMD's AVX512-BF16")
        elif device.type == "cpu":
            logger.debug("dtype 'auto' is bfloat16: this CPU has AMX or AMD's AVX512-BF16; results differ from fp32's")
        return torch.float32 if slow else torch.bfloat16
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or chosen not in DTYPES.values():
        msg = f"dtype: expected 'auto' or one of {', '.join(DTYPES)}, got {shown(dtype)}"
        raise ConfigError(msg)
    if device.type == "cpu" and chosen == torch.float16:
        msg = "dtype float16 is for GPUs; use float32 or bfloat16 on a CPU"
        raise ConfigError(msg)
    if slow and chosen == torch.bfloat16:
        logger.warning(
            "bfloat16 without AMX or AMD's AVX512-BF16: matrix products are 1.5 to 4 times slower than in float32"
        )
    return chosen
