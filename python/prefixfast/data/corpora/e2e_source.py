"""E2E as the code of Li & Liang reads it: lines ``name : Blue Spice | Type : pub||A pub .``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prefixfast import _rust
from prefixfast.data.files import FileRow, Item, read_text
from prefixfast.errors import DataError, shown

OFFICIAL_KEYS = {"Type": "eatType", "price": "priceRange", "family friendly": "familyFriendly"}
EXAMPLE = "name : Blue Spice | Type : pub||A pub ."


def source_items(path: Path) -> Iterator[Item]:
    """Yield rows with the official meaning representation ``mr`` and the text ``ref`` as it stands in the file.

    The texts are tokenized: punctuation stands apart, and a space follows the end.
    """
    try:
        lines = read_text(path).split("\n")
    except DataError as e:
        yield e
        return
    known: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        source, _, text = line.removesuffix("\r").partition("||")
        try:
            if not text.strip() or "||" in text:
                msg = f"expected one source and one text, like {shown(EXAMPLE)}, got {shown(line)}"
                raise DataError(msg)
            if source not in known:
                known[source] = _official(source.strip())
            yield FileRow({"mr": known[source], "ref": text}, str(path), number)
        except DataError as e:
            yield DataError(f"{path}:{number}: {e}", path=str(path), line=number)


def _official(source: str) -> str:
    """The official meaning representation whose prompt is ``source``.

    Raises:
        DataError: If no meaning representation has that prompt.
    """
    slots = []
    for part in source.split(" | "):
        key, _, value = part.partition(" : ")
        if key == "price":
            value = value.replace("£ ", "£").replace(" - ", "-")
        slots.append(f"{OFFICIAL_KEYS.get(key, key)}[{value}]")
    mr = ", ".join(slots)
    try:
        written = _rust.Linearizer.e2e().linearize([mr])[0]
    except DataError as e:
        msg = f"expected a source like {shown(EXAMPLE)}, got {shown(source)}: {str(e).removeprefix('row 0: ')}"
        raise DataError(msg) from e
    if written != source:
        msg = f"expected the source of an official meaning representation, got {shown(source)} instead of {written!r}"
        raise DataError(msg)
    return mr
