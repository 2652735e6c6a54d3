"""`SiteRows`, the sites, lengths and layers of a prefix, from its tensors' shapes. This module imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from prefixfast.config.sites import BySite, Site, one_or_by_site
from prefixfast.prefix.names import layers_of, site_of


class SiteRows:
    """Numbers of rows and layers of a prefix at each site."""

    if TYPE_CHECKING:

        @property
        def shapes(self) -> Mapping[str, tuple[int, int, int]]:
            """Shape ``(P, H, D)`` of each tensor."""

    @cached_property
    def _rows(self) -> BySite[int]:
        """Number of rows of the longest layer at each site that has rows."""
        rows: dict[Site, int] = {}
        for name, (length, _, _) in self.shapes.items():
            site = site_of(name)
            rows[site] = max(length, rows.get(site, 0))
        return BySite(rows)

    @cached_property
    def _layers(self) -> BySite[tuple[int, ...]]:
        """Layers that have rows at each site, ascending. A load into an arena reads them, so they are found once."""
        return BySite({site: layers_of(self.shapes, site) for site in self._rows})

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites that have rows, in the order of `SITES`."""
        return tuple(self._rows)

    @property
    def length(self) -> int | BySite[int]:
        """Number of rows P of the longest layer, by site if the sites differ."""
        return one_or_by_site(self._rows)

    @property
    def num_rows(self) -> int:
        """Number of rows of all sites together."""
        return sum(self._rows.values())

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of site ``self`` that have rows, ascending. In the other layers the text attends to itself only."""
        return self.layers_at("self")

    def length_at(self, site: Site) -> int:
        """Number of rows P of the longest layer of a site.

        Args:
            site: Site.

        Returns:
            Number of rows, 0 for a site without rows.
        """
        return self._rows.get(site, 0)

    def layers_at(self, site: Site) -> tuple[int, ...]:
        """Layers of a site that have rows.

        Args:
            site: Site.

        Returns:
            Numbers of the layers in their stack, ascending.
        """
        return self._layers.get(site, ())
