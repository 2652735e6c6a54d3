"""The table of the public corpora whose own files are read."""

from __future__ import annotations

from prefixfast.data.corpora.cnn_dailymail import CNN_DAILYMAIL
from prefixfast.data.corpora.dart import DART
from prefixfast.data.corpora.dialogsum import DIALOGSUM
from prefixfast.data.corpora.e2e import E2E
from prefixfast.data.corpora.official import Corpus, Counts
from prefixfast.data.corpora.samsum import SAMSUM
from prefixfast.data.corpora.totto import TOTTO
from prefixfast.data.corpora.webnlg import WEBNLG
from prefixfast.data.corpora.xsum import XSUM

__all__ = ["CORPORA", "Corpus", "Counts"]
TABLES = (E2E, WEBNLG, DART, TOTTO)
SUMMARIES = (XSUM, CNN_DAILYMAIL, SAMSUM, DIALOGSUM)
CORPORA: dict[str, Corpus] = {corpus.name: corpus for corpus in (*TABLES, *SUMMARIES)}
