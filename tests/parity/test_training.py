"""Every loss and the final prefix of twenty training steps equal PEFT's in fp64, where rounding hides nothing."""

import pytest
import torch
import torch.nn.functional as F
from peft import PrefixTuningConfig, get_peft_model
from transformers import get_linear_schedule_with_warmup

import tiny
from prefixfast.prefix import peft_format as layout
from prefixfast.prefix.prefix import Prefix
from prefixfast.training.trainer import train

STEPS, BATCH, P, RATE, WARMUP = 20, 4, 5, 2e-2, 4
G = torch.Generator().manual_seed(0)
ROWS = [
    torch.randint(3, tiny.VOCAB, (n,), generator=G).tolist()
    for n in torch.randint(4, 14, (STEPS * BATCH,), generator=G).tolist()
]


def labels(ids: list[int]) -> list[int]:
    half = len(ids) // 2
    return [-100] * half + ids[half:]


def peft_run(*, mlp: bool, rate: float = RATE):
    """Losses, first and last table ``[P, 2 * L * E]`` of PEFT's own loop on padded batches."""
    base = tiny.make("gpt2", dtype=torch.float64)
    base.config.use_cache = False
    torch.manual_seed(7)
    model = get_peft_model(
        base,
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=mlp, encoder_hidden_size=24),
    )
    model.prompt_encoder.double()
    first = model.get_prompt_embedding_to_save("default").detach().clone()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for i in range(0, len(ROWS), BATCH):
        part = ROWS[i : i + BATCH]
        pad = [max(map(len, part)) - len(r) for r in part]
        ids = torch.tensor([r + [0] * n for r, n in zip(part, pad, strict=True)])
        mask = torch.tensor([[1] * len(r) + [0] * n for r, n in zip(part, pad, strict=True)])
        targets = torch.tensor([labels(r) + [-100] * n for r, n in zip(part, pad, strict=True)])
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]  # transformers' own loss would round to fp32
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first, model.get_prompt_embedding_to_save("default").detach()


def our_run(*, mlp: bool, first: torch.Tensor):
    """Losses and last table of `train`, from PEFT's first table, or from PEFT's seed with the MLP."""
    model = tiny.make("gpt2", dtype=torch.float64)
    start = "random" if mlp else Prefix(layout.from_table(first, *tiny.shapes(model)), pos_start=P)
    rows = [{"input_ids": r, "labels": labels(r)} for r in ROWS]
    how = {
        "learning_rate": RATE,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "warmup_steps": WARMUP,
        "shuffle": False,
        "logging_steps": 1,
        "seed": 7,
    }
    how |= {"reparameterization": "mlp" if mlp else "none", "encoder_hidden_size": 24}
    run = train(model, {"it": rows}, init=start, prefix_length=P, batch_size=BATCH, max_steps=STEPS, **how)
    return [line["loss"] for line in run.log if "loss" in line], layout.to_table(run["it"].kv)


@pytest.mark.parametrize("mlp", [False, True], ids=["flat", "mlp"])
def test_twenty_steps_equal_peft(mlp):
    losses, first, last = peft_run(mlp=mlp)
    got, table = our_run(mlp=mlp, first=first)
    assert got == pytest.approx(losses, abs=1e-8)
    assert (table - last).abs().max() < 1e-7 * last.abs().max()
    assert (first - last).abs().max() > 1e-2 * last.abs().max(), "the prefix moved"


def test_another_learning_rate_gives_another_prefix():
    _, first, last = peft_run(mlp=False, rate=RATE * 1.001)
    _, table = our_run(mlp=False, first=first)
    assert (table - last).abs().max() > 1e-5 * last.abs().max()
