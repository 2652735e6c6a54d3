"""The demo: small bases made here, and jobs that prefixes learn on top of them.

Attributes:
    BASE: Folder of the base, a Llama of 2 million parameters that is part of the package.
    SEQ2SEQ_BASE: Folder of the encoder-decoder base, a BART of 2 million parameters that is part of the package.
"""

from pathlib import Path

BASE = Path(__file__).parent / "base"
SEQ2SEQ_BASE = Path(__file__).parent / "base_seq2seq"
