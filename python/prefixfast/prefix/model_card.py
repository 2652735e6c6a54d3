"""The model card of a prefix on the hub. The card never contains a row or text of the training data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prefixfast.config.sites import SITE_NAMES, Site
from prefixfast.model.fingerprint import layout_of, num_layers
from prefixfast.prefix.record import PrefixData, is_seq2seq

CARD = "README.md"
BASE_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Entries of Prefix.training whose numbers and words the card shows. Other entries can hold texts, names or paths.
SETTINGS = ("config", "prefix_config")
SAFE_TEXT = re.compile(r"[a-z][a-z0-9_-]{0,31}")

TEMPLATE = """---
{front}---

# {title}

A learned prefix (prefix-tuning, [Li & Liang 2021](https://arxiv.org/abs/2101.00190)): {rows},
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
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{model}"), "{repo_id}")
```
"""


def model_card(prefix: PrefixData, repo_id: str) -> str:
    """Text of ``README.md``: YAML front matter, code that uses the prefix, and settings and metrics of the training.

    Args:
        prefix: Prefix.
        repo_id: Hub id of the repository, ``"name/repository"``.
    """
    name = _base_name(prefix)
    incompatibility = prefix.peft_incompatibility
    front: dict[str, Any] = {
        "library_name": "prefixfast",
        "tags": [*([] if incompatibility else ["peft"]), "prefix-tuning"],
        "pipeline_tag": "text2text-generation" if is_seq2seq(prefix) else "text-generation",
    }
    if name is not None:
        front["base_model"] = name
    metrics = prefix.training.get("metrics")
    model = name or "the base model"
    facts = _facts(prefix, metrics if isinstance(metrics, Mapping) else {})
    auto = f"AutoModelFor{'Seq2Seq' if is_seq2seq(prefix) else 'Causal'}LM"
    use_in_peft = PEFT_USE.format(model=model, repo_id=repo_id, auto=auto)
    return TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=True, allow_unicode=True),
        title=repo_id.split("/")[-1],
        rows=_rows(prefix),
        stored=prefix.num_stored,
        base=f"`{name}`" if name else "that it was trained on (its name is not known)",
        repo_id=repo_id,
        model=model,
        peft=f"\nPEFT cannot hold it: {incompatibility}.\n" if incompatibility else use_in_peft,
        facts="\n".join(f"| {k} | {v} |" for k, v in facts.items()),
    )


def _rows(prefix: PrefixData) -> str:
    """Number of rows and layers of each site."""
    if prefix.sites == ("self",) and not is_seq2seq(prefix):
        return f"{prefix.length} rows of keys and values for each of {_layers(prefix, 'self')}"
    parts = [
        f"{prefix.length_at(site)} rows of keys and values of {SITE_NAMES[site]} for each of {_layers(prefix, site)}"
        for site in prefix.sites
    ]
    return ",\n".join(parts)


def _layers(prefix: PrefixData, site: Site) -> str:
    layout, layers = layout_of(prefix.base), prefix.layers_at(site)
    own = sum(row[3] == i for i, row in enumerate(layout["layers"])) if layout else num_layers(prefix.base, site)
    return (
        f"{len(layers)} layers" if own in (None, len(layers)) else f"the layers {', '.join(map(str, layers))} (from 0)"
    )


def _base_name(prefix: PrefixData) -> str | None:
    """Name of the base model if it can be a hub id; a local path is useless to others, and may be private."""
    name = prefix.base.get("name") if prefix.base else None
    return name if isinstance(name, str) and BASE_NAME.fullmatch(name) and not Path(name).exists() else None


def _facts(prefix: PrefixData, metrics: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "stands before": "the first token" if prefix.position == "prefix" else "the last prompt token",
        "text starts at position": str(prefix.pos_start),
        "sliding windows": prefix.window,
        "numbers trained": f"{prefix.num_trained:,}",
    }
    found |= {f"needs {k}": str(v) for k, v in prefix.requires.items() if k != "base" and v is not None}
    found["digest"] = f"`{prefix.digest}`"
    for group in SETTINGS:
        settings = prefix.training.get(group)
        found |= _safe_values(settings if isinstance(settings, Mapping) else {})
    return found | {f"metric: {k}": v for k, v in _safe_values(metrics).items()}


def _safe_values(values: Mapping[str, Any]) -> dict[str, str]:
    """Numbers, booleans and single words of a mapping. None, and values that may be a person's text, are left out."""
    named = {str(k): v for k, v in values.items() if SAFE_TEXT.fullmatch(str(k))}
    return {
        k: f"{v:g}" if isinstance(v, float) else str(v)
        for k, v in named.items()
        if isinstance(v, bool | int | float) or (isinstance(v, str) and SAFE_TEXT.fullmatch(v))
    }
