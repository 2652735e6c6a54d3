"""`read_lora_config`, the fields of a `LoraConfig` of PEFT that training reads. This module imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError, DataError, shown
from prefixfast.prefix.lora_format import written_options

if TYPE_CHECKING:
    from peft import LoraConfig

RANDOM = (True, False, "gaussian", "orthogonal")  # initial values that need neither data nor changes of the base
INITIAL = "init_lora_weights"
OF_CONFIG = ("lora_rank", "lora_alpha")  # options that a configuration takes the place of


def read_lora_config(
    given: LoraConfig | None, fields: Mapping[str, Any], sweep: object
) -> tuple[dict[str, JSON] | None, Mapping[str, Any]]:
    """Fields of a configuration, and the options of a call with the method that the configuration implies.

    Args:
        given: Configuration of the caller, None without one.
        fields: Options of the call, of which ``method`` is ``"prefix+lora"`` by default beside a configuration.
        sweep: Values to try by option.

    Raises:
        ConfigError: If the configuration is none of LoRA layers that are known to be trained right, or options of the
            call say the same.
    """
    if given is None:
        return None, fields
    values: Any = given.to_dict() if hasattr(given, "to_dict") else {}
    if values.get("peft_type") != "LORA":
        msg = f"lora: expected a LoraConfig of PEFT, got {shown(given)}"
        raise ConfigError(msg)
    swept: Collection[Any] = sweep if isinstance(sweep, Mapping) else ()
    if double := [name for name in OF_CONFIG if name in fields or name in swept]:
        msg = f"{double[0]} and lora: expected one of them, got both; the LoraConfig has r and lora_alpha"
        raise ConfigError(msg)
    if values.get("lora_dropout"):
        msg = f"lora: lora_dropout: expected 0, training has no dropout in LoRA layers, got {values['lora_dropout']}"
        raise ConfigError(msg)
    if values[INITIAL] not in RANDOM:
        expected = ", ".join(map(repr, RANDOM))
        msg = f"lora: {INITIAL}: expected one of {expected}, got {shown(values[INITIAL])}"
        raise ConfigError(msg)
    if isinstance(values.get("target_modules"), set):
        values["target_modules"] = sorted(values["target_modules"])
    try:
        found = written_options(values)
    except DataError as e:
        msg = f"lora: {e}"
        raise ConfigError(msg) from e
    return found | {INITIAL: values[INITIAL]}, {"method": "prefix+lora", **fields}
