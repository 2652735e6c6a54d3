"""Training and evaluation of the quality suite with PEFT, and evaluation of the base alone with transformers."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from prefixfast.bench.decoding import Decoding
from prefixfast.bench.harness import progress
from prefixfast.bench.quality.settings import ENCODER_HIDDEN_SIZE, MAX_NEW_TOKENS, PREFIX_LENGTH, MakeRow, Run, Setting
from prefixfast.bench.random_base import load_plain
from prefixfast.errors import ConfigError
from prefixfast.metrics.bleu import bleu
from prefixfast.model.tokenizer import Tokenizer


def train_and_evaluate(run: Run) -> dict[str, Any]:
    """Losses and seconds of training, and without `Run.steps` also dev loss, BLEU and texts.

    Raises:
        ConfigError: If PEFT is missing.
    """
    try:
        from peft import PrefixTuningConfig, get_peft_model
    except ImportError as e:
        msg = "quality: --impl peft needs PEFT: pip install peft"
        raise ConfigError(msg) from e
    base, tokenizer = _load(run)
    torch.manual_seed(0)
    mlp = run.setting.reparameterization == "mlp"
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=PREFIX_LENGTH,
        prefix_projection=mlp,
        encoder_hidden_size=ENCODER_HIDDEN_SIZE,
    )
    model = get_peft_model(base, config)
    if not mlp:
        table = _table_of_text(base, tokenizer, run.setting.init_text)
        model.prompt_encoder["default"].embedding.weight.data = table
    model.prompt_encoder.to(base.dtype)
    losses, seconds = _train(model, tokenizer, run)
    result: dict[str, Any] = {"losses": losses, "train_seconds": seconds}
    if run.steps is None:
        result |= _evaluate(model, tokenizer, run)
        model.save_pretrained(run.output / "prefix")
    return result


def evaluate_base(run: Run) -> dict[str, Any]:
    """Dev loss, BLEU and texts of the base without a prefix."""
    base, tokenizer = _load(run)
    return _evaluate(base, tokenizer, run) if run.steps is None else {}


def _load(run: Run) -> tuple[Any, Any]:
    """Base and tokenizer."""
    from transformers import AutoTokenizer

    base: Any = load_plain(run.model, run.dtype)
    base.config.use_cache = False
    return base, AutoTokenizer.from_pretrained(run.model)


def _collate(row: MakeRow, tokenizer: Any, rows: list[dict[str, str]]) -> dict[str, Tensor]:
    """Right-padded batch with labels on the completions."""
    end = tokenizer.eos_token_id
    pairs = [(tokenizer(r["prompt"]).input_ids, [*tokenizer(r["completion"]).input_ids, end]) for r in map(row, rows)]
    width = max(len(s) + len(t) for s, t in pairs)
    pad = [width - len(s) - len(t) for s, t in pairs]
    return {
        "input_ids": torch.tensor([s + t + [end] * k for (s, t), k in zip(pairs, pad, strict=True)]),
        "labels": torch.tensor([[-100] * len(s) + t + [-100] * k for (s, t), k in zip(pairs, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - k) + [0] * k for k in pad]),
    }


def _table_of_text(base: Any, tokenizer: Any, text: str) -> Tensor:
    """Keys and values of a text as PEFT's table ``[P, 2 * L * H * D]``. A text shorter than P tokens is repeated."""
    ids = (tokenizer(text).input_ids * PREFIX_LENGTH)[:PREFIX_LENGTH]
    with torch.no_grad():
        cache = base.base_model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    parts = [t[0].transpose(0, 1).reshape(len(ids), -1) for layer in cache.layers for t in (layer.keys, layer.values)]
    return torch.cat(parts, 1).clone()


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of a target token, in fp64 computed here, since transformers' own loss rounds to fp32."""
    if model.dtype != torch.float64:
        loss: Tensor = model(**batch).loss
        return loss
    labels = batch.pop("labels")
    return F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _train(model: Any, tokenizer: Any, run: Run) -> tuple[list[float], float]:
    """Losses and seconds of the loop of PEFT's documentation: AdamW, linear decay after warm-up, clipping at 1.0."""
    from transformers import get_linear_schedule_with_warmup

    setting = run.setting
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=setting.learning_rate, weight_decay=0)
    schedule = get_linear_schedule_with_warmup(optimizer, setting.warmup_steps, run.steps or setting.steps)
    row = setting.row(tokenizer)
    model.train()
    batches = setting.batches(run.data)[: run.steps]
    start, losses = time.perf_counter(), []
    for batch in progress(batches, "bench, training with PEFT", "steps"):
        loss = _loss(model, _collate(row, tokenizer, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


@torch.no_grad()
def _evaluate(model: Any, tokenizer: Any, run: Run) -> dict[str, Any]:
    """Dev loss of a target token, BLEU and texts of the dev tables."""
    model.eval()
    setting = run.setting
    row = setting.row(tokenizer)
    total = count = 0.0
    for part in _chunks(setting.dev_rows(run.data), 20):
        batch = _collate(row, tokenizer, part)
        n = int((batch["labels"] != -100).sum())
        total, count = total + model(**batch).loss.item() * n, count + n
    tables, references = setting.dev_tables(run.data)
    texts = _generate(model, tokenizer, setting, [row({"mr": mr, "ref": ""})["prompt"] for mr in tables])
    return {
        "dev_loss": total / count,
        "bleu": 100 * bleu(texts, references)["BLEU"].value,
        "texts": dict(zip(tables, texts, strict=True)),
    }


def _generate(model: Any, tokenizer: Any, setting: Setting, prompts: list[str]) -> list[str]:
    """Texts of the prompts, generated in left-padded batches."""
    base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
    decoding = Decoding.at_most(MAX_NEW_TOKENS, base, Tokenizer.from_hf(tokenizer), setting.num_beams)
    decoding.apply(base)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    texts: list[str] = []
    for part in progress(list(_chunks(prompts, 20)), "bench, generating", "batches"):
        enc = tokenizer(part, return_tensors="pt", padding=True)
        ids = model.generate(**enc)
        texts += [tokenizer.decode(x[enc.input_ids.shape[1] :], skip_special_tokens=True).strip() for x in ids]
    return texts


def _chunks(rows: list[Any], n: int) -> Iterable[list[Any]]:
    """Consecutive pieces of at most ``n``."""
    return (rows[i : i + n] for i in range(0, len(rows), n))
