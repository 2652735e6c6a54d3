"""PEFT prefix-tuning on E2E: the baseline that `prefixfast_e2e.py` beside it is held against.

Both scripts share `rows.py`: the same rows in the same order, the same strings, the same schedule and the same evaluation, so that only the trainer differs.
Writes one JSON object: every step's loss, wall seconds of training, dev loss, BLEU and the generated texts.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from rows import Setting, bleu, chunks, exact_norms, settings, write_result


def collate(setting: Setting, tok: Any, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
    """Right-padded batch with labels on the completion, as every PEFT example does it."""
    eos = tok.eos_token_id
    pairs = [(tok(r["prompt"]).input_ids, [*tok(r["completion"]).input_ids, eos]) for r in map(setting.row(tok), rows)]
    width = max(len(s) + len(t) for s, t in pairs)
    pad = [width - len(s) - len(t) for s, t in pairs]
    return {
        "input_ids": torch.tensor([s + t + [eos] * k for (s, t), k in zip(pairs, pad, strict=True)]),
        "labels": torch.tensor([[-100] * len(s) + t + [-100] * k for (s, t), k in zip(pairs, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - k) + [0] * k for k in pad]),
    }


def text_init(base: Any, tok: Any, text: str, length: int) -> torch.Tensor:
    """The words' own keys and values as PEFT's flat table ``[P, 2 * L * Hkv * D]``; a text shorter than P is repeated."""
    ids = (tok(text).input_ids * length)[:length]
    with torch.no_grad():
        cache = base.base_model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    return torch.cat(
        [t[0].transpose(0, 1).reshape(length, -1) for layer in cache.layers for t in (layer.keys, layer.values)], 1
    ).clone()


def loss_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean loss of a target token; in fp64 without the rounding to fp32 that transformers' own loss begins with."""
    if model.dtype != torch.float64:
        return model(**batch).loss
    labels = batch.pop("labels")
    return F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def train(model: Any, tok: Any, setting: Setting, steps: int) -> tuple[list[float], float]:
    """The plain loop of PEFT's documentation: AdamW, linear decay after warm-up, clip 1.0."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=setting.learning_rate, weight_decay=0)
    schedule = get_linear_schedule_with_warmup(optimizer, setting.warmup_steps, setting.steps)
    model.train()
    start, losses = time.perf_counter(), []
    for batch in setting.batches()[:steps]:
        loss = loss_of(model, collate(setting, tok, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 20 == 0:
            print(
                f"step {len(losses)} loss {sum(losses[-20:]) / 20:.4f} {time.perf_counter() - start:.0f} s", flush=True
            )
    return losses, time.perf_counter() - start


@torch.no_grad()
def evaluate(model: Any, tok: Any, setting: Setting) -> dict[str, Any]:
    """Dev loss a target token, and BLEU of the dev tables generated in left-padded batches."""
    model.eval()
    total = count = 0.0
    for part in chunks(setting.dev_rows(), 20):
        batch = collate(setting, tok, part)
        n = int((batch["labels"] != -100).sum())
        total, count = total + model(**batch).loss.item() * n, count + n
    tables, references = setting.dev_tables()
    model.config.use_cache, tok.padding_side, tok.pad_token = True, "left", tok.eos_token
    texts: list[str] = []
    for part in chunks(tables, 20):
        enc = tok([setting.row(tok)({"mr": mr, "ref": ""})["prompt"] for mr in part], return_tensors="pt", padding=True)
        ids = model.generate(
            **enc,
            max_new_tokens=60,
            do_sample=False,
            use_cache=True,
            num_beams=setting.num_beams,
            pad_token_id=tok.eos_token_id,
            eos_token_id=tok.eos_token_id,
        )
        texts += [tok.decode(x[enc.input_ids.shape[1] :], skip_special_tokens=True).strip() for x in ids]
    return {"dev_loss": total / count, "bleu": bleu(texts, references), "texts": dict(zip(tables, texts, strict=True))}


def main() -> None:
    """Train (unless `--kind none`), evaluate, write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setting", choices=sorted(settings()))
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--none", action="store_true", help="evaluate the base without a prefix")
    parser.add_argument("--steps", type=int, help="stop after this many steps (the schedule stays), without evaluation")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64"],
        default="float32",
        help="float64: the loss too, which transformers rounds to fp32",
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = settings()[args.setting]
    tok = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    base.config.use_cache = False
    model, result = (
        base,
        {
            "impl": "none" if args.none else "peft",
            "setting": args.setting,
            "dtype": args.dtype,
            "threads": args.threads,
        },
    )
    if args.dtype == "float64":
        exact_norms()
    if not args.none:
        torch.manual_seed(0)
        mlp = setting.reparameterization == "mlp"
        model = get_peft_model(
            base,
            PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=10, prefix_projection=mlp, encoder_hidden_size=512
            ),
        )
        if not mlp:
            model.prompt_encoder["default"].embedding.weight.data = text_init(base, tok, setting.init_text, 10)
        model.prompt_encoder.to(base.dtype)
        result["losses"], result["train_seconds"] = train(model, tok, setting, args.steps or setting.steps)
    if args.steps is None:
        result |= evaluate(model, tok, setting)
        if not args.none:
            model.save_pretrained(args.out.with_suffix(""))
    write_result(args.out, result)
    print(json.dumps({k: v for k, v in result.items() if k not in ("texts", "losses")}))


if __name__ == "__main__":
    main()
