"""The tiny saved base, its tokenizer and the command line, as in tests/unit."""

from unit.conftest import _offline, cli, folder, tokenizer  # noqa: F401
