"""Attention over prefixes: the `Plan` of a forward, the operators, their backends, and the hook into transformers."""
