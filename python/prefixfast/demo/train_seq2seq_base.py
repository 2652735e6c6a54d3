"""Training of the demo's encoder-decoder base from scratch: ``python -m prefixfast.demo.train_seq2seq_base OUT``.

The base is a small BART. It first restores noisy pages of `prefixfast.demo.corpus`. Then it reads a heading with facts
and writes the text that the heading announces, or it copies a note. Its text has no tables and no held-out values. The
seed determines the text and the initial weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from prefixfast.demo.corpus import heading_and_text, note, pages
from prefixfast.studies.denoising.base import Shape, new_model, train_tokenizer
from prefixfast.studies.denoising.corpus import Corpus, source
from prefixfast.studies.denoising.pretrain import Pair, Pretraining, Schedule, denoising_pairs

SHAPE = Shape(vocab=1024, width=128, layers=3, heads=4, positions=512)
# Different pages for the tokenizer and for the model.
TOKENIZER_SEED, TEXT_SEED = 1, 2
DENOISING, COPIED = 0.3, 0.15  # share of the steps that restore pages; of the pairs after them that copy a note


def text_pairs(tok: PreTrainedTokenizerFast, tokens: int, seed: int) -> Callable[[int], list[Pair]]:
    """Function that returns the pairs of a step: facts under a heading and what it announces, or a note twice.

    Args:
        tok: Tokenizer.
        tokens: Approximate number of decoder tokens of a step.
        seed: Seed.
    """

    def pairs(step: int) -> list[Pair]:
        rng = Random(f"{seed} texts {step}")
        found: list[Pair] = []
        while sum(len(target) for _, target in found) < tokens:
            copied = note(rng)
            pair = (copied, copied) if rng.random() < COPIED else heading_and_text(rng)
            found.append(tuple(tok(list(pair)).input_ids))
        return found

    return pairs


def main() -> None:
    """Train the base and write its folder."""
    parser = argparse.ArgumentParser(prog="python -m prefixfast.demo.train_seq2seq_base", description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=2000, help="training steps (default: 2000)")
    parser.add_argument("--rate", type=float, default=5e-3, help="largest learning rate (default: 5e-3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts = [text for page in islice(pages(TOKENIZER_SEED), 10_000) for text in page]
    tok = train_tokenizer(texts, SHAPE)
    corpus = Corpus(
        [source(1, (" ".join(page) for page in islice(pages(TEXT_SEED), 10_000)))],
        lambda found: [len(ids) for ids in tok(found, add_special_tokens=False).input_ids],
    )
    model = new_model(SHAPE, args.seed)
    print(f"{model.num_parameters():,} weights", flush=True)
    schedule = Schedule(args.steps, rate=args.rate, tokens=1536)
    first, then = (
        denoising_pairs(corpus, tok, schedule.tokens, TEXT_SEED),
        text_pairs(tok, schedule.tokens, TEXT_SEED),
    )
    with tempfile.TemporaryDirectory() as folder:
        Pretraining(model, lambda n: (first if n < DENOISING * args.steps else then)(n), schedule, Path(folder)).run()
    model.to(torch.float16).save_pretrained(args.out)
    tok.save_pretrained(args.out)


if __name__ == "__main__":
    main()
