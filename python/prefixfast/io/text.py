"""Numbers, times and counts as text for people."""

from __future__ import annotations

from collections.abc import Collection


def counted(count: float, singular: str, plural: str | None = None) -> str:
    """Number with its noun, such as ``1 prefix`` or ``2 prefixes``.

    Args:
        count: Number of things.
        singular: Noun.
        plural: Noun for any number but one, None for the noun with an s.
    """
    return f"{whole(count)} {singular if count == 1 else plural or f'{singular}s'}"


def span(numbers: Collection[int]) -> str:
    """The number that all are, or the smallest and the largest: ``4``, ``4 to 9``."""
    low, high = min(numbers), max(numbers)
    return whole(low) if low == high else f"{whole(low)} to {whole(high)}"


def whole(count: float) -> str:
    """Whole number with all of its digits, also if it is a float such as ``1234567.0``."""
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """Time, such as ``45 s``, ``2 min 5 s`` or ``3 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def rate(value: float) -> str:
    """Number with at least two digits, such as ``1234``, ``12``, ``1.2`` or ``0.012``."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
