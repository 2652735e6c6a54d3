"""The XML of WebNLG, in which DART is released too: entries with triples and their texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefixfast.config.json_types import JSON
from prefixfast.data.files import XmlElement, read_xml
from prefixfast.errors import DataError, shown

IGNORED = ("originaltripleset", "dbpedialinks", "links")  # the properties before their revision; links to translations


@dataclass(frozen=True)
class XmlEntry:
    """One entry of a file.

    Attributes:
        line: Line of the entry.
        attributes: Attributes of the entry, for example ``category`` and ``eid``.
        triples: Triples of subject, property and object.
        texts: Attributes of each text, for example ``comment``, with the text itself, which can be empty, under
            ``text``.
    """

    line: int
    attributes: dict[str, str]
    triples: list[list[str]]
    texts: list[dict[str, JSON]]


def xml_entries(path: Path) -> Iterator[XmlEntry | DataError]:
    """Yield the entries of a file, and a `DataError` in place of each malformed one."""
    try:
        root = read_xml(path)
        entries = _children(root, "benchmark", ("entries",), path)
        if len(entries) != 1:
            raise _error(path, root, f"expected one element entries, got {len(entries)}")
        found = _children(entries[0], "entries", ("entry",), path)
    except DataError as e:
        yield e
        return
    for element in found:
        try:
            yield _entry(element, path)
        except DataError as e:
            yield e


def _entry(element: XmlElement, path: Path) -> XmlEntry:
    parts = _children(element, "entry", ("modifiedtripleset", "lex", *IGNORED), path)
    sets = [p for p in parts if p.tag == "modifiedtripleset"]
    if len(sets) != 1:
        raise _error(path, element, f"expected one element modifiedtripleset, got {len(sets)}")
    triples = [_triple(t, path) for t in _children(sets[0], "modifiedtripleset", ("mtriple",), path)]
    if not triples:
        raise _error(path, sets[0], "expected at least one element mtriple, got none")
    texts: list[dict[str, JSON]] = [{**p.attrib, "text": _text(p, path).strip()} for p in parts if p.tag == "lex"]
    return XmlEntry(element.line, dict(element.attrib), triples, texts)


def _triple(element: XmlElement, path: Path) -> list[str]:
    parts = [part.strip() for part in _text(element, path).split("|")]
    if len(parts) != 3:
        raise _error(path, element, f"expected subject | property | object, got {shown(element.text)}")
    return parts


def _text(element: XmlElement, path: Path) -> str:
    _children(element, element.tag, (), path)
    return element.text or ""


def _children(element: XmlElement, tag: str, known: tuple[str, ...], path: Path) -> list[XmlElement]:
    """Elements inside an element, which have known tags only."""
    if element.tag != tag:
        raise _error(path, element, f"expected the element {tag}, got {shown(element.tag)}")
    found = [child for child in element if isinstance(child, XmlElement)]
    if (other := next((child for child in found if child.tag not in known), None)) is not None:
        expected = f"the elements {', '.join(known)}" if known else "text alone"
        raise _error(path, other, f"expected {expected} in {tag}, got {shown(other.tag)}")
    return found


def _error(path: Path, element: XmlElement, message: str) -> DataError:
    return DataError(f"{path}:{element.line}: {message}", path=str(path), line=element.line)
