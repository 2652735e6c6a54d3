"""Damaged variants of a small file: truncated, in other encodings, with missing keys and values of wrong types."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from typing import Any

WRONG: tuple[Any, ...] = (None, 10**400, 1.5, True, "", "\0", [], {}, [[]], [None], {"a": 1}, "\ud800")
DEEP = 5000  # nested lists; the recursion limit of Python is 1,000


def damaged(name: str, text: str) -> dict[str, bytes]:
    """Damaged contents of a file by what was done to it, at least 50.

    Args:
        name: Name of the file, whose ending says what is inside.
        text: Content of the sound file.
    """
    found = damaged_bytes(text.encode())
    found |= {"UTF-16 without mark": text.encode("utf-16-le"), "Latin-1": text.encode("cp1252", "replace")}
    found |= {kind: changed.encode("utf8", "surrogatepass") for kind, changed in _damaged_text(text)}
    if name.endswith(".xml"):
        found |= {kind: changed.encode() for kind, changed in _damaged_xml(text)}
    if name.endswith((".json", ".jsonl")):
        found |= {kind: changed.encode() for kind, changed in _damaged_json(name, text)}
    return found


def damaged_bytes(raw: bytes) -> dict[str, bytes]:
    """Damaged contents of a file of any kind by what was done to it, at least 50."""
    return dict(_damaged_bytes(raw))


def _damaged_bytes(raw: bytes) -> Iterator[tuple[str, bytes]]:
    for eighth in range(8):
        yield f"cut at {eighth}/8", raw[: len(raw) * eighth // 8]
        place = len(raw) * eighth // 8
        yield f"NUL at {eighth}/8", raw[:place] + b"\0" + raw[place:]
        yield f"no UTF-8 at {eighth}/8", raw[:place] + b"\xff" + raw[place:]
        yield f"a byte lost at {eighth}/8", raw[:place] + raw[place + 1 :]
    for cut in range(1, 15):
        yield f"{cut} bytes cut", raw[:-cut]
    yield "gzip under the plain name", gzip.compress(raw)
    yield "a zip", b"PK\x03\x04" + raw
    yield "a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    yield "a web page", b"<!doctype html><html></html>"
    yield "white space", b" \n\t\n"


def _damaged_text(text: str) -> Iterator[tuple[str, str]]:
    lines = text.splitlines(keepends=True)
    yield from {
        "twice": text + text,
        "a line lost": "".join(lines[:1] + lines[2:]),
        "the first line lost": "".join(lines[1:]),
        "the last line twice": text + lines[-1],
        "reversed": "".join(reversed(lines)),
        "more after the end": text + "\n}]>more||",
        "more before the start": "more\n" + text,
        "quotes lost": text.replace('"', ""),
        "quotes for texts": text.replace('"', '"""', 3),
        "commas lost": text.replace(",", " "),
        "deep": "[" * DEEP + text,
        "deep at its end": text + "{" * DEEP,
        "a long line": text + "x" * 2**17,
        "control characters": text.replace(" ", "\x0b\x1f\x85\u2028", 2),
        "one column more": text.replace("\n", ",\n", 2),
        "bars": text.replace(" ", "||", 3),
        "half a surrogate pair": text + "\ud800",
    }.items()


def _damaged_xml(text: str) -> Iterator[tuple[str, str]]:
    for tag in sorted(set(re.findall(r"<(\w+)", text))):
        yield f"{tag} renamed", text.replace(f"<{tag}", "<other").replace(f"</{tag}", "</other")
        yield f"{tag} not closed", text.replace(f"</{tag}>", "", 1)
        yield f"{tag} lost", re.sub(f"</?{tag}[ >][^>]*>?", "", text)
        yield f"{tag} in {tag}", text.replace(f"<{tag}>", f"<{tag}><{tag}>").replace(f"</{tag}>", f"</{tag}></{tag}>")
        yield f"{tag} empty", re.sub(f"<{tag}([ >]).*?</{tag}>", f"<{tag}/>", text, flags=re.DOTALL)
        yield f"text in {tag}", text.replace(f"</{tag}>", f"text & &unknown; </{tag}>", 1)
        yield f"element in {tag}", text.replace(f"</{tag}>", f"<b>x</b></{tag}>", 1)
        yield f"deep in {tag}", text.replace(f"</{tag}>", f"{'<a>' * 999}{'</a>' * 999}</{tag}>", 1)
    for name in sorted(set(re.findall(r' (\w+)="', text))):
        yield f"attribute {name} lost", re.sub(f' {name}="[^"]*"', "", text)
        yield f"attribute {name} twice", re.sub(f'( {name}="[^"]*")', r"\1\1", text)
        yield f"attribute {name} empty", re.sub(f' {name}="[^"]*"', f' {name}=""', text)
        yield f"attribute {name} huge", re.sub(f' {name}="[^"]*"', f' {name}="{"9" * 9999}"', text)
    yield "bars lost", text.replace(" | ", " ")
    yield "more bars", text.replace(" | ", " | | ")


def _damaged_json(name: str, text: str) -> Iterator[tuple[str, str]]:
    if name.endswith(".jsonl"):
        first, _, rest = text.partition("\n")
        for kind, changed in _damaged_value(json.loads(first)):
            yield kind, f"{changed}\n{rest}"
        return
    yield from _damaged_value(json.loads(text))


def _damaged_value(value: Any) -> Iterator[tuple[str, str]]:
    """Texts of a value in which one inner value is lost, of a wrong type, nested too deep, or under a repeated key."""
    seen = set()
    for place in _places(value):
        shape = tuple("#" if isinstance(p, int) or str(p).isdecimal() else p for p in place)
        if shape in seen:
            continue
        seen.add(shape)
        where = "/".join(map(str, place))
        for wrong in WRONG:
            yield f"{where}: {type(wrong).__name__} {str(wrong)[:5]!a}", _dumps(value, place, wrong)
        mark = "MARK"
        changed = _dumps(value, place, mark)
        yield f"{where}: deep", changed.replace(f'"{mark}"', "[" * DEEP + "]" * DEEP)
        yield f"{where}: 5,000 digits", changed.replace(f'"{mark}"', "9" * 5000)
        yield f"{where}: no number", changed.replace(f'"{mark}"', "NaN")
        if isinstance(place[-1], str):
            yield f"{where}: twice", changed.replace(f'"{mark}"', f'1, "{place[-1]}": 2')
            yield f"{where}: lost", _dumps(value, place, None, lost=True)


def _places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _dumps(value: Any, place: tuple[str | int, ...], changed: Any, *, lost: bool = False) -> str:
    made = json.loads(json.dumps(value))
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    if lost:
        del inner[place[-1]]
    else:
        inner[place[-1]] = changed
    return json.dumps(made)
