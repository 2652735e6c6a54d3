"""Most likely tokens of rows of logits, with their log-probabilities.

On a CPU the Rust core finds them in two passes over the logits. No tensor ``[n, V]`` is made.
Shape letters: n rows, V vocabulary, C tokens of a row to find.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixfast import _rust
from prefixfast.attention.cpu_decode import IS_BF16, num_threads


def best_tokens(logits: Tensor, count: int, *, path: str | None = None) -> tuple[Tensor, Tensor]:
    """The most likely tokens of each row.

    Args:
        logits: Logits ``[n, V]``.
        count: Number C of tokens, at most V.
        path: Name of the vector instructions, one of ``_rust.attend_paths()``. None takes those of the environment
            variable ``PREFIXFAST_SIMD``, or the fastest.

    Returns:
        Log-probabilities over all V tokens ``[n, C]`` in fp32, the largest first, and tokens int64 ``[n, C]``. On a CPU
        equally likely tokens are in ascending order.
    """
    if logits.device.type != "cpu" or logits.dtype not in IS_BF16:
        logp = logits.float().log_softmax(-1)
        found = logp.topk(count)
        return found.values, found.indices
    num, vocab = logits.shape
    logits = logits.contiguous()
    logprobs = torch.empty(num, count)
    tokens = torch.empty(num, count, dtype=torch.int64)
    _rust.best_tokens(
        (logits.data_ptr(), logits.numel()),
        IS_BF16[logits.dtype],
        vocab,
        count,
        (logprobs.data_ptr(), tokens.data_ptr(), tokens.numel()),
        num_threads(),
        path,
    )
    return logprobs, tokens
