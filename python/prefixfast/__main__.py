"""Entry point of ``python -m prefixfast``."""

from prefixfast.cli import main

main()
