"""The texts of a request while they grow, and what is left of it when it has ended."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from prefixfast import _rust
from prefixfast.engine.request import Generation, Request, TokenLogprob


@dataclass
class Text:
    """One text of a request.

    Attributes:
        ids: Its tokens, the end token included.
        reason: Why it ended: ``"stop"`` (end token or stop string), ``"length"``, ``"cancelled"`` or ``"deadline"``; None while it grows.
        score: Of beam search.
        logprobs: Of each token, if asked for.
    """

    ids: list[int] = field(default_factory=list)
    reason: str | None = None
    score: float | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, token: int, ends: Collection[int], most: int) -> None:
        """A token more; it may end the text."""
        self.ids.append(token)
        if token in ends:
            self.reason = "stop"
        elif len(self.ids) == most:
            self.reason = "length"


class StopStrings:
    """Looks for strings in a growing text.

    Args:
        stream: Makes text of tokens.
        strings: What to look for.
        special: Special tokens, which have no text in the stream, in whose own text one of the strings is.
    """

    def __init__(self, stream: _rust.DetokenizeStream, strings: Sequence[str], special: Collection[int] = ()) -> None:
        self.stream, self.strings, self.special, self.longest, self.tail = (
            stream,
            strings,
            special,
            max(map(len, strings)),
            "",
        )

    def found(self, token: int) -> bool:
        """Whether one of the strings is whole with this token."""
        self.tail += self.stream.push([token])
        met = any(s in self.tail for s in self.strings)
        self.tail = self.tail[max(0, len(self.tail) - self.longest + 1) :]
        return met or token in self.special


@dataclass(frozen=True)
class Outcome:
    """The end of a request.

    Attributes:
        request: Which one.
        texts: What was generated, the best first; at least one.
        error: Why it failed, None if it did not.
    """

    request: Request
    texts: list[Text]
    error: BaseException | None = None

    def finish(self, decoded: list[str]) -> Generation | BaseException:
        """The user's result; ``decoded``: each of ``texts`` without special tokens."""
        if self.error is not None:
            return self.error
        r, best = self.request, self.texts[0]
        own = r.prefixes[: -1 if r.shared else None]  # a shared leading text is part of the prompt
        digest = "+".join(p.digest for p in own) or None
        new = sum(len(text.ids) for text in self.texts)
        usage = {"prompt_tokens": len(r.prompt), "completion_tokens": new, "prefix_rows": sum(p.length for p in own)}
        clean = [r.task.clean(text) for text in decoded]
        logprobs = None if r.params.logprobs is None else best.logprobs
        return Generation(
            r.index, r.id, clean[0], clean, best.ids, best.reason or "length", best.score, logprobs, digest, usage
        )
