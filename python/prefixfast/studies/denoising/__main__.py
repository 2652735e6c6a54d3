"""Entry point of ``python -m prefixfast.studies.denoising OUT [--data FOLDER] [--texts FILE ...]``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from prefixfast.studies.denoising.base import Shape, new_model, train_tokenizer
from prefixfast.studies.denoising.corpus import Corpus, read_sources
from prefixfast.studies.denoising.pretrain import Pretraining, Schedule, denoising_pairs


def main() -> None:
    """Pretrain a base and write its folder."""
    parser = argparse.ArgumentParser(prog="python -m prefixfast.studies.denoising", description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--data", type=Path, help="folder with scitldr/, e2e/ and dart/")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="files with one text a line")
    parser.add_argument("--minutes", type=float, default=45.0, help="largest CPU time in minutes (default: 45)")
    parser.add_argument("--steps", type=int, default=3200, help="training steps (default: 3200)")
    parser.add_argument("--rate", type=float, default=3e-3, help="largest learning rate (default: 3e-3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights and texts (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUT")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    shape, sources = Shape(), read_sources(args.data, args.texts)
    if args.resume:
        tok = AutoTokenizer.from_pretrained(args.out)
    else:
        tok = train_tokenizer((" ".join(text) for s in sources for text in s.texts), shape)
        tok.save_pretrained(args.out)
    corpus = Corpus(sources, lambda texts: [len(ids) for ids in tok(texts, add_special_tokens=False).input_ids])
    schedule = Schedule(args.steps, args.minutes, args.rate)
    model = new_model(shape, args.seed)
    print(f"{model.num_parameters():,} weights", flush=True)
    training = Pretraining(model, denoising_pairs(corpus, tok, schedule.tokens, args.seed), schedule, args.out)
    if args.resume:
        training.resume()
    training.run()
    model.save_pretrained(args.out)


if __name__ == "__main__":
    main()
