"""Sites, the kinds of attention that can have a prefix, and `BySite`, a value for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NoReturn, Self, TypeAlias, TypeVar, get_args

T = TypeVar("T")
Site: TypeAlias = Literal["enc", "self", "cross"]
SITES: tuple[Site, ...] = get_args(Site)  # the order of sites in every table, file and report
SITE_NAMES = {"enc": "encoder self-attention", "self": "decoder self-attention", "cross": "cross-attention"}


class BySite(dict[Site, T]):
    """Immutable mapping of sites to values, in the order of `SITES`.

    It equals a dict with the same items, and files hold it as a JSON object. A hash needs values that have one.

    Args:
        values: Value of each site, in any order.

    Raises:
        ValueError: If a key is no site.

    Example:
        >>> BySite({"self": 5, "enc": 3})
        BySite({'enc': 3, 'self': 5})
    """

    def __init__(self, values: Mapping[Any, T] | Iterable[tuple[Any, T]] = ()) -> None:
        given = dict(values)
        if unknown := [key for key in given if key not in SITES]:
            msg = f"expected sites among {', '.join(SITES)}, got {unknown[0]!r}"
            raise ValueError(msg)
        super().__init__((site, given[site]) for site in SITES if site in given)

    @classmethod
    def of(cls, value: T, sites: Iterable[Site]) -> Self:
        """The same value for each of ``sites``."""
        return cls(dict.fromkeys(sites, value))

    def _immutable(self, *_args: object, **_values: object) -> NoReturn:
        msg = f"{type(self).__name__} is immutable; make another one"
        raise TypeError(msg)

    __setitem__ = __delitem__ = __ior__ = _immutable
    update = setdefault = pop = popitem = clear = _immutable

    def __hash__(self) -> int:  # type: ignore[override]
        """Hash of the items."""
        return hash(tuple(self.items()))

    def __reduce__(self) -> tuple[Callable[..., Self], tuple[dict[Site, T]]]:
        """Copies and pickles are made by the constructor."""
        return type(self), (dict(self),)

    def __repr__(self) -> str:
        """Name of the class with the items."""
        return f"{type(self).__name__}({dict(self)})"


def one_or_by_site(values: Mapping[Site, T]) -> T | BySite[T]:
    """The value that all sites have, or the value of each site where they differ.

    Args:
        values: Value of each site, at least one.
    """
    first, *others = values.values()
    return BySite(values) if any(value != first for value in others) else first
