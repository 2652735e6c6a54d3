"""`ChatSession`: the base, prefix, settings and conversation of ``prefixfast chat``."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from prefixfast.cli.output import printable
from prefixfast.cli.text_reader import TextReader
from prefixfast.config import GenerationParams
from prefixfast.errors import ConfigError, PrefixFastError, shown

if TYPE_CHECKING:
    from prefixfast.cli.prefix_choice import PrefixChoice
    from prefixfast.data.chat import Message
    from prefixfast.data.encode import Ints
    from prefixfast.data.task import Task
    from prefixfast.engine.engine import Engine
    from prefixfast.engine.stream import Stream
    from prefixfast.prefix.prefix import Prefix
    from prefixfast.store import StoredPrefix

LONGEST_ANSWER, ANSWER_SHARE = 256, 4  # an answer without max_new_tokens gets 256 tokens, at most 1/4 of the context
SHOWN = 40  # characters of a dropped text in a notice
REFUSED = {
    "num_beams": (1, "an answer is shown while it is generated"),
    "num_return_sequences": (1, "a text has one answer"),
    "logprobs": (None, "a conversation shows text only"),
}


def chat_params(params: GenerationParams, **changes: Any) -> GenerationParams:
    """Generation parameters of a conversation.

    Args:
        params: Parameters to change.
        changes: Fields by name.

    Raises:
        ConfigError: If a name is unknown, a value is wrong, or an option has no effect in a conversation.
    """
    changed = GenerationParams.make(params, **changes)
    for name, (expected, reason) in REFUSED.items():
        if (got := getattr(changed, name)) not in (None, expected):
            msg = f"{name}: expected {expected or 'none'}, since {reason}, got {shown(got)}; use prefixfast generate"
            raise ConfigError(msg)
    if changed.do_sample is False and (unused := _sampling_options(changed)):
        msg = f"{unused[0]} has no effect with do_sample=false; set do_sample to true, or {unused[0]} to none"
        raise ConfigError(msg)
    return changed


def with_sampling(params: GenerationParams) -> GenerationParams:
    """Parameters that sample if they have an option of sampling, such as a temperature."""
    return replace(params, do_sample=True) if _sampling_options(params) else params


def _sampling_options(params: GenerationParams) -> list[str]:
    from prefixfast.engine.sampling_params import SAMPLING_FIELDS

    return [name for name in SAMPLING_FIELDS if getattr(params, name) is not None]


class ChatSession:
    """One conversation, or texts one after the other, over one engine.

    Args:
        engine: Engine.
        choice: Prefixes by name.
        params: Generation parameters, as `chat_params` makes them.
        conversation: Whether the base's chat template writes the texts; None decides by the prefix.
        notify: Function that shows one line about the conversation.

    Attributes:
        names: Names of the prefixes in use, which compose from left to right.
        messages: Conversation so far.
        ending: Reason why the last answer ended before its time, None without one.
    """

    def __init__(
        self,
        engine: Engine,
        choice: PrefixChoice,
        params: GenerationParams,
        conversation: bool | None,
        notify: Callable[[str], None],
    ) -> None:
        self.engine, self.choice, self.params, self.notify = engine, choice, params, notify
        self.reader = TextReader(engine.model, conversation)
        self.names: tuple[str, ...] = ()
        self.messages: list[Message] = []
        self.ending: str | None = None

    def use(self, names: Sequence[str]) -> None:
        """Answer with other prefixes from now on. The conversation so far stays.

        Args:
            names: Names of prefixes that compose from left to right, none for the base alone.

        Raises:
            UnknownPrefixError: If there is no such name.
            BaseMismatchError: If a prefix is that of another base.
        """
        from prefixfast.prefix.compatibility import check_fits, described

        for prefix in (found := self._prefixes(names)):
            check_fits(self.engine.model, prefix, described(prefix))
        self.names = tuple(names)
        if beams := next((n for p in reversed(found) if (n := p.decoding.get("num_beams"))), None):
            self.notify(f"the prefix's own num_beams={beams} is not used, since an answer is shown as it is generated")

    def describe(self) -> str:
        """One line: prefixes in use, and how a text becomes a prompt."""
        found = self._prefixes(self.names)
        rows = sum(p.num_rows for p in found)
        used = f"prefix {' + '.join(map(printable, self.names))} ({rows} prefix rows)" if found else "no prefix"
        return f"{used}; {self.reader.describe(self.reader.task(found))}"

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = []

    def answer(self, text: str) -> Generator[str, None, None]:
        """Answer a text, and yield the answer piece by piece.

        The text and the answer, or what an interrupt leaves of it, join the conversation.

        Args:
            text: Text of the user.

        Raises:
            PrefixFastError: If the text is none that the task reads, is too long, or generation fails.
        """
        prefixes = self._prefixes(self.names)
        task = self.reader.task(prefixes)
        keeps = task.format == "messages"
        ids, dropped = self._fit(text, task, prefixes, self.messages if keeps else [])
        own = replace(with_sampling(self.params), num_beams=1, num_return_sequences=1)
        pieces: list[str]
        stream = self.engine.stream(ids.tolist(), list(prefixes) or None, params=own)
        self._tell_dropped(dropped)
        self.ending, pieces = None, []
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
            self.ending = _full_context(stream, self._limit(prefixes))
        except PrefixFastError:
            pieces.clear()
            raise
        finally:
            stream.cancel()
            if keeps and pieces:
                answered = [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(pieces)}]
                self.messages = [*self.messages[dropped:], *answered]

    def _prefixes(self, names: Sequence[str]) -> list[Prefix | StoredPrefix]:
        return [self.choice.find(name) for name in names]

    def _limit(self, prefixes: Sequence[Prefix | StoredPrefix]) -> int:
        """Largest number of prompt and generated tokens."""
        from prefixfast.engine.make_requests import text_positions

        return min(self.engine.max_model_len, text_positions(self.engine.model, prefixes))

    def _fit(
        self, text: str, task: Task, prefixes: Sequence[Prefix | StoredPrefix], earlier: Sequence[Message]
    ) -> tuple[Ints, int]:
        """Token ids of the prompt, and the number of messages that are dropped so that an answer fits behind it.

        A text that does not fit alone is left to the engine, which says so.
        """
        limit = self._limit(prefixes)
        room = self.params.max_new_tokens or min(LONGEST_ANSWER, limit // ANSWER_SHARE)
        for dropped in range(0, len(earlier) + 1, 2):
            ids = self.reader.ids(text, task, earlier[dropped:])
            if len(ids) + room <= limit:
                break
        return ids, dropped

    def _tell_dropped(self, dropped: int) -> None:
        if dropped:
            first = str(self.messages[0]["content"])
            begin = printable(first if len(first) <= SHOWN else first[: SHOWN - 1] + "…")
            self.notify(
                f"the conversation is longer than the context: the oldest {dropped // 2} of {len(self.messages) // 2} "
                f"texts and their answers are dropped, from {begin!r} on"
            )


def _full_context(stream: Stream, limit: int) -> str | None:
    """Sentence that says that an answer ended at the end of the context, None for another end."""
    result = stream.generation
    is_full = result.usage["prompt_tokens"] + len(result.token_ids) >= limit
    return f"the answer ends at the context's {limit} tokens" if is_full and result.finish_reason == "length" else None
