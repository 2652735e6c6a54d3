"""The demo: a small base language model made here, and three jobs that three prefixes learn on top of it.

Attributes:
    BASE: Folder of the base, a Llama of 2 million parameters that is part of the package.
"""

from pathlib import Path

BASE = Path(__file__).parent / "base"
