"""The table of the public corpora whose own files are read."""

from __future__ import annotations

from prefixfast.data.corpora.dart import DART
from prefixfast.data.corpora.e2e import E2E
from prefixfast.data.corpora.official import Corpus, Counts
from prefixfast.data.corpora.totto import TOTTO
from prefixfast.data.corpora.webnlg import WEBNLG

__all__ = ["CORPORA", "Corpus", "Counts"]
CORPORA: dict[str, Corpus] = {corpus.name: corpus for corpus in (E2E, WEBNLG, DART, TOTTO)}
