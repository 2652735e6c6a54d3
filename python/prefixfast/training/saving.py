"""Saving of prefixes that end at the same step, several at a time, since each save waits for the disk."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from prefixfast.store.entry import StoredPrefix
from prefixfast.training.methods.state import Artifact

if TYPE_CHECKING:
    from prefixfast.training.output_dir import OutputDir

SAVED_TOGETHER = 64  # prefixes that are built before they are saved, which bounds their memory
NUM_THREADS = 8


def save_together(
    output: OutputDir, prefixes: Mapping[str, Artifact], *, resumed: bool, isolate: bool
) -> list[tuple[StoredPrefix | None, str]]:
    """Save prefixes to the output folder and the store. A process that is killed keeps those that were saved before.

    Args:
        output: Output folder and store.
        prefixes: Prefixes, or weights, by name.
        resumed: Whether the run was resumed, so that the store may hold some of them.
        isolate: Whether a prefix that cannot be saved leaves the others alone.

    Returns:
        Of each prefix, its version in the store (None without a store) and an error message, which is empty if it was
        saved.

    Raises:
        OSError: If a prefix cannot be saved and failures are not isolated; the others have then been saved.
    """

    def save(name: str) -> tuple[StoredPrefix | None, str]:
        try:
            return output.save_prefix(name, prefixes[name], resumed=resumed), ""
        except OSError as e:
            if not isolate:
                raise
            return None, f"the prefix cannot be saved: {e}"

    with ThreadPoolExecutor(min(NUM_THREADS, len(prefixes) or 1)) as pool:
        return list(pool.map(save, prefixes))
