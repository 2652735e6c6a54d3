"""`PrefixShape`, the attributes of a prefix that tell whether it fits a base model, and its rows in the base's layers.

A layer can read the keys and values of an earlier layer (`LayerShape.source`). It then attends to the prefix rows of
that layer, as it does with a cache that PEFT filled, and has none of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from prefixfast.config.sites import Site
from prefixfast.model.fingerprint import Fingerprint, num_layers

if TYPE_CHECKING:
    from prefixfast.model.dry_run import LayerShape

T = TypeVar("T")


class PrefixShape(Protocol):
    """A prefix, or the entry of a prefix in a store."""

    @property
    def base(self) -> Fingerprint | None:
        """Fingerprint of the base model, None if unknown."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """Shape ``(P, H, D)`` of each tensor."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites that have rows, in the order of `SITES`."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of site ``self`` that have rows, ascending."""

    def length_at(self, site: Site) -> int:
        """Number of rows of a site, 0 for a site without rows."""

    def layers_at(self, site: Site) -> tuple[int, ...]:
        """Layers of a site that have rows, ascending."""

    @property
    def pos_start(self) -> int:
        """Position of the first token after the prefix."""

    @property
    def position(self) -> str:
        """Place of the prefix in a sequence, ``"prefix"`` or ``"infix"``."""


def source_of(shapes: Sequence[LayerShape]) -> list[int]:
    """Layer whose keys and values each layer reads, itself for a layer with its own."""
    return [i if s.source is None else s.source for i, s in enumerate(shapes)]


def own_layers(shapes: Sequence[LayerShape]) -> tuple[int, ...]:
    """Layers with keys and values of their own, ascending."""
    return tuple(i for i, s in enumerate(shapes) if s.source is None)


def readers(shapes: Sequence[LayerShape]) -> frozenset[int]:
    """Layers that read the keys and values of another layer."""
    return frozenset(i for i, s in enumerate(shapes) if s.source is not None)


def by_source(shapes: Sequence[LayerShape], items: Sequence[T]) -> list[T]:
    """One item for each layer, which is the item of the layer whose keys and values it reads."""
    return [items[source] for source in source_of(shapes)]


def seeing_layers(shapes: Sequence[LayerShape], layers: Collection[int]) -> tuple[int, ...]:
    """Layers that attend to rows in ``layers``, ascending: these, and the layers that read their keys."""
    return tuple(i for i, source in enumerate(source_of(shapes)) if source in layers)


def filled_layers(prefix: PrefixShape, shapes: Sequence[LayerShape], site: Site = "self") -> tuple[int, ...]:
    """Layers of a base model with rows of a prefix at a site, ascending.

    An adapter of PEFT has rows of one shape in every layer. PEFT cuts them to the heads of a layer, and leaves out the
    layers that need larger rows and those that read the keys of another layer.

    Args:
        prefix: Prefix, or its entry in a store.
        shapes: Heads of every layer of the site.
        site: Site.
    """
    layers = tuple(i for i in prefix.layers_at(site) if i < len(shapes) and shapes[i].source is None)
    if site != "self" or not is_peft_table(prefix, shapes):
        return layers
    _, heads, dim = prefix.shapes["self.0.k"]
    return tuple(i for i in layers if shapes[i].num_kv_heads <= heads and shapes[i].head_dim <= dim)


def is_peft_table(prefix: PrefixShape, shapes: Sequence[LayerShape]) -> bool:
    """Whether a prefix is the table of a PEFT adapter for a base model whose layers differ in their heads.

    The rows of such a table are those of the widest layer. A prefix of prefixfast names its base model's configuration,
    which an adapter of PEFT does not.
    """
    widest = max(s.head_dim for s in shapes)
    return (
        num_layers(prefix.base) is None
        and len({(s.num_kv_heads, s.head_dim) for s in shapes}) > 1
        and prefix.layers == tuple(range(len(shapes)))
        and {shape[1:] for shape in prefix.shapes.values()} <= {(s.num_kv_heads, widest) for s in shapes}
        and len(set(prefix.shapes.values())) == 1
    )
