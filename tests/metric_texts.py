"""Texts for the property tests of metrics."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st

WORDS = ("the", "The", "cat", "mat", "on", "0", "3.5", "x-y", ",", ".", "&amp;", "É", "é", "日本", "~")
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)
OUTPUT = st.one_of(TEXT, st.sampled_from(["", " ", "\N{NO-BREAK SPACE}\t"]))
PAIRS = st.lists(st.tuples(OUTPUT, st.lists(TEXT, min_size=1, max_size=4)), min_size=1, max_size=5)
FEW = settings(max_examples=40, deadline=None, derandomize=True)
