"""Sites, the kinds of attention that can have a prefix."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Site: TypeAlias = Literal["enc", "self", "cross"]
SITES: tuple[Site, ...] = get_args(Site)  # the order of sites in every table, file and report
