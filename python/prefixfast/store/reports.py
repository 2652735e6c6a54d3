"""Reports of the store's operations; `dataclasses.asdict` makes JSON of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Receipt:
    """Report of `PrefixStore.delete`.

    Attributes:
        name_sha256: Hex SHA-256 of the deleted name; the name itself is not stored.
        digests: Digests of the deleted versions, oldest first; None for a version whose entry could not be read.
        files: Number of files that were deleted, or replaced by files without the prefix.
        bytes: Size of the deleted content in bytes.
        time: Time of the deletion, UTC, ISO 8601.
        place: Absolute path of the store, the only place from which files were deleted. Copies elsewhere, such as the
            output folder of a training run with its checkpoints, exports and backups, stay.
        checkpoints: Number of checkpoints of training runs in the store from which the prefix was removed.
        running: Names of the folders of runs that train the prefix now and were left alone. Such a run puts the prefix
            into the store again; stop it and delete the name again.
    """

    name_sha256: str
    digests: tuple[str | None, ...]
    files: int
    bytes: int
    time: str
    place: str
    checkpoints: int = 0
    running: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """Result of an operation on one adapter folder or one stored version.

    Attributes:
        name: Name of the prefix, None if unknown.
        path: Folder of the adapter or of the version.
        ok: Whether the operation succeeded.
        why: Reason of a failure, or a remark on a success.
        digest: Digest of the prefix, None if it could not be read.
    """

    name: str | None
    path: str
    ok: bool
    why: str = ""
    digest: str | None = None


@dataclass(frozen=True)
class Check:
    """Report of `PrefixStore.verify`.

    Attributes:
        versions: Number of versions that were read.
        damaged: Results of the versions that could not be read, or differ from their entry.
        holding: Files and folders that hold the digest that should be absent, in the store relative to it.
        searched: Absolute paths of all folders that were searched for the digest: the store, and those given by
            ``also``. Empty without a digest.
    """

    versions: int
    damaged: tuple[Outcome, ...]
    holding: tuple[str, ...] = ()
    searched: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no version is damaged and no file holds the absent digest."""
        return not self.damaged and not self.holding
