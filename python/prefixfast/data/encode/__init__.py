"""The one place that turns rows, prompts, targets and texts into token ids.

Prompt and target are tokenized separately, so that training sees a prompt as generation does.
"""

from prefixfast.data.encode.example import Example
from prefixfast.data.encode.examples import check_examples, encode_examples
from prefixfast.data.encode.prompts import (
    Input,
    check_prompts,
    decoder_of,
    encode_prompts,
    encode_target,
    encode_text,
    request_error,
)
from prefixfast.data.encode.seq2seq import (
    DecoderTokens,
    encode_labels,
    kept,
    labelled_example,
    num_trailing,
    special_ids,
)
from prefixfast.data.encode.token_ids import ANY_VOCABULARY, Ints, token_ids, vocabulary_error

__all__ = [
    "ANY_VOCABULARY",
    "DecoderTokens",
    "Example",
    "Input",
    "Ints",
    "check_examples",
    "check_prompts",
    "decoder_of",
    "encode_examples",
    "encode_labels",
    "encode_prompts",
    "encode_target",
    "encode_text",
    "kept",
    "labelled_example",
    "num_trailing",
    "request_error",
    "special_ids",
    "token_ids",
    "vocabulary_error",
]
