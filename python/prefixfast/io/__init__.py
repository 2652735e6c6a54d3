"""Atomic writes, untrusted files and YAML."""
