"""`Request` and `Generation`: what goes into the engine, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefixfast.config import GenerationParams
from prefixfast.config.engine import BaseMismatch
from prefixfast.config.json_types import JSON
from prefixfast.data.task import Task
from prefixfast.prefix.prefix import Prefix
from prefixfast.prefix.tuned_weights import TunedWeights
from prefixfast.store import StoredPrefix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import LogitsProcessorList

    from prefixfast.engine.logprobs import TokenLogprob


@dataclass(frozen=True)
class Generation:
    """Result of one request. ``str(generation)`` is its text.

    Attributes:
        index: Place of the request in the batch, from 0.
        id: Value of the request's ``id`` key, None without one.
        text: Generated text without special tokens. A stop string that ended the text is part of it.
        texts: All ``num_return_sequences`` texts of the request, ``text`` first.
        token_ids: Generated token ids of ``text``, the end token included.
        finish_reason: Reason why ``text`` ended: ``"stop"`` (end token or stop string), ``"length"``, ``"cancelled"``,
            ``"deadline"`` or ``"error"``.
        score: Length-normalized log-probability (natural log) of a beam search, None without beams.
        logprobs: Log-probabilities of each of ``token_ids``, None unless the request asked for them.
        prefix_digest: Digests of the request's prefixes, joined by "+", None without a prefix.
        usage: Counts ``prompt_tokens``, ``completion_tokens`` (of all texts) and ``prefix_rows``, empty after an error.
        error: Error of the request as ``"class: message"`` if ``on_error="return"``, None without an error.
        base_mismatch: ``"quantized"`` if a prefix was made for the base model before its quantization
            (``allow_base_mismatch``), None without a mismatch.
    """

    index: int
    id: JSON
    text: str
    texts: list[str]
    token_ids: list[int]
    finish_reason: str
    score: float | None
    logprobs: list[TokenLogprob] | None
    prefix_digest: str | None
    usage: dict[str, int]
    error: str | None = None
    base_mismatch: BaseMismatch | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        index: Place of the request in the batch, from 0.
        id: Value of the request's ``id`` key, None without one.
        ids: Prompt token ids that the engine computes for this request, int32. The leading tokens of a shared prompt
            are left out.
        prompt_ids: All prompt token ids, int32. Those of an encoder-decoder base are the decoder's start token.
        prefixes: Prefixes from left to right.
        params: Generation parameters. Only ``seed`` and ``logprobs`` may be None.
        task: Task that cleans the generated text.
        encoder_ids: Token ids of the source, int32, at least one; None for a decoder-only base.
        processors: The caller's own logits processors.
        tenant: Name of the tenant. None groups requests by their first prefix.
        priority: Priority; requests of a higher priority are scheduled first.
        deadline: Time at which the request ends with the tokens so far, in seconds of `time.monotonic`; None without a
            deadline.
        shared_tokens: Number of leading prompt tokens in a shared prompt, whose keys and values are the last prefix.
        on_token: Function that the engine's thread calls with each token of the first text.
        base_mismatch: Difference between the base model and those of the prefixes, None without one.
        weights: Trained weights of all requests of the call, None for those of the base model.
    """

    index: int
    id: JSON
    ids: NDArray[np.int32]
    prompt_ids: NDArray[np.int32]
    prefixes: tuple[Prefix | StoredPrefix, ...]
    params: GenerationParams
    task: Task
    encoder_ids: NDArray[np.int32] | None = None
    processors: LogitsProcessorList | None = None
    tenant: str | None = None
    priority: int = 0
    deadline: float | None = None
    shared_tokens: int = 0
    on_token: Callable[[int], None] | None = None
    base_mismatch: BaseMismatch | None = None
    weights: TunedWeights | None = None

    @property
    def encoder_len(self) -> int:
        """Number of tokens of the source, 0 for a decoder-only base."""
        return 0 if self.encoder_ids is None else len(self.encoder_ids)

    @property
    def num_prompt_tokens(self) -> int:
        """Number of tokens of the source, or of the prompt of a decoder-only base."""
        return self.encoder_len or len(self.prompt_ids)

    @property
    def is_beam_search(self) -> bool:
        """Whether the request is a beam search."""
        return (self.params.num_beams or 1) > 1

    @property
    def num_rows(self) -> int:
        """Number of decode rows: one per beam, or one per sample."""
        return (self.params.num_beams or 1) if self.is_beam_search else (self.params.num_return_sequences or 1)
