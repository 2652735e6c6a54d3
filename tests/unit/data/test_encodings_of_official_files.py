"""Errors of encodings advise an option only where there is one."""

from __future__ import annotations

import sys

import pytest

from prefixfast import DataError, evaluate
from prefixfast.cli import main
from prefixfast.data import read_rows, read_task

LATIN = "mr,ref\nname[A],Caf\u00e9 A.\n".encode("cp1252")
WIDE = "mr,ref\nname[A],A.\n".encode("utf-16-le")


@pytest.mark.parametrize("raw", [LATIN, WIDE], ids=["cp1252", "UTF-16"])
def test_an_encoding_is_advised_where_it_can_be_given(tmp_path, monkeypatch, capfd, raw):
    path = tmp_path / "a.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r'encoding="[\w-]+" \(--encoding'):
        read_rows(path)
    for call in (
        lambda: read_task("e2e", path),
        lambda: evaluate(["A."], path, task="e2e", metrics=["BLEU"]),
        lambda: evaluate(path, ["A."], task="e2e", metrics=["BLEU"]),
    ):
        with pytest.raises(DataError, match="convert") as caught:
            call()
        assert "encoding=" not in str(caught.value)
    for words, option in ((["--task", "e2e", "--split", "dev"], False), ([], True)):
        monkeypatch.setattr(sys, "argv", ["prefixfast", "data", "check", str(path), *words])
        with pytest.raises(SystemExit):
            main()
        assert ("--encoding" in capfd.readouterr().out) == option


TEXTS = {
    "one NUL": (b"x,y\na\0b\n", "NUL character"),
    "two": (b"a\0b\0 and some further words of it", "NUL character"),
    "at the end": (b"prompt\nabc\0", "NUL character"),
    "Latin": ("prompt\nabc\n".encode("utf-16-be"), "utf-16-be"),
    "Cyrillic": (
        "\u0442\u0435\u043a\u0441\u0442 \u0434\u043b\u0438\u043d\u043d\u044b\u0439\n".encode("utf-16-le"),
        "utf-16-le",
    ),
    "Chinese": ("\u4f60\u597d\u4e16\u754c, \u518d\u89c1\n".encode("utf-16-le"), "utf-16-le"),
    "wide": ("prompt\nabc\n".encode("utf-32-le"), "utf-32-le"),
}


@pytest.mark.parametrize(("raw", "message"), TEXTS.values(), ids=TEXTS)
def test_a_nul_character_is_no_sign_of_utf_16_alone(tmp_path, raw, message):
    path = tmp_path / "a.csv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        read_rows(path)
