"""LoRA layers of PEFT in an attached base model, which has its own modules back afterwards.

Source:
    Hu et al. 2021 (arXiv:2106.09685). PEFT 0.21.2 makes the layers and computes them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError, shown
from prefixfast.model.adapters import has_adapters
from prefixfast.model.base import Model
from prefixfast.model.lm_head import find_head
from prefixfast.model.text_kv import parameter_dtype

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "default"  # name of the adapter inside PEFT's layers
ALL_LINEAR = "all-linear"  # PEFT's name of all linear layers but the output layer
PARTS = ("lora_A", "lora_B")
SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern")  # fields that narrow target_modules


def new_lora(model: Model, given: Mapping[str, JSON], seed: int) -> tuple[dict[str, Tensor], dict[str, JSON]]:
    """Initial tensors of LoRA layers, and the fields of their configuration.

    Without ``target_modules`` the layers are those that PEFT chooses for the family of the base model, which are
    projections of attention. A family that PEFT does not know has LoRA in all linear layers but the output layer.

    Args:
        model: Base model.
        given: Fields of PEFT's configuration.
        seed: Random seed; the tensors are those of PEFT with it.

    Returns:
        Parameters by PEFT's names without ``base_model.model.``, in fp32 (fp64 for a base in fp64); and the
        fields that differ from PEFT's defaults, with the names of the layers that they select.

    Raises:
        ConfigError: If PEFT is not installed, the base model has adapters already, or it has no such layers.
    """
    _require_peft()
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    hf = model.hf
    chosen: Any = given.get("target_modules") or TARGETS.get(hf.config.model_type, ALL_LINEAR)
    fields: dict[str, JSON] = {**given, "target_modules": chosen}
    if any(type(m) is Conv1D for m in hf.modules()):
        fields["fan_in_fan_out"] = True
    with torch.random.fork_rng(devices=[]), _given_back(model):
        torch.manual_seed(seed)
        _inject(hf, fields, is_empty=False)
        _check_linear(hf)
        is_selected = any(fields.pop(name, None) is not None for name in SELECTION)
        if is_selected or (isinstance(chosen, str) and chosen != ALL_LINEAR):  # which other programs need not read
            fields["target_modules"] = sorted({name for name, _ in _weights(hf)})
        fields.pop("init_lora_weights", None)
        tensors: dict[str, Tensor] = {
            f"{name}.{part}.weight": nn.Parameter(weight.detach().to(parameter_dtype(model.dtype), copy=True))
            for (name, part), weight in _weights(hf).items()
        }
    return tensors, fields


@contextlib.contextmanager
def applied_lora(model: Model, tensors: Mapping[str, Tensor], fields: Mapping[str, JSON]) -> Iterator[None]:
    """Context manager in which LoRA layers act in a base model.

    The layers compute in the dtype of their tensors. Gradients flow to tensors that are parameters.

    Args:
        model: Base model.
        tensors: Tensors by name, as `new_lora` gives them.
        fields: Fields of the configuration.

    Raises:
        ConfigError: If PEFT is not installed, the base model has adapters already, or tensors do not fit it.
    """
    with _given_back(model, tensors.values()):
        _inject(model.hf, fields, is_empty=True)
        _assign(model.hf, tensors)
        if model.head is not None and not model.head.is_of(model.hf):  # the output layer has LoRA itself
            model.head = find_head(model.hf)
        yield


def _inject(hf: nn.Module, fields: Mapping[str, JSON], *, is_empty: bool) -> None:
    """Put LoRA layers into a model, with weights on the meta device if they are empty."""
    from peft import inject_adapter_in_model

    config = lora_config(fields)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns where a family has Conv1D beside Linear
            inject_adapter_in_model(config, hf, NAME, low_cpu_mem_usage=is_empty)
    except (ValueError, TypeError, NotImplementedError) as e:
        msg = f"PEFT cannot put these LoRA layers into a {type(hf).__name__}: {e}"
        raise ConfigError(msg) from e


def _check_linear(hf: nn.Module) -> None:
    """Raise `ConfigError` if a LoRA layer is not one of a linear layer, whose matrices are the trained tensors."""
    for name, module in hf.named_modules():
        if not isinstance(of_inputs := getattr(module, PARTS[0], None), nn.ModuleDict):
            continue
        if NAME not in of_inputs or type(of_inputs[NAME]) is not nn.Linear:
            kind = type(getattr(module, "base_layer", module)).__name__
            msg = f"lora: {name} is of class {kind}, expected linear layers alone; leave it out of target_modules"
            raise ConfigError(msg)


def lora_config(fields: Mapping[str, JSON]) -> LoraConfig:
    """PEFT's configuration of LoRA layers.

    Args:
        fields: Fields that differ from PEFT's defaults.

    Raises:
        ConfigError: If PEFT is not installed.
    """
    _require_peft()
    from peft import LoraConfig

    values: dict[str, Any] = dict(fields)
    return LoraConfig(**values)


def _require_peft() -> None:
    """Raise `ConfigError` if PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        msg = "LoRA needs PEFT: pip install 'prefixfast[train]'"
        raise ConfigError(msg)


@contextlib.contextmanager
def _given_back(model: Model, tensors: Iterable[Tensor] = ()) -> Iterator[None]:
    """Context manager after which a model has its own modules, configuration, attributes and flags again.

    Args:
        model: Base model.
        tensors: Tensors that act in it until then.
    """
    hf = model.hf
    if has_adapters(hf):
        msg = (
            f"this {type(hf).__name__} has adapters of PEFT in its layers already; merge them (merge_and_unload), or "
            "give the base without them"
        )
        raise ConfigError(msg)
    head = model.head
    children = [(m, dict(m._modules)) for m in hf.modules()]
    trained = [(p, p.requires_grad) for p in hf.parameters()]
    configs = {id(c): c for m in hf.modules() if (c := getattr(m, "config", None)) is not None}
    values = [(c, dict(vars(c))) for c in configs.values()]

    def restore() -> None:
        for module, own in children:
            if module._modules != own:
                module._modules.clear()
                module._modules.update(own)
        vars(hf).pop("peft_config", None)
        for config, own_values in values:
            vars(config).clear()
            vars(config).update(own_values)
        model.head = head
        for parameter, flag in trained:
            parameter.requires_grad_(flag)

    with model.guard.acting_until(restore, tensors):
        yield


def _weights(hf: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Weight of each LoRA layer by its name and part."""
    return {
        (name, part): getattr(module, part)[NAME].weight
        for name, module in hf.named_modules()
        for part in PARTS
        if NAME in getattr(module, part, ())
    }


def _assign(hf: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors into the LoRA layers of a model."""
    places = _weights(hf)
    expected = {f"{name}.{part}.weight": tuple(weight.shape) for (name, part), weight in places.items()}
    got = {name: tuple(t.shape) for name, t in tensors.items()}
    if got != expected:
        wrong = next(name for name in (*got, *expected) if got.get(name) != expected.get(name))
        msg = (
            f"LoRA: {shown(wrong)} has the shape {got.get(wrong)}, and this {type(hf).__name__} takes "
            f"{expected.get(wrong)}; give the base that it was trained on"
        )
        raise ConfigError(msg)
    for name, part in places:
        layer: Any = hf.get_submodule(name)
        weight = tensors[f"{name}.{part}.weight"]
        is_parameter = isinstance(weight, nn.Parameter)
        getattr(layer, part)[NAME].weight = weight if is_parameter else nn.Parameter(weight, requires_grad=False)
        layer.eval()
