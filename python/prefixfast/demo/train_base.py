"""Training of the demo's base from scratch: ``python -m prefixfast.demo.train_base OUT``.

The base is a small Llama with a byte-level BPE tokenizer. Both are trained on the pages of `prefixfast.demo.corpus`, on
the CPU. The seed determines the text and the initial weights. Another CPU or number of threads changes the last digits
of the losses.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefixfast.demo.corpus import pages

END = "<|endoftext|>"
VOCAB, WINDOW, BATCH = 1024, 192, 16
# Different pages for the tokenizer and for the model.
TOKENIZER_SEED, TEXT_SEED = 1, 2


def train_tokenizer(count: int = 20_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer, trained on the first ``count`` pages."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator((f" {text}" for page in islice(pages(TOKENIZER_SEED), count) for text in page), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        unk_token=END,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def windows(tok: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Windows of token ids, each of which begins with a page and is filled up with the next ones."""
    stream = pages(seed)
    while True:
        ids: list[int] = []
        while len(ids) < WINDOW:
            ids += tok("".join(f" {text} {END}" for text in next(stream))).input_ids
        yield ids[:WINDOW]


def new_model(tok: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Llama of four layers and two million weights, with random values."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=tok.eos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.eos_token_id,
        )
    )
    # Wide, and not shared with the output. Otherwise words that are used alike (Monday, Friday) would become one
    # vector, from which nothing can be copied.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    return model


def train(tok: PreTrainedTokenizerFast, model: LlamaForCausalLM, steps: int, peak: float) -> None:
    """Train with Muon for the matrices of the layers and AdamW for the rest.

    Args:
        tok: Tokenizer.
        model: Model to train.
        steps: Number of steps.
        peak: Largest learning rate, after a rise of 50 steps and before a fall to zero as a cosine; AdamW's is half.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    source, start, recent = windows(tok, TEXT_SEED), time.perf_counter(), 0.0
    for step in range(steps):
        rate = peak * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        ids = torch.tensor(list(islice(source, BATCH)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, share in zip(optimizers, (1.0, 0.5), strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()
        recent += loss.item() / 50
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {recent:.4f} {time.perf_counter() - start:.0f} s", flush=True)
            recent = 0.0


def main() -> None:
    """Train the base and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=1000, help="training steps (default: 1000)")
    parser.add_argument("--rate", type=float, default=5e-3, help="peak learning rate (default: 5e-3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tok = train_tokenizer()
    model = new_model(tok)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights", flush=True)
    train(tok, model, args.steps, args.rate)
    model.generation_config = GenerationConfig(
        bos_token_id=tok.eos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.eos_token_id
    )
    model.to(torch.bfloat16).save_pretrained(args.out)
    tok.save_pretrained(args.out)


if __name__ == "__main__":
    main()
