"""Elements of an XML file with their lines, read by defusedxml."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element, ParseError, TreeBuilder  # classes only; defusedxml parses

from prefixfast.data.files.encodings import as_utf8
from prefixfast.data.files.items import malformed
from prefixfast.data.files.kinds import refused_content
from prefixfast.data.files.raw import ELEMENT_BYTES, Expansion, read_bytes
from prefixfast.errors import DataError, shown

if TYPE_CHECKING:
    from defusedxml.ElementTree import DefusedXMLParser

DEEPEST = 32  # elements inside each other; the corpora have 5
DECLARED = re.compile(rb"""\s*<\?xml[^>]*?encoding\s*=\s*["']([^"']*)["']""")
KEPT_ENCODINGS = ("utf-8", "ascii", "utf-16", "utf-32")  # UTF-16 and UTF-32 have byte order marks, which are read


class XmlElement(Element):
    """Element that keeps its line.

    Attributes:
        line: Line on which the element begins, counted from 1.
    """

    __slots__ = ("line",)
    line: int


def read_xml(path: Path) -> XmlElement:
    """Root element of an XML file.

    Raises:
        DataError: If the file is no well-formed XML, with its line, has a document type (entities that expand or name
            other files), is nested too deep, has more elements than its size allows, or defusedxml is not installed.
    """
    name = str(path)
    try:
        from defusedxml.common import DefusedXmlException
        from defusedxml.ElementTree import DefusedXMLParser
    except ImportError as e:
        msg = f"{name}: reading .xml needs defusedxml: pip install 'prefixfast[data]'"
        raise DataError(msg, path=name) from e
    raw = read_bytes(path)
    if advice := refused_content(raw, path, ".xml"):
        msg = f"{name}: expected the content of a .xml file, got {advice}"
        raise DataError(msg, path=name)
    raw = as_utf8(raw, name)
    _check_declaration(raw, name)
    builder = _Builder(Expansion.of_file(path))
    parser = builder.parser = DefusedXMLParser(target=builder, encoding="utf-8", forbid_dtd=True)
    try:
        parser.feed(raw)
        root = parser.close()
    except ParseError as e:
        raise malformed(name, e.position[0], f"expected XML, got {str(e).partition(':')[0]}") from e
    except DefusedXmlException as e:
        refused = "expected XML without <!DOCTYPE, whose entities can expand or name other files; remove it"
        raise malformed(name, builder.current_line, refused) from e
    assert isinstance(root, XmlElement)  # the builder makes no other
    return root


class _Builder(TreeBuilder):
    """Builder of elements that know their lines. An element takes far more memory than its few bytes in the file."""

    parser: DefusedXMLParser

    def __init__(self, expansion: Expansion) -> None:
        super().__init__(element_factory=XmlElement)
        self.expansion, self.depth = expansion, 0

    @property
    def current_line(self) -> int:
        """Line that the parser has reached."""
        return int(self.parser.parser.CurrentLineNumber)

    def start(self, tag: Any, attrs: dict[Any, Any], /) -> Element:
        self.expansion.add(ELEMENT_BYTES * (1 + len(attrs)))
        element = super().start(tag, attrs)
        element.line = self.current_line  # type: ignore[attr-defined]
        self.depth += 1
        if self.depth > DEEPEST:
            message = f"expected at most {DEEPEST} elements inside each other, got more"
            raise malformed(self.expansion.name, self.current_line, message)
        return element

    def end(self, tag: str, /) -> Element:
        self.depth -= 1
        return super().end(tag)


def _check_declaration(raw: bytes, path: str) -> None:
    """Raise `DataError` for another declared encoding than UTF-8, in which the bytes would be other characters."""
    if raw.isascii() or (declared := DECLARED.match(raw)) is None:
        return
    name = declared[1].decode("ascii", "replace")
    try:
        known = codecs.lookup(name).name in KEPT_ENCODINGS
    except LookupError:
        known = False
    if not known:
        raise malformed(path, 1, f"expected a file in UTF-8, got the declared encoding {shown(name)}; convert the file")
