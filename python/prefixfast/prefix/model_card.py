"""The model card of a prefix: what a person on the hub needs to know, and never a row or text that it was trained on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prefixfast.model.fingerprint import num_layers
from prefixfast.prefix.record import PrefixData

CARD = "README.md"
BASE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Of `training`: settings and numbers. Anything else that it may hold (texts, names, paths) stays out.
SETTINGS = ("config", "prefix_config")
SAFE_TEXT = re.compile(r"[a-z][a-z0-9_-]{0,31}")

TEMPLATE = """---
{front}---

# {title}

A learned prefix (prefix-tuning, [Li & Liang 2021](https://arxiv.org/abs/2101.00190)): {length} rows of keys and values for each of {layers},
{stored:,} numbers, for the frozen base {base}.

## Use

```python
import prefixfast

prefix = prefixfast.Prefix.from_pretrained("{repo_id}")
print(prefixfast.generate(["..."], prefix, model="{model}")[0])
```
{peft}
## Facts

| | |
| --- | --- |
{facts}
"""
PEFT_USE = """
The repository is also a PEFT adapter:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}"), "{repo_id}")
```
"""


def model_card(prefix: PrefixData, repo_id: str) -> str:
    """The text of ``README.md``: YAML front matter, how to use the prefix, settings and metrics of its training.

    Args:
        prefix: The prefix.
        repo_id: Where it will lie.
    """
    name = _base_name(prefix)
    peft = not prefix.peft_incompatibility
    front: dict[str, Any] = {
        "library_name": "prefixfast",
        "tags": [*(["peft"] if peft else []), "prefix-tuning"],
        "pipeline_tag": "text-generation",
    }
    if name is not None:
        front["base_model"] = name
    metrics = prefix.training.get("metrics")
    model = name or "the base model"
    return TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=True, allow_unicode=True),
        title=repo_id.split("/")[-1],
        length=prefix.length,
        layers=_layers(prefix),
        stored=prefix.num_stored,
        base=f"`{name}`" if name else "that it was trained on (its name is not known)",
        repo_id=repo_id,
        model=model,
        peft=PEFT_USE.format(model=model, repo_id=repo_id)
        if peft
        else f"\nPEFT cannot hold it: {prefix.peft_incompatibility}.\n",
        facts="\n".join(
            f"| {k} | {v} |" for k, v in _facts(prefix, metrics if isinstance(metrics, Mapping) else {}).items()
        ),
    )


def _layers(prefix: PrefixData) -> str:
    listed = ", ".join(map(str, prefix.layers))
    return (
        f"{len(prefix.layers)} layers"
        if num_layers(prefix.base) in (None, len(prefix.layers))
        else f"the layers {listed} (from 0)"
    )


def _base_name(prefix: PrefixData) -> str | None:
    """The base's name if it can be one on the hub: a path of somebody's machine helps nobody."""
    name = (prefix.base or {}).get("name")
    return name if isinstance(name, str) and BASE_NAME.fullmatch(name) and not Path(name).exists() else None


def _facts(prefix: PrefixData, metrics: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "text starts at position": str(prefix.pos_start),
        "sliding windows": prefix.window,
        "numbers trained": f"{prefix.num_trained:,}",
    }
    found |= {f"needs {k}": str(v) for k, v in prefix.requires.items() if k != "base" and v is not None}
    found["digest"] = f"`{prefix.digest}`"
    for group in SETTINGS:
        settings = prefix.training.get(group)
        found |= _plain(settings if isinstance(settings, Mapping) else {})
    return found | {f"metric: {k}": v for k, v in _plain(metrics).items()}


def _plain(values: Mapping[str, Any]) -> dict[str, str]:
    """Numbers, switches and single words of a mapping; None and anything that could be somebody's text are left out."""
    kept = {str(k): v for k, v in values.items() if SAFE_TEXT.fullmatch(str(k))}
    return {
        k: f"{v:g}" if isinstance(v, float) else str(v)
        for k, v in kept.items()
        if isinstance(v, bool | int | float) or (isinstance(v, str) and SAFE_TEXT.fullmatch(v))
    }
