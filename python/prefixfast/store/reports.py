"""What the store's larger operations return; `dataclasses.asdict` of each is JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Receipt:
    """What `PrefixStore.delete` removed.

    Attributes:
        name_sha256: Hex SHA-256 of the name; the name itself is not kept.
        digests: Of the versions, oldest first; None for one whose entry could not be read.
        files: How many files were removed.
        bytes: How many bytes they held.
        time: When, UTC, ISO 8601.
    """

    name_sha256: str
    digests: tuple[str | None, ...]
    files: int
    bytes: int
    time: str


@dataclass(frozen=True)
class Outcome:
    """What became of one adapter or one version.

    Attributes:
        name: Of the prefix; None if it could not be told.
        path: The folder.
        ok: Whether it went well.
        why: What was wrong, or what there is to say.
        digest: Of the prefix; None if it could not be read.
    """

    name: str | None
    path: str
    ok: bool
    why: str = ""
    digest: str | None = None


@dataclass(frozen=True)
class Check:
    """What `PrefixStore.verify` found.

    Attributes:
        versions: How many versions were read again.
        damaged: Those that could not be read, or are not what their entry says.
        holding: Files and folders that hold the digest that should be absent, relative to the store.
    """

    versions: int
    damaged: tuple[Outcome, ...]
    holding: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.damaged and not self.holding
