"""Bytes of text files as UTF-8: byte order marks, given encodings, and advice where the encoding is wrong."""

from __future__ import annotations

import codecs
import logging
import re

from prefixfast.data.files.items import malformed
from prefixfast.errors import ConfigError, DataError, check_string, shown

logger = logging.getLogger(__name__)
BYTE_ORDER_MARKS = (  # the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
WIDE = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
CANDIDATES = ("cp1252", "cp1251", "cp932", "gb18030")  # Western, Cyrillic, Japanese and Chinese Windows
MAX_SUGGESTED = 3
SAMPLE_BYTES = 40  # bytes of a line on each side of the first wrong byte in an error
FOREIGN_SHARE = 0.3  # share of letters beyond ASCII in a text of another script than the Latin, at least
ASCII = bytes(range(128))
FEWEST_NULS = 0.3  # share of the bytes of a text in Latin letters in UTF-16, at least
CONTROL = re.compile(rb"[\x01-\x08\x0b\x0c\x0e-\x1f]")


def check_encoding(encoding: str | None) -> None:
    """Raise `ConfigError` for a name that is no text encoding."""
    if encoding is None:
        return
    check_string("encoding", encoding, "the name of a text encoding like 'cp1252'")
    try:
        b"".decode(encoding)
        "".encode(encoding)
    except (LookupError, ValueError) as e:
        msg = f"encoding: expected the name of a text encoding like 'cp1252' or 'utf-16', got {shown(encoding)}"
        raise ConfigError(msg) from e


def as_utf8(raw: bytes, path: str, encoding: str | None = None, *, has_option: bool = False) -> bytes:
    """The bytes of a text file as UTF-8 without byte order mark.

    Args:
        raw: Content of the file.
        path: Path of the file, for errors.
        encoding: Encoding of the text. None takes the encoding of the byte order mark, or UTF-8 without one.
        has_option: Whether the user can name an encoding, which an error then advises.

    Raises:
        DataError: If the bytes are not text of that encoding, with the line and encodings of the whole file, or hold a
            NUL character.
    """
    mark, marked = next((m for m in BYTE_ORDER_MARKS if raw.startswith(m[0])), (b"", None))
    if marked and encoding and not marked.startswith(codecs.lookup(encoding).name.removesuffix("-sig")):
        given = f"encoding={shown(encoding)}"
        raise malformed(path, 1, f"expected text for {given}, got the byte order mark of {marked}; leave {given} out")
    body = raw.removeprefix(mark)
    used = codecs.lookup(marked or encoding or "utf-8").name
    try:
        text = body.decode(used)
        found = body if used == "utf-8" else text.encode()
    except UnicodeError as e:
        place = int(getattr(e, "start", 0))
        is_utf8 = used == "utf-8"
        error = _not_utf8(body, path, place, has_option) if is_utf8 else _not_decoded(body, path, used, place)
        raise error from e
    if encoding and used != "utf-8" and used not in WIDE and not body.isascii() and _is_utf8(body):
        logger.warning("%s is read as %s, but all of it is UTF-8 too; is the encoding right?", path, encoding)
    if b"\0" in found:
        wide = _wide_encoding(body)
        nul = "expected text, got a NUL character; the file is damaged or no text"
        advice = f"give {_flag(wide)}" if has_option and wide else "convert it to UTF-8"
        message = f"expected UTF-8, got a text in {wide}; {advice}" if wide else nul
        raise malformed(path, 1 if wide else line_at(found, found.index(b"\0")), message)
    return found


def line_at(raw: bytes, place: int) -> int:
    r"""Line of a byte, counted from 1; lines end with ``\n``, ``\r\n`` or ``\r``."""
    before = raw[:place]
    return 1 + before.count(b"\n") + before.count(b"\r") - before.count(b"\r\n")


def _not_decoded(raw: bytes, path: str, encoding: str, place: int) -> DataError:
    """Error of bytes that the given encoding does not have."""
    hint = "the whole file is UTF-8; leave the encoding out" if _is_utf8(raw) else "is the encoding right?"
    got = f"the byte 0x{raw[place]:02x}" if place < len(raw) else "other bytes"
    return malformed(path, line_at(raw, place), f"expected {encoding}, got {got}; {hint}")


def _not_utf8(raw: bytes, path: str, place: int, has_option: bool) -> DataError:
    """Error of bytes that are not UTF-8, which names the encodings that decode all of them."""
    name_of, end_of = (_flag, "") if has_option else (str, "; convert the file to UTF-8")
    expected = f"expected UTF-8, got the byte 0x{raw[place]:02x}"
    line = line_at(raw, place)
    if wide := _wide_encoding(raw):
        return malformed(path, line, f"{expected}; the whole file can be read with {name_of(wide)}{end_of}")
    text = raw.decode(errors="replace")
    wrong = text.count("\N{REPLACEMENT CHARACTER}")
    if len(text) - len(text.encode("ascii", "ignore")) > 2 * wrong:
        hint = "the rest of the file is UTF-8, so that this line is damaged or in another encoding; repair it"
        return malformed(path, line, f"{expected}; {hint}")
    beyond = len(raw.translate(None, ASCII))
    foreign = beyond > FOREIGN_SHARE * (beyond + sum(map(str.isalpha, text.encode("ascii", "ignore").decode())))
    start, end = _sample(raw, place)
    suggested = []
    for name in (*CANDIDATES[1:], CANDIDATES[0]) if foreign else CANDIDATES:
        try:
            raw.decode(name)
        except UnicodeDecodeError:
            continue
        suggested.append(f"{name_of(name)}, which reads {shown(raw[start:end].decode(name, 'ignore'))}")
    advice = ", or ".join(suggested[:MAX_SUGGESTED])
    hint = f"the whole file can be read with {advice}{end_of}" if advice else "is the file text?"
    return malformed(path, line, f"{expected}; {hint}")


def _sample(raw: bytes, place: int) -> tuple[int, int]:
    """Range of the bytes around a place, inside its line."""
    start = max(raw.rfind(b"\n", 0, place), raw.rfind(b"\r", 0, place), place - SAMPLE_BYTES - 1) + 1
    ends = [e for e in (raw.find(b"\n", place), raw.find(b"\r", place)) if e >= 0]
    return start, min([*ends, place + SAMPLE_BYTES, len(raw)])


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _wide_encoding(raw: bytes) -> str | None:
    """UTF-16 or UTF-32 that decodes all bytes to a text without NUL characters, None if neither does."""
    found = {}
    text_of_bytes = raw.replace(b"\0", b"")
    if len(raw) - len(text_of_bytes) < FEWEST_NULS * len(raw) and _is_utf8(text_of_bytes) and not CONTROL.search(raw):
        return None  # a text of single bytes with some NUL characters; letters of other scripts have control characters
    for name in WIDE if b"\0" in raw else ():
        try:
            text = raw.decode(name)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            found[name] = len(text.encode("ascii", "ignore")) / len(text)
    return max(found, key=lambda name: found[name]) if found else None


def _flag(encoding: str) -> str:
    return f'encoding="{encoding}" (--encoding {encoding})'
