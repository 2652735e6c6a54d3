"""Experiments that compare methods of training on the same rows."""
