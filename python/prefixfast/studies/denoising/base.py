"""Tokenizer and model that are pretrained: byte-level BPE and a small BART, with BART's special tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

START, PAD, END, UNKNOWN, MASK = SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


@dataclass(frozen=True)
class Shape:
    """Sizes of a base.

    Attributes:
        vocab: Number of tokens.
        width: Width of the hidden states.
        layers: Number of layers of the encoder, and of the decoder.
        heads: Number of attention heads.
        positions: Largest number of tokens of a text.
    """

    vocab: int = 8000
    width: int = 256
    layers: int = 4
    heads: int = 4
    positions: int = 1024


def train_tokenizer(texts: Iterable[str], shape: Shape) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer that puts each text between ``<s>`` and ``</s>``, trained on texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.RobertaProcessing(
        (END, SPECIAL.index(END)), (START, SPECIAL.index(START)), trim_offsets=False, add_prefix_space=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=START,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        mask_token=MASK,
        model_max_length=shape.positions,
        clean_up_tokenization_spaces=False,
    )


def new_model(shape: Shape, seed: int) -> BartForConditionalGeneration:
    """BART with random weights, without dropout, since few passes over the texts do not overfit."""
    torch.manual_seed(seed)
    start, pad, end = (SPECIAL.index(t) for t in (START, PAD, END))
    stacks = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _stack_sizes(shape).items()}
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=shape.vocab,
            d_model=shape.width,
            max_position_embeddings=shape.positions,
            dropout=0.0,
            bos_token_id=start,
            pad_token_id=pad,
            eos_token_id=end,
            decoder_start_token_id=end,
            forced_eos_token_id=end,
            **stacks,
        )
    )
    model.set_attn_implementation("eager")  # trains 1.2 times as fast as SDPA with texts of up to 384 tokens
    return model


def _stack_sizes(shape: Shape) -> dict[str, int]:
    """Sizes of the encoder and of the decoder."""
    return {"layers": shape.layers, "attention_heads": shape.heads, "ffn_dim": 4 * shape.width}
