"""Proof at load that a model computes the same through prefixfast as by its own forward."""
