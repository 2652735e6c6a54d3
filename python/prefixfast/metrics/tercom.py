"""Edits of a text with the shifts of Tercom 0.7.25, whose choices among equal shifts and alignments decide its number.

sacrebleu's port of the algorithm gives another number for 28 of the 5,097 outputs of BART in the DART repository.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

BEAM, MAX_SHIFT, MAX_DISTANCE = 20, 10, 50  # Tercom's limits: edits, and words of a shift and of its distance
Words: TypeAlias = tuple[str, ...]
Places: TypeAlias = Mapping[Words, Sequence[int]]
State: TypeAlias = tuple[int, int, int]
MATCH, SUBSTITUTE, INSERT, DELETE = " SID"


class Shift(NamedTuple):
    """Words ``start`` to ``end`` of an output, the last included, moved behind word ``after`` (-1 for the front)."""

    start: int
    end: int
    after: int

    def of(self, words: Words) -> Words:
        """The words after the shift."""
        start, stop, after = self.start, self.end + 1, self.after
        moved = words[start:stop]
        if after < start:
            return words[: after + 1] + moved + words[after + 1 : start] + words[stop:]
        if after >= stop:
            return words[:start] + words[stop : after + 1] + moved + words[after + 1 :]
        further = stop + after - start
        return words[:start] + words[stop:further] + moved + words[further:]


@lru_cache(maxsize=1 << 16)  # a subset is scored beside all texts
def num_edits(output: Words, reference: Words) -> int:
    """Number of insertions, deletions, substitutions and shifts that Tercom counts.

    Args:
        output: Words of the output.
        reference: Words of the reference.
    """
    if not output or not reference:
        return len(output) + len(reference)
    places = _places(output, reference)
    distance = _Distance(reference)
    edits, path = align(output, reference)
    shifts = 0
    while edits and (found := _best_shift(output, _Alignment(path, len(output), reference), edits, places, distance)):
        output = found.of(output)
        edits, path = align(output, reference)
        shifts += 1
    return shifts + edits


def align(output: Words, reference: Words) -> tuple[int, str]:
    """Edit distance within Tercom's beam, and the path that it follows among equal ones.

    Args:
        output: Words of the output.
        reference: Words of the reference.

    Returns:
        Number of edits, and one character for each step of the path.
    """
    num_out, num_ref = len(output), len(reference)
    steps = [[""] * (num_ref + 1) for _ in range(num_out + 1)]
    costs, best, first, last = [0, *[-1] * num_ref], 10**6, 0, 0
    for j in range(num_out + 1):
        following = [-1] * (num_ref + 1)
        limit, best = best + BEAM, 10**6
        begin, first = first, -1
        end, last = last, -1
        for i in range(begin, num_ref + 1):
            if i > end:
                break
            cost = costs[i]
            if cost < 0 or (j < num_out and cost > limit):
                continue
            first = i if first < 0 else first
            last = i + 1
            if j < num_out:
                if i < num_ref:
                    is_match = reference[i] == output[j]
                    cheapest = cost if is_match else cost + 1
                    if following[i + 1] < 0 or cheapest < following[i + 1]:
                        following[i + 1] = cheapest
                        steps[j + 1][i + 1] = MATCH if is_match else SUBSTITUTE
                        best = min(best, cheapest)
                if following[i] < 0 or following[i] > cost + 1:
                    following[i], steps[j + 1][i] = cost + 1, INSERT
            if i < num_ref and (costs[i + 1] < 0 or costs[i + 1] > cost + 1):
                costs[i + 1], steps[j][i + 1] = cost + 1, DELETE
                end = max(end, i + 1)
        total, costs = costs[num_ref], following
    return total, _path(steps)


def _path(steps: Sequence[Sequence[str]]) -> str:
    j, i = len(steps) - 1, len(steps[0]) - 1
    path = []
    while i or j:
        path.append(steps[j][i])
        i, j = i - (path[-1] != INSERT), j - (path[-1] != DELETE)
    return "".join(reversed(path))


class _Alignment:
    """Errors of output and reference in an alignment, and the place of each reference word in the output."""

    def __init__(self, path: str, num_out: int, reference: Words) -> None:
        self.wrong_output, self.wrong_reference = [False] * num_out, [False] * len(reference)
        self.place = [0] * len(reference)
        j = i = -1
        for step in path:
            j, i = j + (step != DELETE), i + (step != INSERT)
            if step != DELETE:
                self.wrong_output[j] = step != MATCH
            if step != INSERT:
                self.wrong_reference[i], self.place[i] = step != MATCH, j


class _Distance:
    """Edit distance to a reference, in bits of integers (Myers 1999)."""

    def __init__(self, reference: Words) -> None:
        self.reference, self.all = reference, (1 << len(reference)) - 1
        self.bits: dict[str, int] = defaultdict(int)
        for i, word in enumerate(reference):
            self.bits[word] |= 1 << i

    def states(self, words: Words, state: State | None = None) -> Iterator[State]:
        """States after each word: bits of larger and smaller differences, and the distance.

        Args:
            words: Words of an output.
            state: State before the first of them; None at the start of the output.
        """
        up, down, distance = state or (self.all, 0, len(self.reference))
        top = len(self.reference) - 1
        for word in words:
            equal = self.bits.get(word, 0)
            vertical, equal = equal | down, (((equal & up) + up) ^ up) | equal
            more, less = down | (self.all & ~(equal | up)), up & equal
            distance += ((more >> top) & 1) - ((less >> top) & 1)
            more, less = (more << 1 | 1) & self.all, less << 1 & self.all
            up, down = less | (self.all & ~(vertical | more)), more & vertical
            yield up, down, distance


def _places(output: Words, reference: Words) -> Places:
    """Places in the reference of each of its runs of words that the output has, in their order."""
    places: dict[Words, list[int]] = defaultdict(list)
    known = set(output)
    for start in range(len(reference)):
        for end in range(start, min(start + MAX_SHIFT + 1, len(reference))):
            if reference[end] not in known:
                break
            places[reference[start : end + 1]].append(start)
    return dict(places)


def _best_shift(output: Words, alignment: _Alignment, edits: int, places: Places, distance: _Distance) -> Shift | None:
    """The shift that Tercom takes, longest ones first; None if no shift saves an edit."""
    shifts = _shifts(output, alignment, places)
    before = [*distance.states(output)]
    best, cost, rest, tried = None, 0, edits, set[Shift]()
    for size in reversed(range(MAX_SHIFT)):
        for shift in shifts[size]:
            saved, most = edits - cost - rest, 2 * (size + 1)
            if saved > most or (cost and saved == most):
                break
            if shift in tried:
                continue
            tried.add(shift)
            left = _edits_after(shift, output, before, distance)
            gain = cost + rest - left - 1
            if gain > 0 or (gain == 0 and not cost):
                best, cost, rest = shift, 1, left
    return best


def _edits_after(shift: Shift, output: Words, before: Sequence[State], distance: _Distance) -> int:
    """Edits after a shift. Up to the beam's width, the distance within the beam is the edit distance."""
    words = shift.of(output)
    same = min(shift.start, shift.after + 1)
    state = before[same - 1] if same else None
    *_, (_, _, found) = distance.states(words[same:], state)
    return found if found <= BEAM else align(words, distance.reference)[0]


def _shifts(output: Words, alignment: _Alignment, places: Places) -> list[list[Shift]]:
    """Shifts of runs of words to places where the reference has them, by the number of words less one."""
    found: list[list[Shift]] = [[] for _ in range(MAX_SHIFT)]
    place = alignment.place
    for start in range(len(output)):
        for end in range(start, min(start + MAX_SHIFT, len(output))):
            words = output[start : end + 1]
            if words not in places:
                break
            if not any(alignment.wrong_output[start : end + 1]):
                continue
            to = [t for t in places[words] if not start <= place[t] <= end and abs(place[t] - start) <= MAX_DISTANCE]
            if not to:
                break
            for t in to:
                if any(alignment.wrong_reference[t : t + len(words)]):
                    found[end - start] += [Shift(start, end, a) for a in _targets(start, t, len(words), place)]
    return found


def _targets(start: int, to: int, size: int, place: Sequence[int]) -> Iterator[int]:
    """Words behind which Tercom tries a run that the reference has at ``to``."""
    for offset in range(-1, size):
        if offset < 0 and not to:
            yield -1
        elif place[to + offset] != start and (not offset or place[to + offset] != place[to]):
            yield place[to + offset]
