"""`StopStrings`, which finds stop strings in a growing text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from prefixfast.model.python_tokenizer import TextStream


class StopStrings:
    """Search for stop strings in the text of one sequence.

    Args:
        stream: Stream that turns tokens into text.
        strings: Stop strings.
        special_ids: Special tokens whose own text contains a stop string. They have no text in ``stream``.
    """

    def __init__(self, stream: TextStream, strings: Sequence[str], special_ids: Collection[int] = ()) -> None:
        self.stream, self.strings, self.special_ids = stream, strings, special_ids
        self.longest = max(map(len, strings))
        self.tail = ""

    def found(self, token: int) -> bool:
        """Whether a stop string is complete with this token.

        Args:
            token: Next token of the sequence.
        """
        self.tail += self.stream.push([token])
        complete = any(s in self.tail for s in self.strings)
        self.tail = self.tail[max(0, len(self.tail) - self.longest + 1) :]
        return complete or token in self.special_ids
