"""Outputs of requests: the sequences that grow token by token, and what becomes of them when the request has ended."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from prefixfast.data.encode import Input
from prefixfast.engine.logprobs import TokenLogprob
from prefixfast.engine.request import Generation, Request
from prefixfast.engine.search import NO_TOKEN
from prefixfast.engine.stop_strings import StopStrings
from prefixfast.errors import RequestError
from prefixfast.model.base import Model

NO_TOKEN_ERROR = (
    "no token is possible: the logits are NaN or all -infinity; use another dtype, prefix, logits processor or "
    "bad_words_ids"
)


@dataclass
class OutputSequence:
    """One generated sequence of a request.

    Attributes:
        token_ids: Generated token ids, the end token included.
        finish_reason: Reason why the sequence ended: ``"stop"`` (end token or stop string), ``"length"``,
            ``"cancelled"`` or ``"deadline"``. None while it grows.
        score: Length-normalized log-probability of a beam search, None without beams.
        logprobs: Log-probabilities of each token, empty unless the request asked for them.
    """

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    score: float | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def append(self, token: int, end_ids: Collection[int], max_new_tokens: int) -> None:
        """Append a token, which ends the sequence if it is an end token or the last one allowed.

        Args:
            token: Generated token.
            end_ids: End tokens of the base model.
            max_new_tokens: Largest number of tokens of the sequence.
        """
        self.token_ids.append(token)
        if token in end_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == max_new_tokens:
            self.finish_reason = "length"


class RunningSequences:
    """Sequences of the running requests without beams, as far as their tokens have been read from the device.

    Args:
        model: Base model, whose tokenizer gives the text in which stop strings are searched.
        end_ids: End tokens of the base model.
    """

    def __init__(self, model: Model, end_ids: Collection[int]) -> None:
        self.model, self.end_ids = model, end_ids
        self.sequences: dict[int, list[OutputSequence]] = {}  # by request number
        self.stop_strings: dict[int, list[StopStrings]] = {}  # by request number

    def start(self, number: int, request: Request) -> None:
        """Make empty sequences for a request.

        Args:
            number: Number of the request.
            request: Request without beams.
        """
        self.sequences[number] = [OutputSequence() for _ in range(request.num_rows)]
        if strings := request.params.stop_strings:
            tokenizer = self.model.require_tokenizer()
            special = frozenset(i for i, text in tokenizer.special_texts.items() if any(s in text for s in strings))
            self.stop_strings[number] = [
                StopStrings(tokenizer.stream(), strings, special) for _ in range(request.num_rows)
            ]

    def append(self, number: int, request: Request, place: int, token: int, logprob: TokenLogprob | None) -> None:
        """Append a token to a sequence, unless the sequence has ended and only waits for others of its request.

        Args:
            number: Number of the request.
            request: Request.
            place: Place of the sequence in the request.
            token: Generated token.
            logprob: Log-probabilities at the token, None unless the request asked for them.

        Raises:
            RequestError: If no token was possible.
        """
        sequence = self.sequences[number][place]
        if sequence.finish_reason is not None:
            return
        if token == NO_TOKEN:
            raise RequestError(NO_TOKEN_ERROR)
        sequence.append(token, self.end_ids, request.params.max_new_tokens or 1)
        if logprob is not None:
            sequence.logprobs.append(logprob)
        searched = number in self.stop_strings and token not in self.end_ids
        if searched and self.stop_strings[number][place].found(token):
            sequence.finish_reason = "stop"
        if request.on_token is not None and place == 0:
            request.on_token(token)

    def finished(self, number: int) -> bool:
        """Whether all sequences of a request have ended."""
        return all(s.finish_reason for s in self.sequences[number])

    def cut(self, number: int, reason: str) -> list[OutputSequence]:
        """End the sequences of a request that have not ended.

        Args:
            number: Number of the request. A request without tokens gets one empty sequence.
            reason: Finish reason of the sequences that have not ended.
        """
        sequences = self.sequences.get(number) or [OutputSequence()]
        for sequence in sequences:
            sequence.finish_reason = sequence.finish_reason or reason
        return sequences

    def discard(self, number: int) -> None:
        """Remove a request."""
        self.sequences.pop(number, None)
        self.stop_strings.pop(number, None)

    def clear(self) -> None:
        """Remove all requests."""
        self.sequences.clear()
        self.stop_strings.clear()


@dataclass(frozen=True)
class RequestOutput:
    """A request that has ended.

    Attributes:
        request: Request.
        sequences: Generated sequences, the best one first; at least one, or none if the request was never queued.
        error: Error of the request, None without one.
    """

    request: Request
    sequences: list[OutputSequence]
    error: BaseException | None = None

    def to_generation(self, texts: list[str]) -> Generation | BaseException:
        """Make the caller's result.

        Args:
            texts: Decoded text of each of ``sequences``, without special tokens.

        Returns:
            Result of the request, or the error of a request that failed.
        """
        if self.error is not None:
            return self.error
        r, best = self.request, self.sequences[0]
        # The last prefix of a request with shared leading tokens is a part of its prompt.
        prefixes = r.prefixes[: -1 if r.shared_tokens else None]
        usage = {
            "prompt_tokens": r.num_prompt_tokens,
            "completion_tokens": sum(len(s.token_ids) for s in self.sequences),
            "prefix_rows": sum(p.num_rows for p in prefixes),
        }
        clean = [r.task.clean(text) for text in texts]
        return Generation(
            index=r.index,
            id=r.id,
            text=clean[0],
            texts=clean,
            token_ids=best.token_ids,
            finish_reason=best.finish_reason or "length",
            score=best.score,
            logprobs=None if r.params.logprobs is None else best.logprobs,
            prefix_digest=getattr(r.weights, "digest", None) or "+".join(p.digest for p in prefixes) or None,
            usage=usage,
            base_mismatch=r.base_mismatch,
        )


def error_generation(index: int, item: Input, error: BaseException) -> Generation:
    """Result of a request that failed.

    Args:
        index: Place of the request in the batch.
        item: Request as the caller gave it.
        error: Error of the request.
    """
    return Generation(
        index=index,
        id=item.get("id") if isinstance(item, Mapping) else None,
        text="",
        texts=[],
        token_ids=[],
        finish_reason="error",
        score=None,
        logprobs=None,
        prefix_digest=None,
        usage={},
        error=f"{type(error).__name__}: {error}",
    )
