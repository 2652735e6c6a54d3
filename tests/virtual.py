"""PEFT adapters of virtual tokens, trained for a few steps, and PEFT's results with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model

LENGTH = 5
PROMPT = [1, *range(3, 20)]  # starts with the begin token
CONFIGS = {
    "PROMPT_TUNING": (PromptTuningConfig, {}),
    "P_TUNING MLP": (PromptEncoderConfig, {"encoder_reparameterization_type": "MLP"}),
    "P_TUNING LSTM": (PromptEncoderConfig, {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 24}),
}


def adapter(model: Any, folder: Path, kind: str = "PROMPT_TUNING", length: int = LENGTH, **fields: Any) -> Any:
    """Train an adapter for two steps, save it in training mode, and return PEFT's model.

    Args:
        model: Transformers model.
        folder: Folder of the adapter.
        kind: Key of `CONFIGS`.
        length: Number of virtual tokens.
        fields: Further fields of PEFT's configuration.
    """
    torch.manual_seed(4)
    config, own = CONFIGS[kind]
    peft = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=length, **own, **fields)).train()
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.5)
    ids = torch.tensor([PROMPT])
    for _ in range(2):
        optimizer.zero_grad()
        peft(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    peft.save_pretrained(folder)
    return peft.eval()


@torch.no_grad()
def peft_logits(model: Any, rows: list[list[int]], length: int = LENGTH, *, left: bool = False) -> list[torch.Tensor]:
    """Logits ``[N, V]`` of each row's tokens from one padded batch of PEFT.

    Args:
        model: PEFT's model with virtual tokens.
        rows: Token ids of each row.
        length: Number of virtual tokens.
        left: Whether the padding stands before the text instead of after it.
    """
    width = max(map(len, rows))
    pads = [[0] * (width - len(r)) for r in rows]
    ids = [p + r if left else r + p for p, r in zip(pads, rows, strict=True)]
    mask = [
        [0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p) for p, r in zip(pads, rows, strict=True)
    ]
    out = model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, length:]
    return [o[len(p) :] if left else o[: len(r)] for o, p, r in zip(out, pads, rows, strict=True)]


def peft_tokens(model: Any, ids: list[int], new: int) -> list[int]:
    """Greedy tokens of PEFT after one prompt."""
    tokens = torch.tensor([ids])
    made = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
    )
    return made[0, len(ids) :].tolist()


def reloaded(model: Any, folder: Path) -> Any:
    """PEFT's model of a saved adapter."""
    return PeftModel.from_pretrained(model, folder).eval()
